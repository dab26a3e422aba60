// checkpoint/tensor_table.h — THE list of a model's weights. Loading, writing, inspecting, initialising and training all
// derive from it.
#pragma once
#include <string>
#include <vector>

#include "base/tensor.h"
#include "checkpoint/config.h"

namespace kda {

enum class Init { normal, ones, zeros, conv, a_log, dt_bias };

struct TensorSpec {
  std::string name;                    // canonical, e.g. model.layers.3.self_attn.f_proj.0.weight
  std::vector<std::string> spellings;  // accepted in files besides the name
  Shape shape;
  bool fp32 = false;                   // stored in fp32 whatever the model's dtype (A_log, dt_bias)
  Init init = Init::normal;
  bool decay = true;                   // weight decay applies
  std::string group;                   // embedding, head, norm, attention, mlp, kda
};

// In file order: embeddings, layers, final norm, head (absent when tied).
std::vector<TensorSpec> tensor_table(const ModelConfig&);

}  // namespace kda
