// checkpoint/config.h — what config.json says of a model, with one LayerSpec per layer: no size is a constant, and none
// is taken from layer 0. Read from model types arcee, arcee_kda, kda (fla's own) and llama.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace kda {

enum class Mixer { full, kda };
enum class Activation { relu2, swiglu };  // relu2: up, down. swiglu: gate, up, down
enum class RopeKind { standard, linear, llama3, yarn };

// Rotary settings as written; rope_inv_freq() turns them into frequencies.
struct RopeConfig {
  RopeKind kind = RopeKind::standard;
  double theta = 10000;
  double factor = 1;                                 // linear, llama3, yarn
  double original_max_position_embeddings = 0;       // llama3, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;              // yarn
  std::optional<double> attention_factor;        // yarn; else 0.1 ln(factor) + 1 (with mscale as transformers has it)
  std::optional<double> mscale, mscale_all_dim;  // yarn
  bool truncate = true;                          // yarn
};

struct RopeTable {
  std::vector<float> inv_freq;  // [head_dim/2]
  float factor = 1;             // multiplies cos and sin
};

// Each step rounded to float32 in transformers' order (modeling_rope_utils.py); REFERENCE in docs/CHECKPOINTS.md.
RopeTable rope_table(const RopeConfig&, int64_t head_dim);

struct LayerSpec {
  Mixer mixer = Mixer::full;
  // full attention
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  bool rope = true;  // false: no positions
  bool qkv_bias = false, o_bias = false;
  // KDA
  int64_t kda_heads = 0, K = 0, V = 0;  // H heads, key and value width of one head
  bool bounded_gate = false;            // else softplus
  double lower_bound = -5;              // bounded gate
  bool allow_neg_eigval = false;        // beta in (0,2)
  // MLP
  int64_t mlp_width = 0;
  bool mlp_bias = false;

  bool operator==(const LayerSpec&) const = default;
};

struct ModelConfig {
  std::string model_type;
  int64_t vocabulary = 0;
  int64_t width = 0;  // D
  Activation activation = Activation::relu2;
  double norm_eps = 1e-5;
  bool tied_head = false;
  Dtype dtype = Dtype::bf16;  // what the file says weights are stored in
  int64_t max_positions = 0;  // trained length; a warning past it, never a limit
  std::optional<int32_t> bos, pad;
  std::vector<int32_t> eos;
  RopeConfig rope;
  std::vector<LayerSpec> layers;
  std::string text;                   // config.json byte for byte
  std::vector<std::string> warnings;  // fields of it that nobody here knows

  int64_t parameters() const;               // counted from the tensor table
  int64_t state_bytes() const;              // of one sequence in fp32: every KDA layer's S and conv window
  int64_t kv_bytes_per_token(Dtype) const;  // every full-attention layer's keys and values
};

// Name in the file (any accepted spelling) -> shape in the file.
using TensorShapes = std::map<std::string, std::vector<int64_t>>;

// What config.json and the tensors say together: a layer with an A_log is KDA, all others are full attention; KDA sizes
// come from the tensors. Throws Error, beginning with `where`, when the two disagree or a field cannot be honoured.
ModelConfig parse_config(std::string_view text, const TensorShapes&, const std::string& where = "config.json");

// A config.json that parse_config reads back as the same model: model type arcee, llama, or arcee_kda when a layer is
// KDA. Throws Error for a model these cannot express (full-attention layers of different sizes, ..).
std::string write_config(const ModelConfig&);

}  // namespace kda
