// train/write_model.h — a complete Hugging Face model folder: config.json, weights, tokenizer, generation settings,
// model card. What a conversion and a training run end in.
#pragma once
#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "checkpoint/config.h"
#include "checkpoint/tensor_table.h"

namespace kda {

// The weight of that name (canonical): f32, bf16 or f16, as many elements as the table says. Asked for when it is
// written, one at a time, twice at most.
using TensorSource = std::function<Tensor(const TensorSpec&)>;

struct WriteOptions {
  Dtype stored = Dtype::bf16;  // f32, bf16 or f16; A_log and dt_bias are f32 in any case
  size_t max_shard_bytes = size_t(5) * 1000 * 1000 * 1000;
  std::function<void(size_t bytes)> progress = {};  // told the bytes just written
};

// Writes `out`, which must not exist or be an empty folder. config.json is the model's own text (ModelConfig::text; of
// the source, where it was changed) with what differs replaced and every other key kept. Tokenizer files, chat
// templates, licences and generation_config.json come from source_folder, and so do the spellings of tensor names it
// has; an empty model_card leaves its README.md. Everything is written beside `out` and renamed: there is all or
// nothing. Throws Error.
void write_model_folder(const std::filesystem::path& out, const ModelConfig&, const TensorSource&, const WriteOptions&,
                        const std::filesystem::path& source_folder, const std::string& model_card);

// The same from tensors in memory, by canonical name; throws Error listing those of the table that are not there.
void write_model_folder(const std::filesystem::path& out, const ModelConfig&,
                        const std::map<std::string, ConstView>& values, Dtype stored,
                        const std::filesystem::path& source_folder, const std::string& model_card);

// config.text with what `config` says otherwise replaced: its layers, its dtype. Throws Error for a model that a
// config.json cannot express.
std::string updated_config(const ModelConfig& config);

// Throws Error unless a model may be written there: nothing of that name, or an empty folder.
void check_new_folder(const std::filesystem::path&);

}  // namespace kda
