#include "checkpoint/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.h"
#include "checkpoint/random.h"
#include "checkpoint/tensor_table.h"
#include "tests/checkpoint/errors.h"

namespace kda::test {
namespace {

using nlohmann::json;

// A hybrid of three layers: KDA (2 heads, K 4, V 6), full attention, KDA.
TensorShapes shapes(const std::string& mixer = "self_attn") {
  TensorShapes s;
  for (int l : {0, 1, 2}) {
    const std::string m = "model.layers." + std::to_string(l) + "." + mixer + ".";
    const bool kda = l != 1;
    s[m + "q_proj.weight"] = s[m + "k_proj.weight"] = {8, 16};
    s[m + "v_proj.weight"] = {kda ? 12 : 8, 16};
    if (!kda) continue;
    s[m + "A_log"] = {1, 1, 2, 1};
    s[m + "o_norm.weight"] = {6};
    s[m + "q_conv1d.weight"] = {8, 1, 4};
  }
  return s;
}

json hybrid() {
  return {{"model_type", "arcee_kda"}, {"vocab_size", 32},       {"hidden_size", 16},
          {"intermediate_size", 24},   {"num_hidden_layers", 3}, {"num_attention_heads", 2},
          {"num_key_value_heads", 2},  {"head_dim", 4}};
}

json fla() {
  return {{"model_type", "kda"},     {"vocab_size", 32},       {"hidden_size", 16},
          {"intermediate_size", 24}, {"num_hidden_layers", 3}, {"num_heads", 2},
          {"head_dim", 4},           {"expand_v", 1.5},        {"attn", {{"layers", {1}}, {"num_heads", 2}}}};
}

json with(json base, const json& change) {
  for (const auto& [key, value] : change.items()) base[key] = value;
  return base;
}

ModelConfig parse(const json& j, const TensorShapes& s = shapes()) { return parse_config(j.dump(), s); }

TEST(Config, LayersAreWhatTheirTensorsSay) {
  const ModelConfig c = parse(hybrid());
  ASSERT_EQ(c.layers.size(), 3u);
  EXPECT_EQ(c.layers[0].mixer, Mixer::kda);
  EXPECT_EQ(c.layers[0].kda_heads, 2);
  EXPECT_EQ(c.layers[0].K, 4);
  EXPECT_EQ(c.layers[0].V, 6);
  EXPECT_EQ(c.layers[1].mixer, Mixer::full);
  EXPECT_EQ(c.layers[1].heads, 2);
  EXPECT_TRUE(c.layers[1].rope);
  EXPECT_EQ(c.layers[1].mlp_width, 24);
  EXPECT_EQ(c.activation, Activation::relu2);
  EXPECT_EQ(c.rope.theta, 10000);
  EXPECT_TRUE(c.warnings.empty());
}

TEST(Config, ReadsFla) {
  for (const char* mixer : {"self_attn", "attn"}) {
    const ModelConfig c = parse(fla(), shapes(mixer));
    EXPECT_EQ(c.activation, Activation::swiglu);
    EXPECT_EQ(c.norm_eps, 1e-6);  // fla's default
    EXPECT_EQ(c.layers[0].V, 6);
    EXPECT_EQ(c.layers[1].head_dim, 8);  // width / heads, not KDA's head_dim
    EXPECT_FALSE(c.layers[0].bounded_gate);
  }
  const ModelConfig c = parse(with(fla(), {{"safe_gate", true}, {"lower_bound", -4.5}, {"allow_neg_eigval", true}}));
  EXPECT_TRUE(c.layers[0].bounded_gate);
  EXPECT_EQ(c.layers[0].lower_bound, -4.5);
  EXPECT_TRUE(c.layers[2].allow_neg_eigval);
}

TEST(Config, ReadsOptionalFields) {
  const ModelConfig c =
      parse(with(hybrid(), {{"eos_token_id", {2, 7}},
                            {"bos_token_id", 1},
                            {"pad_token_id", -1},
                            {"torch_dtype", "float16"},
                            {"no_rope_layers", {1, 0, 1}},
                            {"attention_bias", true},
                            {"mlp_bias", true},
                            {"layer_types", {"linear_attention", "full_attention", "linear_attention"}},
                            {"linear_attn_config", {{"kda_layers", {1, 3}}, {"full_attn_layers", {2}}}},
                            {"hidden_act", "silu"}}));
  EXPECT_EQ(c.eos, (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(c.bos, 1);
  EXPECT_FALSE(c.pad);
  EXPECT_EQ(c.dtype, Dtype::f16);
  EXPECT_FALSE(c.layers[1].rope);
  EXPECT_TRUE(c.layers[1].qkv_bias && c.layers[1].o_bias && c.layers[0].mlp_bias);
  EXPECT_EQ(c.activation, Activation::swiglu);
  EXPECT_EQ(parse(with(hybrid(), {{"dtype", "float32"}, {"torch_dtype", "float16"}})).dtype, Dtype::f32);
}

TEST(Config, UnknownFieldsAreWarnings) {
  const auto c = parse(with(hybrid(), {{"what_is_this", 1}, {"attention_dropout", 0.0}}));
  ASSERT_EQ(c.warnings.size(), 1u);
  EXPECT_NE(c.warnings[0].find("what_is_this"), std::string::npos);
}

TEST(Config, RefusesWhatItCannotHonour) {
  const struct {
    json change;
    const char* message;
  } cases[] = {
      {{{"model_type", "mamba2"}}, "known are arcee, arcee_kda, kda, llama"},
      {{{"model_type", nullptr}}, "model_type is missing"},
      {{{"model_type", 3}}, "needed a string"},
      {{{"vocab_size", "many"}}, "vocab_size is \"many\""},
      {{{"vocab_size", -1}}, "vocab_size is -1"},
      {{{"vocab_size", 1e3}}, "whole number"},
      {{{"hidden_size", 1ull << 63}}, "hidden_size is 9223372036854775808"},
      {{{"hidden_size", nullptr}}, "hidden_size is missing"},
      {{{"intermediate_size", nullptr}}, "intermediate_size is missing"},
      {{{"num_hidden_layers", 4}}, "num_hidden_layers is 4, the tensors are those of 3 layers"},
      {{{"num_hidden_layers", 2}}, "num_hidden_layers is 2"},
      {{{"num_hidden_layers", 1000000000}}, "whole number from 1"},
      {{{"rms_norm_eps", 0}}, "eps"},
      {{{"hidden_act", "gelu"}}, "hidden_act 'gelu'"},
      {{{"num_attention_heads", 3}}, "cannot share"},
      {{{"num_attention_heads", nullptr}}, "num_attention_heads is missing"},
      {{{"head_dim", 3}}, "odd"},
      {{{"sliding_window", 4096}}, "sliding_window = 4096"},
      {{{"quantization_config", {{"bits", 4}}}}, "quantization_config"},
      {{{"dtype", "float8_e4m3fn"}}, "dtype 'float8_e4m3fn'"},
      {{{"layer_types", {"linear_attention", "linear_attention", "linear_attention"}}},
       "layer 1: layer_types says KDA, the tensors say full attention (there is no A_log)"},
      {{{"layer_types", {"full_attention", "full_attention", "full_attention"}}},
       "layer 0: layer_types says full attention, the tensors say KDA (there is an A_log)"},
      {{{"layer_types", {"linear_attention"}}}, "a list of 3 names"},
      {{{"layer_types", {"linear_attention", "sliding_attention", "linear_attention"}}}, "layer_types of layer 1"},
      {{{"attn", {{"layers", {0}}}}}, "layer 0: attn.layers says full attention"},
      {{{"attn", {{"layers", {3}}}}}, "each from 0 to 2"},
      {{{"linear_attn_config", {{"kda_layers", {1, 2}}}}}, "layer 1: linear_attn_config says KDA"},  // counted from 1
      {{{"linear_attn_config", {{"kda_layers", {0}}}}}, "each from 1 to 3"},
      {{{"linear_attn_config", {{"kda_layers", {1, 3}}, {"head_dim", 5}}}},
       "layer 0: linear_attn_config.head_dim says K = 5, the tensors say 4"},
      {{{"linear_attn_config", {{"kda_layers", {1, 3}}, {"short_conv_kernel_size", 3}}}}, "convolution taps = 3"},
      {{{"no_rope_layers", {1, 0}}}, "no_rope_layers has 2 entries"},
      {{{"no_rope_layers", {1, 2, 0}}}, "each from 0 to 1"},
      {{{"safe_gate", true}}, "safe_gate needs a lower_bound"},
      {{{"lower_bound", -5.5}}, "lower_bound is -5.5"},
      {{{"lower_bound", 0}}, "lower_bound is 0"},
      {{{"use_short_conv", false}}, "use_short_conv false"},
      {{{"conv_size", 3}}, "conv_size 3"},
      {{{"rope_theta", "big"}}, "rope_theta"},
      {{{"rope_scaling", {{"rope_type", "dynamic"}, {"factor", 2}}}}, "rope_type 'dynamic'"},
      {{{"eos_token_id", {2, "x"}}}, "eos_token_id"},
      {{{"tie_word_embeddings", 1}}, "true or false"},
  };
  for (const auto& c : cases) EXPECT_TRUE(fails_with(c.message, [&] { parse(with(hybrid(), c.change)); })) << c.change;
  EXPECT_TRUE(fails_with("num_heads says H = 3", [&] { parse(with(fla(), {{"num_heads", 3}})); }));
  EXPECT_TRUE(fails_with("expand_v says V = 4, the tensors say 6", [&] { parse(with(fla(), {{"expand_v", 1}})); }));
  EXPECT_TRUE(fails_with("grouped values", [&] { parse(with(fla(), {{"num_v_heads", 4}})); }));
  EXPECT_TRUE(fails_with("no attn in the config", [&] { parse(with(fla(), {{"attn", nullptr}})); }));
  EXPECT_TRUE(fails_with("window_size", [&] {
    parse(with(fla(), {{"attn", {{"layers", {1}}, {"num_heads", 2}, {"window_size", 512}}}}));
  }));
  EXPECT_TRUE(fails_with("hidden_act 'relu2'", [&] { parse(with(fla(), {{"hidden_act", "relu2"}})); }));
  EXPECT_TRUE(fails_with("hidden_act 'silu'", [&] {
    parse(with(hybrid(), {{"model_type", "arcee"}, {"hidden_act", "silu"}}));
  }));
}

TEST(Config, RefusesShapesItCannotRead) {
  const auto changed = [](const std::string& name, std::vector<int64_t> shape) {
    TensorShapes s = shapes();
    s["model.layers.0.self_attn." + name] = std::move(shape);
    return s;
  };
  EXPECT_TRUE(fails_with("not a multiple of the 2 heads", [&] { parse(hybrid(), changed("q_proj.weight", {9, 16})); }));
  EXPECT_TRUE(fails_with("grouped values", [&] { parse(hybrid(), changed("v_proj.weight", {24, 16})); }));
  EXPECT_TRUE(fails_with("3 taps", [&] { parse(hybrid(), changed("q_conv1d.weight", {8, 1, 3})); }));
  EXPECT_TRUE(fails_with("A_log", [&] { parse(hybrid(), changed("A_log", {0})); }));
  EXPECT_TRUE(fails_with("A_log", [&] { parse(hybrid(), changed("A_log", {1ll << 40, 1ll << 40})); }));
}

TEST(Config, RefusesWhatIsNotJson) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("3"), std::string("{\"a\":\"\xff\"}"),
        std::string(200'000, '['), std::string("{\"model_type\":\"kda\",\"model_type\":\"kda\"}"), std::string("{} {}"),
        std::string("{\"a\":1e999}")})
    EXPECT_THROW(parse_config(text, {}), Error) << text.substr(0, 40);
}

TEST(Config, WrittenConfigsReadBackAsTheSameModel) {
  for (const auto& [name, what] : named_models()) {
    SCOPED_TRACE(name);
    const ModelConfig a = named_model(name, 5);
    TensorShapes s;
    for (const auto& t : tensor_table(a)) s[t.name] = t.file_shape;
    const ModelConfig b = parse_config(a.text, s);
    EXPECT_TRUE(b.warnings.empty());
    EXPECT_EQ(b.model_type, a.model_type);
    EXPECT_EQ(b.width, a.width);
    EXPECT_EQ(b.rope.kind, a.rope.kind);
    EXPECT_EQ(b.rope.factor, a.rope.factor);
    EXPECT_EQ(b.eos, a.eos);
    EXPECT_EQ(b.parameters(), a.parameters());
    ASSERT_EQ(b.layers.size(), 5u);
    for (size_t l = 0; l < 5; ++l) {
      EXPECT_EQ(b.layers[l].mixer, a.layers[l].mixer) << l;
      EXPECT_EQ(b.layers[l].rope, a.layers[l].rope) << l;
      EXPECT_EQ(b.layers[l].K, a.layers[l].K) << l;
      EXPECT_EQ(b.layers[l].heads, a.layers[l].heads) << l;
    }
    EXPECT_EQ(write_config(b), a.text);
  }
  ModelConfig c = named_model("tiny-hybrid");
  c.layers[0].mlp_width = 7;
  EXPECT_THROW(write_config(c), Error);
}

// The published sizes.
TEST(Config, CountsAfm) {
  EXPECT_NEAR(double(named_model("afm-4.5b-base").parameters()), 4.619e9, 0.5e6);
  const ModelConfig kda = named_model("afm-4.5b-kda-only");
  EXPECT_NEAR(double(kda.parameters()), 5.047e9, 0.5e6);
  int64_t layer = 0;
  for (const auto& t : tensor_table(kda))
    if (t.layer == 0 && t.group == "kda") layer += t.shape.size();
  EXPECT_EQ(layer, 27'612'308);
  EXPECT_EQ(named_model("afm-4.5b-base").kv_bytes_per_token(Dtype::bf16), 73'728);
  EXPECT_NEAR(double(kda.state_bytes()), 47.2e6 + 2 * 1.7e6, 0.1e6);  // the window is kept in fp32
}

TEST(NamedModels, Patterns) {
  const auto kinds = [](const std::string& pattern, int64_t layers) {
    std::string s;
    for (const auto& l : named_model("tiny", layers, pattern).layers) s += l.mixer == Mixer::kda ? 'k' : 'f';
    return s;
  };
  EXPECT_EQ(kinds("all", 3), "kkk");
  EXPECT_EQ(kinds("none", 3), "fff");
  EXPECT_EQ(kinds("hybrid:3:1", 9), "kkkfkkkfk");
  EXPECT_EQ(kinds("hybrid:1:2", 5), "kffkf");
  EXPECT_EQ(kinds("0,1,4-6", 8), "kkffkkkf");
  for (const char* bad :
       {"x", "hybrid", "hybrid:3", "hybrid:0:0", "hybrid:1:2:3", "1,", "2-1", "8", "1-", "-1", "0 1", "99999999999"}) {
    EXPECT_THROW(kinds(bad, 8), Error) << bad;
  }
  EXPECT_TRUE(fails_with("known are afm-4.5b-base", [] { named_model("gpt-5"); }));
  EXPECT_THROW(named_model("tiny", 0), Error);
}

TEST(TensorTable, EverySpellingLeadsBackToItsName) {
  for (const char* name : {"afm-4.5b-base", "tiny-hybrid", "nano-kda"}) {
    ModelConfig c = named_model(name);
    c.activation = Activation::swiglu;
    for (auto& l : c.layers) l.qkv_bias = l.o_bias = l.mlp_bias = true;
    std::set<std::string> all;
    for (const auto& t : tensor_table(c)) {
      EXPECT_EQ(canonical_name(t.name), t.name);
      EXPECT_TRUE(all.insert(t.name).second) << t.name;
      for (const auto& s : t.spellings) {
        EXPECT_EQ(canonical_name(s), t.name) << s;
        EXPECT_TRUE(all.insert(s).second) << s;
      }
    }
  }
  for (const char* s :
       {"model.layers.x.self_attn.q_proj.weight", "model.layers..A_log", "model.layers.01.self_attn.A_log",
        "model.layers.3", "model.layers.", "model.layers.99999999999999999999.self_attn.A_log",
        "model.layers.0.self_attn.rotary_emb.inv_freq", "x", ""})
    EXPECT_EQ(canonical_name(s), "") << s;
  EXPECT_EQ(canonical_name("model.layers.7.attn.g_b_proj.bias"), "model.layers.7.self_attn.g_proj.1.bias");
  EXPECT_TRUE(is_computed_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"));
  EXPECT_FALSE(is_computed_buffer("model.layers.0.self_attn.inv_freq"));
}

TEST(GenerationConfig, ReadsWhatItHonours) {
  std::vector<std::string> warnings;
  const auto g = parse_generation_config(
      R"({"do_sample":true,"temperature":0.7,"top_k":20,"top_p":0.9,"min_p":0.05,"typical_p":1.0,"repetition_penalty":1.1,
          "no_repeat_ngram_size":3,"max_new_tokens":100,"min_new_tokens":2,"max_length":20,"eos_token_id":[1,2],"bos_token_id":0,
          "pad_token_id":null,"stop_strings":["\n\n","end"],"num_beams":1,"penalty_alpha":null,"use_cache":true,"odd":1})",
      warnings);
  EXPECT_EQ(g.do_sample, true);
  EXPECT_EQ(g.temperature, 0.7);
  EXPECT_EQ(g.top_k, 20);
  EXPECT_EQ(g.eos, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(g.bos, 0);
  EXPECT_FALSE(g.pad);
  EXPECT_EQ(g.stop_strings, (std::vector<std::string>{"\n\n", "end"}));
  EXPECT_EQ(warnings.size(), 1u);
  EXPECT_EQ(parse_generation_config(R"({"eos_token_id":5})", warnings).eos, std::vector<int32_t>{5});
}

TEST(GenerationConfig, RefusesWhatWouldChangeTheText) {
  std::vector<std::string> warnings;
  for (const char* text : {R"({"num_beams":4})", R"({"penalty_alpha":0.6})", R"({"bad_words_ids":[[1]]})",
                           R"({"suppress_tokens":[3]})", R"({"guidance_scale":1.5})", R"({"top_p":1.5})",
                           R"({"temperature":"hot"})", R"({"eos_token_id":"x"})", R"({"stop_strings":[1]})",
                           R"({"do_sample":1})", R"([])", R"({"top_k":-1})", R"({"watermarking_config":{"a":1}})"})
    EXPECT_THROW(parse_generation_config(text, warnings), Error) << text;
}

}  // namespace
}  // namespace kda::test
