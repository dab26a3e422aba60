// Whole folders: complete ones load whatever their spelling, broken ones say what is wrong.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "checkpoint/random.h"
#include "tests/checkpoint/errors.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

using Tensors = std::map<std::string, GoldenTensor>;

// A small random hybrid, to be changed and written again with this file's own hands.
struct Model : TempFolder {
  nlohmann::json config;
  Tensors tensors;

  explicit Model(const std::string& name = "tiny-hybrid") {
    ThreadPool pool(2);
    write_random_checkpoint(path(), named_model(name), {.seed = 5, .dtype = Dtype::f32}, pool);
    config = nlohmann::json::parse(read_bytes(path() / "config.json"));
    tensors = GoldenFile(path() / "model.safetensors").tensors;
  }
  static void write(const std::filesystem::path& file, const Tensors& all) {
    nlohmann::json header = nlohmann::json::object();
    std::string data;
    for (const auto& [name, t] : all) {
      header[name] = {
          {"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
      data += t.bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const uint64_t n = text.size();
    std::filesystem::remove(file);  // others may still have the old one mapped
    write_bytes(file, std::string(reinterpret_cast<const char*>(&n), 8) + text + data);
  }
  void write_all() const {
    write(path() / "model.safetensors", tensors);
    write_bytes(path() / "config.json", config.dump());
  }
  Checkpoint load() const {
    write_all();
    return load_checkpoint(path());
  }
  // Two shards and their index.
  void write_shards() const {
    Tensors half[2];
    nlohmann::json map;
    for (const auto& [name, t] : tensors) {
      const int s = name < "model.layers.2" ? 0 : 1;
      half[s][name] = t;
      map[name] = s ? "b.safetensors" : "a.safetensors";
    }
    write_all();
    std::filesystem::remove(path() / "model.safetensors");
    write(path() / "a.safetensors", half[0]);
    write(path() / "b.safetensors", half[1]);
    write_bytes(path() / "model.safetensors.index.json",
                nlohmann::json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  }
  void rename(const std::string& from, const std::string& to) {
    tensors[to] = tensors.at(from);
    tensors.erase(from);
  }
};

void to_bf16(GoldenTensor& t) {
  std::string out;
  for (float x : t.floats()) {
    const bf16 b(x);
    out.append(reinterpret_cast<const char*>(&b.bits), 2);
  }
  t.dtype = "BF16";
  t.bytes = out;
}

const std::string kA = "model.layers.0.self_attn.A_log";

TEST(Load, AnotherFileOrderAndShardsAreTheSameModel) {
  Model m;
  const Checkpoint written = load_checkpoint(m.path()), rewritten = m.load();
  m.write_shards();
  const Checkpoint sharded = load_checkpoint(m.path());
  for (const Checkpoint* c : {&rewritten, &sharded}) {
    ASSERT_EQ(c->tensors.size(), written.tensors.size());
    for (const auto& [name, t] : written.tensors) {
      EXPECT_EQ(c->at(name).shape(), t.shape());
      EXPECT_EQ(std::memcmp(c->at(name).v.data, t.v.data, t.v.bytes()), 0) << name;
    }
  }
  EXPECT_EQ(rewritten.fingerprint, sharded.fingerprint);
  EXPECT_NE(written.fingerprint, rewritten.fingerprint);  // config.json was written again, without line breaks
}

TEST(Load, FingerprintSeesConfigNamesAndBothEnds) {
  Model m;
  std::set<std::string> seen{m.load().fingerprint};
  EXPECT_EQ(m.load().fingerprint, *seen.begin());
  const auto fresh = [&] { return seen.insert(m.load().fingerprint).second; };
  m.config["pad_token_id"] = 3;
  EXPECT_TRUE(fresh());
  auto& t = m.tensors.at("lm_head.weight");
  t.bytes.front() ^= 1;
  EXPECT_TRUE(fresh());
  t.bytes.back() ^= 1;
  EXPECT_TRUE(fresh());
  t.bytes[t.bytes.size() / 2] ^= 1;  // the middle of a large tensor is not read
  EXPECT_FALSE(fresh());
  to_bf16(m.tensors.at("model.norm.weight"));
  EXPECT_TRUE(fresh());
}

TEST(Load, AcceptsEverySpelling) {
  Model m;
  const Checkpoint want = m.load();
  Tensors other;
  for (const auto& [spelled, tensor] : m.tensors) {
    std::string name = spelled;
    GoldenTensor t = tensor;
    const auto swap = [&n = name](const std::string& from, const std::string& to) {
      if (const size_t at = n.find(from); at != std::string::npos) n.replace(at, from.size(), to);
    };
    swap(".self_attn.", ".attn.");
    swap("f_proj.0", "f_a_proj"), swap("f_proj.1", "f_b_proj"), swap("g_proj.0", "g_a_proj"),
        swap("g_proj.1", "g_b_proj");
    swap("input_layernorm", "attn_norm"), swap("post_attention_layernorm", "mlp_norm");
    swap("embed_tokens", "embeddings");
    if (name.ends_with("A_log")) t.shape = {1, 1, t.shape[0], 1};
    if (name.ends_with("conv1d.weight")) t.shape = {t.shape[0], 4};
    other[name] = t;
  }
  other["model.layers.0.attn.rotary.inv_freq"] = other["model.rotary_emb.inv_freq"] = {"F32", {1}, "1234"};
  m.tensors = other;
  const Checkpoint got = m.load();
  ASSERT_EQ(got.tensors.size(), want.tensors.size());
  for (const auto& [name, t] : want.tensors) {
    EXPECT_EQ(got.at(name).shape(), t.shape()) << name;
    EXPECT_EQ(std::memcmp(got.at(name).v.data, t.v.data, t.v.bytes()), 0) << name;
  }
  EXPECT_EQ(got.spelling.at(kA), "model.layers.0.attn.A_log");
}

TEST(Load, EachWeightKeepsItsDtypeButTheFp32Ones) {
  Model m;
  for (const char* name : {"lm_head.weight", "model.layers.0.self_attn.A_log", "model.layers.1.self_attn.dt_bias"})
    to_bf16(m.tensors.at(name));
  const Checkpoint c = m.load();
  EXPECT_EQ(c.at("lm_head.weight").dtype(), Dtype::bf16);
  EXPECT_EQ(c.at("model.embed_tokens.weight").dtype(), Dtype::f32);
  EXPECT_EQ(c.at(kA).dtype(), Dtype::f32);
  EXPECT_EQ(c.at(kA).v.as<float>()[1], m.tensors.at(kA).floats()[1]);
}

TEST(Load, NamesBothMissingAndLeftOver) {
  Model m;
  m.rename("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.upwards.weight");
  m.tensors.erase("model.norm.weight");
  m.tensors["extra"] = {"U8", {1}, "x"};
  try {
    m.load();
    FAIL();
  } catch (const Error& e) {
    const std::string s = e.what();
    EXPECT_NE(s.find("2 tensors are missing"), std::string::npos) << s;
    EXPECT_NE(s.find("model.layers.1.mlp.up_proj.weight [160,64]"), std::string::npos) << s;
    EXPECT_NE(s.find("model.norm.weight"), std::string::npos) << s;
    EXPECT_NE(s.find("2 tensors are left over"), std::string::npos) << s;
    EXPECT_NE(s.find("extra"), std::string::npos) << s;
    EXPECT_NE(s.find("model.layers.1.mlp.upwards.weight"), std::string::npos) << s;
  }
}

TEST(Load, NothingOfTheTableMayBeMissing) {
  Model m;
  const Tensors whole = m.tensors;
  for (const auto& [name, unused] : whole) {
    m.tensors = whole;
    m.tensors.erase(name);
    EXPECT_TRUE(fails_with("", [&] { m.load(); })) << name;
  }
}

struct Broken {
  const char* what;
  std::function<void(Model&)> change;
  const char* message;
};

TEST(Load, BrokenFoldersAreRefused) {
  const auto set_float = [](GoldenTensor& t, size_t at, float x) { std::memcpy(t.bytes.data() + 4 * at, &x, 4); };
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const Broken cases[] = {
      {"wrong shape",
       [](Model& m) {
         m.tensors.at("model.layers.3.self_attn.k_proj.weight").shape = {64, 32};
       },
       "model.layers.3.self_attn.k_proj.weight: shape [64,32], needed [32,64]"},
      {"wrong dtype",
       [](Model& m) {
         auto& t = m.tensors.at("lm_head.weight");
         t.dtype = "I32";
       },
       "lm_head.weight: dtype I32, needed F32, BF16 or F16"},
      {"a weight twice",
       [](Model& m) { m.tensors["model.embeddings.weight"] = m.tensors.at("model.embed_tokens.weight"); },
       "the same weight as"},
      {"NaN in A_log", [&](Model& m) { set_float(m.tensors.at(kA), 1, nan); },
       "model.layers.0.self_attn.A_log: value 1 of [2] is not finite"},
      {"infinity in a norm", [&](Model& m) { set_float(m.tensors.at("model.norm.weight"), 63, -inf); },
       "model.norm.weight: value 63"},
      {"NaN in a convolution",
       [&](Model& m) { set_float(m.tensors.at("model.layers.2.self_attn.k_conv1d.weight"), 7, nan); },
       "k_conv1d.weight: value 7"},
      {"tied, but not equal", [](Model& m) { m.config["tie_word_embeddings"] = true; },
       "tie_word_embeddings, but this differs"},
      {"not tied, no head", [](Model& m) { m.tensors.erase("lm_head.weight"); }, "lm_head.weight [260,64]"},
      {"unknown model type", [](Model& m) { m.config["model_type"] = "rwkv7"; },
       "known are arcee, arcee_kda, kda, llama"},
      {"wrong vocabulary", [](Model& m) { m.config["vocab_size"] = 261; }, "needed [261,64]"},
  };
  for (const auto& c : cases) {
    Model m;
    c.change(m);
    EXPECT_TRUE(fails_with(c.message, [&] { m.load(); })) << c.what;
  }
}

TEST(Load, TiedHeads) {
  Model m;
  m.config["tie_word_embeddings"] = true;
  m.tensors.at("lm_head.weight") = m.tensors.at("model.embed_tokens.weight");
  EXPECT_EQ(m.load().tensors.count("lm_head.weight"), 0u);
  m.tensors.erase("lm_head.weight");
  EXPECT_TRUE(m.load().config.tied_head);
}

TEST(Load, FoldersWithoutAModel) {
  TempFolder empty;
  EXPECT_TRUE(fails_with("is not a folder", [&] { load_checkpoint(empty / "none"); }));
  EXPECT_TRUE(fails_with("config.json: missing", [&] { load_checkpoint(empty.path()); }));
  write_bytes(empty / "config.json", "{}");
  write_bytes(empty / "pytorch_model.bin", "");
  EXPECT_TRUE(fails_with("there is config.json, pytorch_model.bin", [&] { load_checkpoint(empty.path()); }));
  std::filesystem::create_directory(empty / "model.safetensors");
  EXPECT_TRUE(fails_with("is a folder, needed a file", [&] { load_checkpoint(empty.path()); }));
}

TEST(Load, BrokenShards) {
  Model m;
  m.write_shards();
  const auto index = m / "model.safetensors.index.json";
  const nlohmann::json good = nlohmann::json::parse(read_bytes(index));
  const auto with_index = [&](const nlohmann::json& j) {
    write_bytes(index, j.dump());
    load_checkpoint(m.path());
  };
  EXPECT_NO_THROW(with_index(good));
  nlohmann::json j = good;
  j["weight_map"]["model.norm.weight"] = "../b.safetensors";
  EXPECT_TRUE(fails_with("must be the name of a file in the same folder", [&] { with_index(j); }));
  j["weight_map"]["model.norm.weight"] = "a.safetensors";
  EXPECT_TRUE(fails_with("which does not hold it", [&] { with_index(j); }));
  j["weight_map"]["model.norm.weight"] = 3;
  EXPECT_TRUE(fails_with("not a string", [&] { with_index(j); }));
  j["weight_map"].erase("model.norm.weight");
  EXPECT_TRUE(fails_with("does not list there", [&] { with_index(j); }));
  EXPECT_TRUE(fails_with("weight_map is missing", [&] { with_index({{"metadata", 1}}); }));
  write_bytes(index, good.dump());
  std::filesystem::resize_file(m / "b.safetensors", 1000);
  EXPECT_THROW(load_checkpoint(m.path()), Error);
  std::filesystem::remove(m / "b.safetensors");
  EXPECT_TRUE(fails_with("b.safetensors: this shard is missing", [&] { load_checkpoint(m.path()); }));
}

TEST(Load, ReadsGenerationConfig) {
  Model m;
  write_bytes(m / "generation_config.json", R"({"eos_token_id":[4,5],"strange":true})");
  const Checkpoint c = m.load();
  EXPECT_EQ(c.generation.eos, (std::vector<int32_t>{4, 5}));
  ASSERT_EQ(c.warnings.size(), 1u);
  write_bytes(m / "generation_config.json", R"({"num_beams":4})");
  EXPECT_TRUE(fails_with("generation_config.json: num_beams = 4 would change the result", [&] { m.load(); }));
}

TEST(CheckFinite, EveryDtype) {
  const auto check = [](auto zero, float bad) {
    using T = decltype(zero);
    std::vector<T> v(10'000, T(1.0f));
    EXPECT_NO_THROW(check_finite("x", view(v.data(), {10'000})));
    v[9'999] = T(bad);
    EXPECT_TRUE(fails_with("x: value 9999 of [100,100] is not finite", [&] {
      check_finite("x", view(v.data(), {100, 100}));
    }));
  };
  for (float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    check(float(), bad);
    check(double(), bad);
    check(bf16(), bad);
    check(f16(), bad);
  }
}

TEST(Match, TellsWhatEachTensorIs) {
  Model m;
  m.tensors.erase("model.norm.weight");
  m.tensors["extra"] = {"U8", {1}, "x"};
  m.tensors["model.rotary_emb.inv_freq"] = {"F32", {1}, "1234"};
  m.write_all();
  const ModelFiles files(m.path());
  int counts[5] = {};
  for (const auto& t : match_tensors(parse_config(m.config.dump(), files.shapes()), files)) ++counts[int(t.status)];
  EXPECT_EQ(counts[int(TensorMatch::Status::ok)], int(m.tensors.size()) - 2);
  EXPECT_EQ(counts[int(TensorMatch::Status::missing)], 1);
  EXPECT_EQ(counts[int(TensorMatch::Status::left_over)], 1);
  EXPECT_EQ(counts[int(TensorMatch::Status::computed)], 1);
}

TEST(Random, DependsOnSeedAndNamesAlone) {
  TempFolder a, b, c;
  ThreadPool one(1), three(3);
  const ModelConfig config = named_model("tiny-hybrid");
  write_random_checkpoint(a.path(), config, {.seed = 1}, one);
  write_random_checkpoint(b.path(), config, {.seed = 1, .max_shard_bytes = 30'000}, three);
  write_random_checkpoint(c.path(), config, {.seed = 2}, one);
  const Checkpoint x = load_checkpoint(a.path()), y = load_checkpoint(b.path()), z = load_checkpoint(c.path());
  EXPECT_GT(b.names().size(), 5u);
  EXPECT_EQ(x.fingerprint, y.fingerprint);
  EXPECT_NE(x.fingerprint, z.fingerprint);
  EXPECT_EQ(x.at("lm_head.weight").dtype(), Dtype::bf16);
  EXPECT_EQ(x.at(kA).dtype(), Dtype::f32);
  EXPECT_TRUE(fails_with("holds a model already", [&] { write_random_checkpoint(a.path(), config, {}, one); }));
}

TEST(Random, HasTheDistributionsItSays) {
  TempFolder folder;
  ThreadPool pool(2);
  write_random_checkpoint(folder.path(), named_model("nano-kda", 2), {.seed = 3, .dtype = Dtype::f32}, pool);
  const Checkpoint c = load_checkpoint(folder.path());
  const auto moments = [&](const std::string& name) {
    const Tensor& t = c.at(name);
    double sum = 0, squares = 0, low = INFINITY, high = -INFINITY;
    for (int64_t i = 0; i < t.v.size(); ++i) {
      const double x = t.v.as<float>()[i];
      sum += x, squares += x * x, low = std::min(low, x), high = std::max(high, x);
    }
    const double n = double(t.v.size()), mean = sum / n;
    return std::array{mean, std::sqrt(squares / n - mean * mean), low, high};
  };
  // A mean of n values of deviation s is off by about s / sqrt(n), a deviation by s / sqrt(2n): four of these are
  // allowed.
  const auto [mean, deviation, low, high] = moments("lm_head.weight");  // [4096,256]: n = 2^20
  EXPECT_NEAR(mean, 0, 4 * 0.0625 / 1024);
  EXPECT_NEAR(deviation, 0.0625, 4 * 0.0625 / 1448);
  EXPECT_NEAR(high, 4.32 * 0.0625, 0.01);
  EXPECT_NEAR(moments("model.embed_tokens.weight")[1], 1, 4.0 / 1448);
  const auto conv = moments("model.layers.1.self_attn.k_conv1d.weight");
  EXPECT_GE(conv[2], -0.5);
  EXPECT_LE(conv[3], 0.5);
  EXPECT_NEAR(conv[1], std::sqrt(1.0 / 12), 0.03);
  const auto a = moments(kA);
  EXPECT_GE(a[2], 0);
  EXPECT_LE(a[3], std::log(16.0));
  const auto dt = moments("model.layers.0.self_attn.dt_bias");
  EXPECT_GE(std::log1p(std::exp(dt[2])), 0.00099);  // softplus of it is the step
  EXPECT_LE(std::log1p(std::exp(dt[3])), 0.1001);
}

TEST(ResolveModel, FoldersThenTheCache) {
  TempFolder cache;
  EXPECT_EQ(resolve_model(cache.path().string(), ""), cache.path());
  const auto repository = cache / "models--some--model.v1";
  std::filesystem::create_directories(repository / "refs");
  std::filesystem::create_directories(repository / "snapshots/abc123");
  const auto find = [&](const std::string& name) { return resolve_model(name, cache.path()); };
  EXPECT_TRUE(fails_with("hf download some/model.v1", [&] { find("some/model.v1"); }));
  write_bytes(repository / "refs/main", "abc123\n");
  EXPECT_EQ(find("some/model.v1"), repository / "snapshots/abc123");
  write_bytes(repository / "refs/main", "../../..");
  EXPECT_TRUE(fails_with("hf download", [&] { find("some/model.v1"); }));
  write_bytes(repository / "refs/main", "other");
  EXPECT_TRUE(fails_with("hf download", [&] { find("some/model.v1"); }));
  for (const char* name : {"", "nothing", "a/b/c", "../x", "a/..", "/no/such/folder", "a b/c"})
    EXPECT_TRUE(fails_with("not a hub id", [&] { find(name); })) << name;
  write_bytes(cache / "file", "");
  EXPECT_TRUE(fails_with("is a file", [&] { find((cache / "file").string()); }));
  EXPECT_TRUE(fails_with("not a hub id", [&] { find(std::string(5000, 'x')); }));
}

}  // namespace
}  // namespace kda::test
