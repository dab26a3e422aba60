// Whole folders written: nothing of the source is lost, and there is all or nothing.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/random.h"
#include "tests/checkpoint/errors.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"
#include "train/write_model.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kNano = fs::path(KDA_SOURCE_DIR) / "assets/nano-teacher";

std::map<std::string, ConstView> values_of(const Checkpoint& c) {
  std::map<std::string, ConstView> out;
  for (const auto& [name, t] : c.tensors) out[name] = t;
  return out;
}

json config_of(const fs::path& folder) { return json::parse(read_bytes(folder / "config.json")); }

// Every tensor, in the source's dtypes: same names, shapes and bytes in the file; every other file the same.
void expect_same_folder(const fs::path& a, const fs::path& b) {
  const GoldenFile x(a), y(b);
  ASSERT_EQ(x.tensors.size(), y.tensors.size());
  for (const auto& [name, t] : x.tensors) {
    ASSERT_TRUE(y.has(name)) << name;
    EXPECT_EQ(y[name].dtype, t.dtype) << name;
    EXPECT_EQ(y[name].shape, t.shape) << name;
    EXPECT_TRUE(y[name].bytes == t.bytes) << name;
  }
  EXPECT_EQ(config_of(a), config_of(b));
}

class WriteModel : public testing::Test {
 protected:
  TempFolder temp;
  fs::path out = temp / "new";
};

TEST_F(WriteModel, ATeacherReadAndWrittenAgainIsTheSame) {
  const Checkpoint c = load_checkpoint(kNano);
  write_model_folder(out, c.config, values_of(c), Dtype::bf16, kNano, "# card\n");
  expect_same_folder(kNano, out);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"})
    EXPECT_EQ(read_bytes(out / name), read_bytes(kNano / name)) << name;
  EXPECT_EQ(read_bytes(out / "README.md"), "# card\n");
  EXPECT_EQ(temp.names(), std::set<std::string>{"new"});
}

TEST_F(WriteModel, EveryFamilyIsTheSame) {
  int found = 0;
  for (const char* name : {"tiny-hybrid", "tiny-kda", "tiny-teacher"}) {
    const fs::path from = golden_path(name);
    if (from.empty()) continue;
    ++found;
    const Checkpoint c = load_checkpoint(from);
    write_model_folder(temp / name, c.config, values_of(c), c.config.dtype, from, "");
    expect_same_folder(from, temp / name);
  }
  // fla's spellings and shapes ([1,1,H,1], .attn., model.embeddings) stay fla's; Llama's old keys stay.
  for (const char* name : {"fla/swiglu", "llama/yarn", "llama/linear", "llama/llama3rope", "llama/plain"}) {
    const fs::path from = fs::path(KDA_SOURCE_DIR) / "tests/data" / name;
    const Checkpoint c = load_checkpoint(from);
    const fs::path to = temp / fs::path(name).filename().string();
    write_model_folder(to, c.config, values_of(c), c.at("model.embed_tokens.weight").dtype(), from, "");
    const GoldenFile x(from / "model.safetensors"), y(to / "model.safetensors");
    for (const auto& [tensor, t] : x.tensors) {
      ASSERT_TRUE(y.has(tensor)) << name << ": " << tensor;
      EXPECT_TRUE(y[tensor].bytes == t.bytes && y[tensor].shape == t.shape) << name << ": " << tensor;
    }
    json a = config_of(from), b = config_of(to);
    const char* dtype = a.contains("torch_dtype") ? "torch_dtype" : "dtype";
    a.erase(dtype), b.erase(dtype);
    EXPECT_EQ(a, b) << name;
    ++found;
  }
  EXPECT_GE(found, 5);
}

TEST_F(WriteModel, UnknownKeysAndTextFilesTravel) {
  const fs::path from = temp / "from";
  fs::copy(kNano, from, fs::copy_options::recursive);
  json config = config_of(kNano);
  config["somebody_elses"] = {{"deep", {1, 2.5, nullptr}}};
  config["torch_dtype"] = config["dtype"];
  config.erase("dtype");
  write_bytes(from / "config.json", config.dump());
  write_bytes(from / "chat_template.jinja", "{{ x }}");
  write_bytes(from / "LICENSE", "free");
  write_bytes(from / "README.md", "the source's");
  write_bytes(from / "kda-int8.safetensors", "a cache");
  write_bytes(from / "optimizer.pt", "not a model's");
  fs::create_directory(from / "additional_chat_templates");
  write_bytes(from / "additional_chat_templates/rag.jinja", "{{ y }}");
  const Checkpoint c = load_checkpoint(from);
  write_model_folder(out, c.config, values_of(c), Dtype::f32, from, "");
  config["torch_dtype"] = "float32";
  EXPECT_EQ(config_of(out), config);
  EXPECT_EQ(read_bytes(out / "chat_template.jinja"), "{{ x }}");
  EXPECT_EQ(read_bytes(out / "additional_chat_templates/rag.jinja"), "{{ y }}");
  EXPECT_EQ(read_bytes(out / "LICENSE"), "free");
  EXPECT_EQ(read_bytes(out / "README.md"), "the source's");
  EXPECT_FALSE(fs::exists(out / "optimizer.pt"));
  EXPECT_FALSE(fs::exists(out / "kda-int8.safetensors"));
  // bf16 to f32 is exact
  const Checkpoint again = load_checkpoint(out);
  const Tensor &a = c.at("model.norm.weight"), &b = again.at("model.norm.weight");
  ASSERT_EQ(b.dtype(), Dtype::f32);
  for (int64_t i = 0; i < a.v.size(); ++i) EXPECT_EQ(float(a.v.as<bf16>()[i]), b.v.as<float>()[i]);
}

