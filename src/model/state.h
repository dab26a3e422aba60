// model/state.h — what a model remembers of its sequences, in pools, one per layer, sized layer by layer.
//
//   KDA layer             S f32 [slots,H,V,K], window [slots,3,2HK+HV]: the same size at any length
//   full-attention layer  keys and values [slots,capacity,G,d]: capacity grows with the longest sequence
// Windows, keys and values have the backend's activation dtype.
#pragma once
#include <vector>

#include "base/tensor.h"
#include "checkpoint/config.h"
#include "kernels/backend.h"

namespace kda {

struct LayerState {
  Tensor S, window;  // KDA
  Tensor k, v;       // full attention
};

class StatePool {
 public:
  StatePool(Context&, const ModelConfig&, int64_t slots);

  int64_t slots() const { return slots_; }
  int64_t capacity() const { return capacity_; }
  int64_t bytes() const;
  const LayerState& layer(size_t l) const { return layers_[l]; }

  // Makes room for more slots, or for more tokens in each; what is there stays.
  void reserve(Context&, int64_t slots, int64_t tokens);
  // Divides the memory of keys and values anew, into `slots` slots of `tokens` tokens each, at most as many tokens in
  // all as there are; what they held is lost. No reserve() after it.
  void divide(int64_t slots, int64_t tokens);
  // Slot `to` becomes a copy of slot `from`, which holds `tokens` tokens.
  void copy(Context&, int32_t from, int32_t to, int64_t tokens);

  // The memory of one slot in one tensor of a layer, the first `tokens` for keys and values: for saving and restoring.
  static View slot(const Tensor& pool, int32_t slot);

 private:
  struct Sizes {
    Mixer mixer;
    int64_t H, K, V, G, d;
  };
  std::vector<Sizes> sizes_;
  std::vector<LayerState> layers_;
  int64_t slots_ = 0, capacity_ = 0;
  int64_t room_ = 0;  // slots_ * capacity_ as reserved
  bool divided_ = false;
};

}  // namespace kda
