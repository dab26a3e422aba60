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

// generation_config.json; a field that is absent there is empty here.
struct GenerationDefaults {
  std::optional<bool> do_sample;
  std::optional<double> temperature, top_p, min_p, typical_p, repetition_penalty;
  std::optional<int64_t> top_k, max_new_tokens, min_new_tokens, max_length, no_repeat_ngram_size;
  std::optional<int32_t> bos, pad;
  std::vector<int32_t> eos;
  std::vector<std::string> stop_strings;
};

// Fields that would change the output and cannot be honoured (beams, contrastive search, ..) are an Error naming them;
// unknown ones are added to `warnings`.
GenerationDefaults parse_generation_config(std::string_view text, std::vector<std::string>& warnings,
                                           const std::string& where = "generation_config.json");

struct Checkpoint {
  std::filesystem::path folder;
  ModelConfig config;
  GenerationDefaults generation;
  // By the table's canonical names, shapes as in the table; read-only memory. f32, bf16 or f16, each on its own; A_log
  // and dt_bias always f32.
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> spelling;  // canonical name -> name in the file
  std::vector<std::string> warnings;            // what was ignored, one sentence each
  std::string fingerprint;  // SHA-256, hex: config.json, tensor names/shapes/dtypes, first and last 4 KiB of each

  const Tensor& at(const std::string& name) const;  // throws Error naming the folder when absent
};

// Throws Error with both lists when tensors are missing or left over, and for anything that cannot be honoured: wrong
// dtypes and shapes, a missing shard, a value that is not finite in a norm, A_log, dt_bias, bias or convolution.
// A head beside tie_word_embeddings is accepted when it equals the embeddings byte for byte.
Checkpoint load_checkpoint(const std::filesystem::path& folder);

// Throws Error, beginning with `name`, when a float value is NaN or infinite. Reads every byte.
void check_finite(const std::string& name, const ConstView&);

// `where` as given when it is a folder; a hub id `owner/name` resolves to its snapshot below `cache` (the `hub` folder
// of the Hugging Face cache: models--owner--name/refs/main -> snapshots/HASH). Otherwise an Error that names the
// command which fetches it.
std::filesystem::path resolve_model(const std::string& where, const std::filesystem::path& cache);

}  // namespace kda
