// model/transformer.h — the forward pass of a model of KDA and full-attention layers.
//
//   x = embedding(ids);  per layer: x += mixer(rms_norm(x)); x += mlp(rms_norm(x));  logits = head(rms_norm(x))
//
// Source: transformers' Arcee and Llama models; fla/layers/kda.py @ bc3b101d.
#pragma once
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "model/buffers.h"
#include "model/state.h"
#include "model/weights.h"

namespace kda {

// One pass over N packed sequences, arrays on the host. Each sequence continues the slot it reads (-1: a new one).
struct Step {
  std::span<const int32_t> ids;       // [T]
  std::span<const int32_t> start;     // [N+1]
  std::span<const int32_t> slot_in;   // [N]
  std::span<const int32_t> slot_out;  // [N]
  std::span<const int32_t> past;      // [N]  tokens the sequence has behind it
};

// A place to copy activations to: what `layer`'s mixer takes (after the norm), what it adds, or the residual stream
// after the layer. layer_out of layer -1 is the embedding.
enum class TapPoint { mixer_in, mixer_out, layer_out };
struct Tap {
  int64_t layer;
  TapPoint point;
  View to;  // f32 [T,D]
};

class Transformer {
 public:
  explicit Transformer(Weights);
  const Weights& weights() const { return weights_; }
  const ModelConfig& config() const { return weights_.config; }

  // Prompt tokens: products by matmul. Leaves the residual stream after the last layer in buffers.x [T,D].
  void prefill(Context&, Buffers&, StatePool&, const Step&, std::span<const Tap> taps = {}) const;
  // One generated token for each sequence: products by matvec. As above, [N,D].
  void decode(Context&, Buffers&, StatePool&, const Step&) const;

  // logits [R,vocabulary] f32 of the given rows of buffers.x. `choose`: by matvec, for choosing the next token;
  // `score`: by matmul, for many rows of a known text.
  void choose_logits(Context&, Buffers&, std::span<const int32_t> rows, View logits) const;
  void score_logits(Context&, Buffers&, int64_t first_row, View logits) const;

 private:
  enum class Phase { prefill, decode };
  struct Pass;
  void run(Context&, Buffers&, StatePool&, const Step&, std::span<const Tap>, Phase) const;
  void full_attention(Pass&, size_t layer) const;
  void kda_attention(Pass&, size_t layer) const;
  void mlp(Pass&, size_t layer) const;

  Weights weights_;
  std::vector<Tensor> inv_freq_;      // by layer, f32 [head_dim/2]; empty where a layer has no positions
  std::vector<float> rope_factor_;
};

}  // namespace kda
