// checkpoint/layer_pattern.h — which layers of a model: what --kda says.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace kda {

// One entry for each of the layers:
//   all   none   hybrid:3:1  (3, then not 1, and again)   0,1,5-9  (these)
// Throws Error for anything else, and for a layer outside the model.
std::vector<bool> kda_layers(const std::string& pattern, int64_t layers);

}  // namespace kda
