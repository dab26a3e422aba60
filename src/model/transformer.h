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
  View to;  // [T,D]  f32 for layer_out, else the backend's activation dtype
};

class Transformer {
 public:
  // Weights in the memory of the context's backend; without a context, in host memory.
  explicit Transformer(Weights);
  Transformer(Context&, Weights);
  const Weights& weights() const { return weights_; }
  const ModelConfig& config() const { return weights_.config; }

  // Prompt tokens: products by matmul. Leaves the residual stream after the last layer in buffers.x [T,D].
  void prefill(Context&, Buffers&, StatePool&, const Step&, std::span<const Tap> taps = {}) const;
  // One generated token for each sequence: products by matvec. As above, [N,D]. In two halves, so that the second, whose
  // launches depend on N and on the memory alone, can be recorded: the arrays of the step to the backend, and the pass
  // over what they then hold.
  void decode(Context&, Buffers&, StatePool&, const Step&) const;
  void decode_arrays(Context&, Buffers&, const Step&) const;
  void decode_pass(Context&, Buffers&, StatePool&, int64_t N) const;

  // logits [R,vocabulary] f32. `choose`: by matvec, for choosing the next token after the given rows of buffers.x
  // (all rows up to R where `rows` is empty); `score`: by matmul, for many rows of a known text.
  void choose_logits(Context&, Buffers&, std::span<const int32_t> rows, View logits) const;
  void score_logits(Context&, Buffers&, int64_t first_row, View logits) const;

 private:
  struct Pass;
  Pass begin(Context&, Buffers&, StatePool&, std::span<const int32_t> start) const;
  void upload(Context&, Buffers&, const Step&) const;
  void full_attention(Pass&, size_t layer) const;
  void kda_attention(Pass&, size_t layer) const;
  void mlp(Pass&, size_t layer) const;

  Weights weights_;
  std::vector<Tensor> inv_freq_;      // by layer, f32 [head_dim/2]; empty where a layer has no positions
  std::vector<float> rope_factor_;
};

}  // namespace kda
