// Every checkpoint of the reference files loads, whole and as its config.json says.
#include <gtest/gtest.h>

#include <cmath>

#include "checkpoint/checkpoint.h"
#include "checkpoint/tensor_table.h"
#include "tests/check.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

// Golden readers know nothing of the library; compare bytes of each tensor with what they read.
void expect_loads(const std::filesystem::path& folder) {
  const Checkpoint c = load_checkpoint(folder);
  const GoldenFile want(folder / "model.safetensors");
  EXPECT_EQ(c.tensors.size(), want.tensors.size());
  int64_t parameters = 0;
  for (const auto& [name, t] : want.tensors) {
    ASSERT_TRUE(c.tensors.count(name)) << name;
    const Tensor& got = c.at(name);
    ASSERT_EQ(got.v.bytes(), t.bytes.size()) << name;
    EXPECT_EQ(std::memcmp(got.v.data, t.bytes.data(), t.bytes.size()), 0) << name;
    parameters += t.size();
  }
  EXPECT_EQ(c.config.parameters(), parameters);
  EXPECT_EQ(c.fingerprint.size(), 64u);
  EXPECT_TRUE(c.warnings.empty()) << c.warnings[0];
}

TEST(GoldenCheckpoints, TinyKda) {
  KDA_NEED(folder, "tiny-kda");
  expect_loads(folder);
  const auto c = load_checkpoint(folder).config;
  ASSERT_EQ(c.layers.size(), 4u);
  for (const auto& l : c.layers) {
    EXPECT_EQ(l.mixer, Mixer::kda);
    EXPECT_EQ(l.kda_heads, 2);
    EXPECT_EQ(l.K, 32);
    EXPECT_EQ(l.V, 32);
    EXPECT_FALSE(l.bounded_gate);
  }
  EXPECT_EQ(c.state_bytes(), 4 * 4 * (2 * 32 * 32 + 3 * 3 * 64));
  EXPECT_EQ(c.kv_bytes_per_token(Dtype::bf16), 0);
}

TEST(GoldenCheckpoints, TinyHybrid) {
  KDA_NEED(folder, "tiny-hybrid");
  expect_loads(folder);
  const auto c = load_checkpoint(folder).config;
  ASSERT_EQ(c.layers.size(), 4u);
  for (size_t l = 0; l < 4; ++l) EXPECT_EQ(c.layers[l].mixer, l < 3 ? Mixer::kda : Mixer::full);
  EXPECT_FALSE(c.layers[3].rope);
  EXPECT_EQ(c.layers[3].heads, 2);
  EXPECT_EQ(c.layers[3].kv_heads, 1);
  EXPECT_EQ(c.kv_bytes_per_token(Dtype::bf16), 2 * 32 * 2);
}

TEST(GoldenCheckpoints, SmallKdaBf16) {
  KDA_NEED(folder, "small-kda-bf16");
  expect_loads(folder);
}

TEST(GoldenCheckpoints, TinyTeacher) {
  KDA_NEED(folder, "tiny-teacher");
  expect_loads(folder);
  const auto c = load_checkpoint(folder);
  EXPECT_EQ(c.generation.eos, std::vector<int32_t>{2});
  EXPECT_EQ(c.generation.bos, 1);
  EXPECT_EQ(c.config.rope.kind, RopeKind::yarn);
  const GoldenFile want(folder / "expected.safetensors");
  const RopeTable t = rope_table(c.config.rope, c.config.layers[0].head_dim);
  EXPECT_TRUE(close(t.inv_freq, want["inv_freq"].values(), 1e-7, 1));
  EXPECT_NEAR(t.factor, want["attention_factor"].values()[0], 1e-7);
}

TEST(GoldenCheckpoints, NanoTeacher) {
  const auto folder = shared_path("nano-teacher");
  if (folder.empty()) GTEST_SKIP() << "needs ../shared/nano-teacher";
  expect_loads(folder);
  EXPECT_EQ(load_checkpoint(folder).generation.pad, 2);
}

TEST(TestDataCheckpoints, Load) {
  int checkpoints = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(std::filesystem::path(KDA_SOURCE_DIR) / "tests/data")) {
    if (entry.path().filename() != "config.json") continue;
    const auto folder = entry.path().parent_path();
    SCOPED_TRACE(folder.string());
    ++checkpoints;
    const Checkpoint c = load_checkpoint(folder);
    const GoldenFile want(folder / "model.safetensors");
    EXPECT_EQ(c.tensors.size(), want.tensors.size());
    for (const auto& [canonical, spelling] : c.spelling)
      EXPECT_TRUE(want.has(spelling)) << canonical << " " << spelling;
    EXPECT_TRUE(c.warnings.empty()) << c.warnings[0];
  }
  EXPECT_GE(checkpoints, 5);
}

// The angle is a float32 product of float32 position and frequency; golden/yarn_afm was made that way.
TEST(Rope, YarnOfAfm) {
  KDA_NEED(path, "yarn_afm.safetensors");
  const GoldenFile want(path);
  RopeConfig r;
  r.kind = RopeKind::yarn;
  r.factor = 20;
  r.original_max_position_embeddings = 4096;
  r.mscale = 1;
  const RopeTable t = rope_table(r, 128);
  const auto inv_freq = want["inv_freq"].values();
  for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(t.inv_freq[i], inv_freq[i], 1e-6 * inv_freq[i]) << i;
  EXPECT_NEAR(t.factor, want["attention_factor"].values()[0], 1e-6);
  const auto positions = want["positions"].values(), cosines = want["cos"].values(), sines = want["sin"].values();
  double worst = 0;
  for (size_t p = 0; p < positions.size(); ++p)
    for (size_t i = 0; i < 128; ++i) {
      const float angle = float(positions[p]) * t.inv_freq[i % 64];
      worst = std::max(worst, std::abs(std::cos(double(angle)) * t.factor - cosines[p * 128 + i]));
      worst = std::max(worst, std::abs(std::sin(double(angle)) * t.factor - sines[p * 128 + i]));
    }
  EXPECT_LT(worst, 1e-6);
  RecordProperty("worst", std::to_string(worst));
}

TEST(Rope, ComparisonWouldSeeFloat64Frequencies) {  // 2e-3 off at 65k: the rounding order matters
  RopeConfig r;
  const RopeTable t = rope_table(r, 128);
  double worst = 0;
  for (size_t i = 0; i < 64; ++i) {
    const double exact = std::pow(10000.0, -2.0 * double(i) / 128);
    worst = std::max(worst, std::abs(std::cos(65535 * exact) - std::cos(double(65535.0f * t.inv_freq[i]))));
  }
  EXPECT_GT(worst, 1e-4);
}

}  // namespace
}  // namespace kda::test
