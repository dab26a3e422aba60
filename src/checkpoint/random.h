// checkpoint/random.h — random checkpoints of named sizes, for measurements and tests: no download needed to know how
// fast a model of that shape runs.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "checkpoint/config.h"

namespace kda {

// Names and what each is, for a help text.
std::vector<std::pair<std::string, std::string>> named_models();

// The model of that name, with other layers if asked for. `kda` says which layers are KDA:
//   ""  as the name says   all   none   hybrid:3:1  (3 KDA, then 1 full attention, and again)   0,1,5-9  (these)
ModelConfig named_model(const std::string& name, std::optional<int64_t> layers = {}, const std::string& kda = "");

struct RandomCheckpoint {
  uint64_t seed = 0;
  Dtype dtype = Dtype::bf16;  // or f32; A_log and dt_bias are fp32 in any case
  size_t max_shard_bytes = size_t(5) << 30;
};

// Writes config.json and the weights to `folder`, which is made. The weights depend on seed, names and shapes alone.
// Matrices are normal with variance 1/columns (0.02 at AFM's width), embeddings with variance 1; convolutions, A_log
// and dt_bias as in fla: U(-1/2,1/2), log U(1,16) (0 with the bounded gate), softplus^-1 of a step log-uniform in
// (0.001,0.1). Memory stays small at any size. `progress` is told the bytes just written. Throws Error when the folder
// holds a model already.
void write_random_checkpoint(const std::filesystem::path& folder, const ModelConfig&, const RandomCheckpoint&,
                             ThreadPool&, const std::function<void(size_t bytes)>& progress = {});

// Bytes of all weights as write_random_checkpoint stores them.
int64_t weight_bytes(const ModelConfig&, Dtype);

}  // namespace kda
