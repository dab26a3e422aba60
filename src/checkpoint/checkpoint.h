// checkpoint/checkpoint.h — a Hugging Face model folder: config.json, safetensors (one file or shards with an index),
// generation_config.json. Weights stay mapped as they lie; nothing is copied.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "checkpoint/config.h"

namespace kda {

// generation_config.json; a field that is absent there is empty here. Fields that cannot be honoured are refused.
struct GenerationDefaults {
  std::optional<bool> do_sample;
  std::optional<double> temperature, top_p, min_p, typical_p, repetition_penalty;
  std::optional<int64_t> top_k, max_new_tokens, min_new_tokens, max_length, no_repeat_ngram_size;
  std::optional<int32_t> bos, pad;
  std::vector<int32_t> eos;
};

struct Checkpoint {
  std::filesystem::path folder;
  ModelConfig config;
  GenerationDefaults generation;
  std::map<std::string, Tensor> tensors;  // by the table's canonical names, shapes as in the table; read-only memory
  std::string fingerprint;                // SHA-256, hex: config.json, tensor names/shapes/dtypes, first and last 4 KiB of each

  const Tensor& at(const std::string& name) const;  // throws Error naming the folder when absent
};

// Throws Error with both lists when tensors are missing or left over, and for anything that cannot be honoured.
Checkpoint load_checkpoint(const std::filesystem::path& folder);

// `where` as given when it is a folder; a hub id `owner/name` resolves to its snapshot in the local Hugging Face cache.
// Otherwise an Error that names the command which fetches it.
std::filesystem::path resolve_model(const std::string& where);

}  // namespace kda
