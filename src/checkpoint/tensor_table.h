// checkpoint/tensor_table.h — THE list of a model's weights. Loading, writing, inspecting, initialising and training
// all derive from it.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "checkpoint/config.h"

namespace kda {

enum class Init { normal, ones, zeros, conv, a_log, dt_bias };

struct TensorSpec {
  std::string name;                    // canonical, e.g. model.layers.3.self_attn.f_proj.0.weight
  std::vector<std::string> spellings;  // accepted in files besides the name
  Shape shape;
  bool fp32 = false;  // stored in fp32 whatever the model's dtype (A_log, dt_bias)
  Init init = Init::normal;
  bool decay = true;                // weight decay applies
  std::string group;                // embedding, head, norm, attention, mlp, kda
  std::vector<int64_t> file_shape;  // as written to files: convolutions [C,1,4], all others as `shape`
  int64_t layer = -1;               // -1: of no layer
};

// In file order: embeddings, layers, final norm, head (absent when tied).
std::vector<TensorSpec> tensor_table(const ModelConfig&);

// The canonical form of an accepted spelling (and of a canonical name); empty for a name that no table holds.
std::string canonical_name(std::string_view);

// Buffers some files carry though they follow from config.json: rotary frequencies. Nothing else may be left over.
bool is_computed_buffer(std::string_view file_name);

}  // namespace kda