TEST_F(WriteModel, LayersThatBecameKdaAreTold) {
  ThreadPool pool(1);
  write_random_checkpoint(temp / "kda", named_model("nano-hybrid"), {.seed = 3}, pool);
  const Checkpoint student = load_checkpoint(temp / "kda");
  ModelConfig c = student.config;
  c.text = load_checkpoint(kNano).config.text;  // the teacher's, as a conversion has it
  for (LayerSpec& s : c.layers)
    if (s.mixer == Mixer::kda) {
      s.bounded_gate = true;
      s.lower_bound = -4;
    } else {
      s.rope = false;
    }
  write_model_folder(out, c, values_of(student), Dtype::bf16, kNano, "");
  const json before = config_of(kNano), after = config_of(out);
  for (const auto& [key, value] : before.items()) {
    ASSERT_TRUE(after.contains(key)) << key;
    if (key != "architectures" && key != "model_type") {
      EXPECT_EQ(after[key], value) << key;
    }
  }
  EXPECT_EQ(after["model_type"], "arcee_kda");
  EXPECT_EQ(after["architectures"], json{"ArceeKDAForCausalLM"});
  EXPECT_EQ(after["lower_bound"], -4);
  EXPECT_EQ(after["no_rope_layers"], (json{0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(after["layer_types"][2], "linear_attention");
  EXPECT_EQ(after["layer_types"][3], "full_attention");
  EXPECT_TRUE(load_checkpoint(out).config.layers == c.layers);
}

TEST_F(WriteModel, LargeModelsAreSharded) {
  const Checkpoint c = load_checkpoint(kNano);
  const auto value = [&](const TensorSpec& t) { return c.at(t.name); };
  size_t told = 0;
  write_model_folder(out, c.config, value, {.max_shard_bytes = 4 << 20, .progress = [&](size_t n) { told += n; }},
                     kNano, "");
  EXPECT_FALSE(fs::exists(out / "model.safetensors"));
  EXPECT_TRUE(fs::exists(out / "model.safetensors.index.json"));
  const Checkpoint again = load_checkpoint(out);
  size_t bytes = 0;
  for (const auto& [name, t] : c.tensors) {
    bytes += t.v.bytes();
    EXPECT_EQ(std::memcmp(t.v.data, again.at(name).v.data, t.v.bytes()), 0) << name;
  }
  EXPECT_EQ(told, bytes);
}

TEST_F(WriteModel, AllOrNothing) {
  const Checkpoint c = load_checkpoint(kNano);
  int count = 0;
  const auto value = [&](const TensorSpec& t) {
    KDA_CHECK(++count < 9, "the ninth");
    return c.at(t.name);
  };
  EXPECT_TRUE(fails_with("the ninth", [&] { write_model_folder(out, c.config, value, {}, kNano, ""); }));
  EXPECT_TRUE(temp.names().empty());

  auto values = values_of(c);
  values.erase("model.norm.weight");
  EXPECT_TRUE(
      fails_with("model.norm.weight", [&] { write_model_folder(out, c.config, values, Dtype::bf16, kNano, ""); }));
  const std::vector<float> few(3);
  values["model.norm.weight"] = view(few.data(), {3});
  EXPECT_TRUE(fails_with("model.norm.weight is [3], needed [256]",
                         [&] { write_model_folder(out, c.config, values, Dtype::bf16, kNano, ""); }));
  EXPECT_TRUE(temp.names().empty());
}

TEST_F(WriteModel, LeavesWhatIsThere) {
  const Checkpoint c = load_checkpoint(kNano);
  const auto write = [&](const fs::path& to) {
    write_model_folder(to, c.config, values_of(c), Dtype::bf16, kNano, "");
  };
  fs::create_directory(out);
  write_bytes(out / "mine", "1");
  EXPECT_TRUE(fails_with("exists already", [&] { write(out); }));
  EXPECT_EQ(read_bytes(out / "mine"), "1");
  EXPECT_TRUE(fails_with("is a file", [&] { write(out / "mine"); }));
  EXPECT_TRUE(fails_with("is not a folder", [&] {
    write_model_folder(temp / "other", c.config, values_of(c), Dtype::bf16, temp / "nowhere", "");
  }));
  fs::remove(out / "mine");
  write(out.string() + "/");  // empty is as good as none, and a slash at the end is no name
  EXPECT_TRUE(fs::exists(out / "config.json"));
  write(temp / "deep/er/model");
  EXPECT_TRUE(fs::exists(temp / "deep/er/model/config.json"));
}

}  // namespace
}  // namespace kda::test
