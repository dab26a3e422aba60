// train/text_rows.h — text made into token rows once, and kept in a cache folder that is keyed by the content.
#pragma once
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "text/tokenizer.h"
#include "train/rows.h"

namespace kda {

// What turns a document into ids.
struct TextEncoder {
  Tokenizer tokenizer;
  std::string fingerprint;  // of tokenizer.json and what stands below
  int32_t eos = -1;         // put after each document that does not end with it; -1: none
  int32_t vocabulary = 0;   // ids given as such must be below it

  // The tokenizer.json of a model folder. Throws Error when there is none.
  static TextEncoder load(const std::filesystem::path& model_folder, int32_t eos, int32_t vocabulary);
};

struct TextOptions {
  std::string text_key = "text";
  std::filesystem::path cache;  // folder for token caches; made when absent
  // Bytes of text done, of so many; may throw to leave. `what`: "hashing" or "tokenizing".
  std::function<void(const char* what, int64_t done, int64_t total)> progress;
};

// A file or a folder of files (all below it, in order of their names), any mix of:
//   .jsonl .json .ndjson   objects, one a line: `text` (the key can be chosen) or `input_ids`, which are taken as they
//   are .txt .md .text         one document each .safetensors           token shards; the whole data set must be such,
//   and nothing is cached
// Text goes through the tokenizer with its special tokens, an end-of-text id is put after it. Throws Error for anything
// else, naming file and line; a Hugging Face data set on disk, Parquet or Arrow is refused with the command that
// exports it.
// `encoder` is asked for only when there is something to encode or to check.
std::unique_ptr<Rows> open_text(const std::filesystem::path&, const std::function<const TextEncoder&()>& encoder,
                                const TextOptions&, ThreadPool&);

}  // namespace kda
