// tests/train/tiny_run.h — a run of a tiny student and a tiny teacher that ends within a second or two.
#pragma once
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "checkpoint/random.h"
#include "checkpoint/safetensors.h"
#include "tests/temp_folder.h"
#include "train/distill.h"

namespace kda::test {

// Folders teacher, student and data (40 rows of a text that can be learned; row 17 alone holds token 259).
class TinyRun {
 public:
  TinyRun() {
    ThreadPool pool(1);
    write_random_checkpoint(dir / "teacher", named_model("tiny"), {.seed = 1, .dtype = Dtype::f32}, pool);
    write_random_checkpoint(dir / "student", named_model("tiny-kda"), {.seed = 2, .dtype = Dtype::f32}, pool);
    std::vector<int32_t> tokens;
    std::vector<int64_t> offsets{0};
    for (int32_t row = 0; row < 40; ++row) {
      for (int32_t i = 0; i < 20 + row % 30; ++i) tokens.push_back((row * 7 + i * (1 + row % 5)) % 250);
      if (row == 17) tokens[tokens.size() - 5] = 259;
      offsets.push_back(int64_t(tokens.size()));
    }
    write_shard(dir / "data.safetensors", tokens, offsets);
  }

  // Two stages of 5 and 7 steps; `more` are further lines of YAML.
  std::string yaml(const std::string& out, const std::string& more = "") const {
    return "model: " + (dir / "student").string() + "\nteacher: {path: " + (dir / "teacher").string() +
           "}\noutput_path: " + (dir / out).string() +
           "\ndataset: {train_dataset: {path: " + (dir / "data.safetensors").string() +
           "}, num_eval_samples: 4, cache: " + (dir / "cache").string() + "}\n" +
           R"(precision: exact
threads: 2
batch_size: 2
sequence_length: 24
gradient_accumulation_steps: 2
learning_rate: 1e-2
eval: {every: 4}
checkpoints: {save_steps: 2}
stages:
  - {name: align, losses: [{function: mixer_mse}], max_steps: 5}
  - name: match
    losses: [{function: kl, temperature: 1}, {function: hs_cosine, weight: 0.5}]
    rates: [{match: A_log, learning_rate: 1e-3}]
    max_steps: 7
    sequence_length: 32
)" + more;
  }

  DistillInput input(const std::string& yaml_text, const std::vector<std::string>& settings = {}, bool resume = false) {
    std::vector<std::string> notes;
    DistillInput in;
    in.run = read_run_file(yaml_text, "run.yaml", settings, yaml_text.find("teacher:") == std::string::npos, notes);
    in.student = in.run.model;
    in.teacher = in.run.teacher.path;
    in.cache = in.run.cache;
    in.resume = resume;
    return in;
  }

  std::string final_bytes(const std::string& out) const { return read_bytes(dir / out / "final/model.safetensors"); }

  std::vector<nlohmann::json> metrics(const std::string& out, const std::string& kind) const {
    std::vector<nlohmann::json> found;
    std::istringstream in(read_bytes(dir / out / "metrics.jsonl"));
    for (std::string line; std::getline(in, line);) {
      const auto j = nlohmann::json::parse(line);
      if (j.at("kind") == kind) found.push_back(j);
    }
    return found;
  }

  // The teacher's embedding of one token becomes not a number.
  void break_teacher(int64_t token) {
    const SafetensorsFile file(dir / "teacher/model.safetensors");
    std::map<std::string, ConstView> all;
    std::vector<float> embedding;
    for (const auto& [name, entry] : file.tensors()) {
      const Tensor t = file.tensor(name);
      all[name] = t;
      if (name != "model.embed_tokens.weight") continue;
      embedding.assign(t.v.as<float>(), t.v.as<float>() + t.shape().size());
      const int64_t width = t.shape()[1];
      for (int64_t i = 0; i < width; ++i)
        embedding[size_t(token * width + i)] = std::numeric_limits<float>::quiet_NaN();
      all[name] = view(embedding.data(), t.shape());
    }
    ASSERT_FALSE(embedding.empty());
    save_safetensors(dir / "broken.safetensors", all, file.metadata());
    std::filesystem::rename(dir / "broken.safetensors", dir / "teacher/model.safetensors");
  }

  TempFolder dir;
};

}  // namespace kda::test
