// cli/options.h — options that several commands share, and the only reader of the environment.
#pragma once
#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <string>

#include "runtime/engine.h"

namespace kda::cli {

struct ModelOptions {
  std::string model;
  std::string device = "auto";
  std::string precision = "fast";
  std::string weights = "stored";
  std::string weight_cache;
  int threads = 0;
};

// -m DIR, --device, --precision, -t, --weights, --weight-cache
void add_model_options(CLI::App&, ModelOptions&);
// -m DIR alone, for commands that run nothing.
void add_model_folder(CLI::App&, std::string& model);

// A folder, or a hub id found in the local Hugging Face cache (HF_HUB_CACHE, HF_HOME, ~/.cache/huggingface).
std::filesystem::path model_folder(const std::string& model);

// Where files that can be made again are kept: XDG_CACHE_HOME/kda, else ~/.cache/kda.
std::filesystem::path user_cache();

// Throws Error for a device that is not there, an unknown precision, ..
EngineOptions engine_options(const ModelOptions&);
std::unique_ptr<Engine> open_engine(const ModelOptions&);

// A whole file, or standard input for "-".
std::string read_text(const std::string& path);

// "1,2,3" as ids. Throws Error naming the option and what is not a number.
std::vector<int32_t> parse_ids(const std::string&, const char* option);

// Throws Error unless `path` can be written, before any work is done for it; refuses a file of the model itself.
void check_output(const std::string& path, const std::filesystem::path& model);

// Checks of numbers whose messages say what is needed: no NaN, no infinity, nothing that overflows.
CLI::Validator whole_number(uint64_t lowest = 0);
CLI::Validator at_least(double lowest);
CLI::Validator above_zero();
CLI::Validator share();  // [0,1]

}  // namespace kda::cli
