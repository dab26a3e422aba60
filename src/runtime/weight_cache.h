// runtime/weight_cache.h — int8 weights: made when a model is loaded, kept in a file by choice.
#pragma once
#include <filesystem>
#include <functional>
#include <string>

#include "model/weights.h"

namespace kda {

// Replaces the model's large matrices by int8 with one scale per row. With a cache path: takes them from that file when
// it belongs to this checkpoint (fingerprint), else makes them and writes the file. The stored weights' pages
// are given back as they are converted, so that resident memory stays near the size of the int8 weights.
void make_int8(Context&, Weights&, const std::string& fingerprint, const std::filesystem::path& cache,
               const std::function<void(const std::string&)>& report);

}  // namespace kda
