// Rotary frequencies of every kind against transformers' own (tests/data/checkpoints/make_data.py).
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "checkpoint/config.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

// A config.json whose only content of interest is its rotary settings.
RopeConfig rope_of(nlohmann::json given, const nlohmann::json& settings) {
  const nlohmann::json base = {{"model_type", "llama"},   {"hidden_act", "silu"},   {"vocab_size", 8},
                               {"hidden_size", 8},        {"intermediate_size", 8}, {"num_hidden_layers", 1},
                               {"num_attention_heads", 2}};
  given.update(base);
  given.update(settings);
  return parse_config(given.dump(), {{"model.layers.0.self_attn.q_proj.weight", {8, 8}}}).rope;
}

TEST(Rope, EqualsTransformers) {
  const GoldenFile want(std::filesystem::path(KDA_SOURCE_DIR) / "tests/data/checkpoints/rope.safetensors");
  const auto positions = want["positions"].values();
  int i = 0;
  for (const auto& c : want.cases()) {
    SCOPED_TRACE(c.dump());
    const int64_t d = c["head_dim"];
    const auto& settings = c["rope_parameters"];
    nlohmann::json old = settings;  // the same in the style of older transformers
    old["type"] = old["rope_type"];
    old.erase("rope_type");
    old.erase("rope_theta");
    const nlohmann::json trained = {{"max_position_embeddings", c["max_position_embeddings"]}};
    const RopeTable t = rope_table(rope_of(trained, {{"rope_parameters", settings}}), d);
    const RopeTable u =
        rope_table(rope_of(trained, {{"rope_theta", settings["rope_theta"]}, {"rope_scaling", old}}), d);
    EXPECT_EQ(t.inv_freq, u.inv_freq);
    EXPECT_EQ(t.factor, u.factor);

    const std::string n = std::to_string(i++);
    const auto inv_freq = want[n + ".inv_freq"].values(), cosines = want[n + ".cos"].values(),
               sines = want[n + ".sin"].values();
    EXPECT_NEAR(t.factor, want[n + ".attention_factor"].values()[0], 1e-7);
    ASSERT_EQ(t.inv_freq.size(), inv_freq.size());
    // torch's float32 pow is not always rounded as ours: one unit in the last place, which the steps after it keep.
    for (size_t k = 0; k < inv_freq.size(); ++k) EXPECT_NEAR(t.inv_freq[k], inv_freq[k], 2.4e-7 * inv_freq[k]) << k;
    for (size_t p = 0; p < positions.size(); ++p)
      for (size_t k = 0; k < inv_freq.size(); ++k) {
        const double angle = double(float(positions[p]) * t.inv_freq[k]);
        // one unit of the frequency is angle * 2^-23 in the angle, and the angle itself is rounded
        const double tolerance = 1e-6 + 2.5e-7 * angle;
        EXPECT_NEAR(std::cos(angle) * t.factor, cosines[p * inv_freq.size() + k], tolerance) << p << " " << k;
        EXPECT_NEAR(std::sin(angle) * t.factor, sines[p * inv_freq.size() + k], tolerance) << p << " " << k;
      }
  }
  EXPECT_GE(i, 11);
}

TEST(Rope, RefusesWhatItCannotHonour) {
  const auto parse = [](const nlohmann::json& settings) { return rope_of({}, {{"rope_parameters", settings}}); };
  EXPECT_THROW(parse({{"rope_type", "longrope"}}), Error);
  EXPECT_THROW(parse({{"rope_type", "linear"}}), Error);               // no factor
  EXPECT_THROW(parse({{"rope_type", "yarn"}, {"factor", 2}}), Error);  // no trained length anywhere
  EXPECT_THROW(parse({{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}), Error);
  EXPECT_THROW(parse({{"full_attention", {{"rope_type", "default"}}}}), Error);  // one setting for each layer type
  EXPECT_THROW(parse({{"rope_type", "default"}, {"rope_theta", 0}}), Error);
  EXPECT_THROW(rope_table({}, 7), Error);
  EXPECT_NO_THROW(parse({{"rope_type", "default"}, {"rope_theta", 5e5}}));
}

}  // namespace
}  // namespace kda::test
