// model/training.h — forward pass that keeps what gradients need, and the backward pass.
//
// Sequences are packed and each starts from zero states; empty ones are allowed. Activations live in one block of
// memory planned beforehand: every layer's, or with `recompute` one layer's and the residual stream at each layer's
// start. Source of the formulas: docs/KDA.md, docs/TRAINING.md.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "model/transformer.h"

namespace kda {

// N sequences one after the other, arrays on the host.
struct Batch {
  std::span<const int32_t> ids;    // [T]
  std::span<const int32_t> start;  // [N+1]
};

// Added to the gradient of what a Tap at the same place copies (layer -1, layer_out: the embedding).
struct Cotangent {
  int64_t layer;
  TapPoint point;   // layer_out or mixer_out
  ConstView value;  // f32 [T,D]
};

struct TrainSizes {
  int64_t rows = 0;          // most tokens in a batch
  int64_t sequences = 1;     // most sequences in a batch
  bool recompute = false;    // activation checkpointing by layer
  bool mixers_only = false;  // room for mixer_forward/mixer_backward alone: one layer's mixer at a time
};

// Bytes that a TrainPass allocates, by what they are for.
struct TrainBytes {
  int64_t activations = 0, scratch = 0;
  int64_t total() const { return activations + scratch; }
};

class TrainPass {
 public:
  // `weights` must outlive the pass; its tensors may change between passes.
  TrainPass(Context&, const Weights& weights, const TrainSizes&);
  ~TrainPass();
  static TrainBytes plan(Context&, const Weights& weights, const TrainSizes&);

  // The residual stream after the last layer, before the final norm: f32 [T,D], valid until the next call.
  View forward(Context&, const Batch&, std::span<const Tap> = {});
  // Gradients of the batch of the last forward(), once. d_x [T,D]: gradient of what forward returned; overwritten.
  // `gradients` is laid out like the weights, f32: what is there is added to, an empty tensor is frozen. Nothing below
  // the lowest layer that has a gradient or a cotangent is computed. final_norm and head are the caller's.
  void backward(Context&, View d_x, std::span<const Cotangent>, Weights& gradients);

  // One layer's mixer alone, on inputs from elsewhere: in, out f32 [T,D]; `in` is read again by mixer_backward. Then
  // the gradients of its weights.
  void mixer_forward(Context&, const Batch&, size_t layer, ConstView in, View out);
  void mixer_backward(Context&, ConstView d_out, Weights& gradients);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kda
