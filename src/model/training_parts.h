// model/training_parts.h — what TrainPass is made of: for each kind of part of a layer, the memory of what it keeps,
// its forward pass that fills it, and its backward pass. A part takes h, the stream after the norm; the norm and the
// residual sum are TrainPass's.
//
// A backward pass may overwrite what was kept once nothing needs it any more: it runs once.
#pragma once
#include <initializer_list>
#include <vector>

#include "model/weights.h"

namespace kda::training {

// Cuts consecutive pieces off a block of memory. Without memory it only counts.
class Cutter {
 public:
  Cutter() = default;
  explicit Cutter(void* base) : base_(static_cast<std::byte*>(base)) {}
  View take(Shape s) {
    constexpr int64_t kAlign = 64;
    const View out{base_ ? base_ + used_ : nullptr, Dtype::f32, s};
    used_ += (s.size() * int64_t(sizeof(float)) + kAlign - 1) / kAlign * kAlign;
    return out;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_ = nullptr;
  int64_t used_ = 0;
};

inline View reshape(View v, Shape s) { return {v.data, v.dtype, s}; }

// Of a batch, or the largest one when `packing` is null (then memory is being planned).
struct Rows {
  int64_t T = 0, N = 0;
  const Packing* packing = nullptr;
};

// What the parts of one pass share.
struct Pass {
  Context& ctx;
  Rows rows;
  Slots no_slots;      // -1 for every sequence: from zeros, kept nowhere
  View window, state;  // of one slot, never touched
  ConstView position;  // i32 [T]  within the sequence
  float eps;
  const float* inv_freq = nullptr;  // of this layer
  float rope_factor = 1;
};

// The largest scratch that any op of a part asks for.
class Workspace {
 public:
  Workspace(const Context& ctx, int64_t T) : ctx_(ctx), T_(T) {}
  void product(const Linear&);
  void norm(int64_t D);
  void add(size_t bytes) { most_ = std::max(most_, bytes); }
  const Context& ctx() const { return ctx_; }
  int64_t T() const { return T_; }
  size_t bytes() const { return most_; }

 private:
  const Context& ctx_;
  int64_t T_;
  size_t most_ = 0;
};

// y_i = x W_i^T + bias_i
void multiply(Context&, ConstView x, std::initializer_list<std::pair<const Linear*, View>>);
// Gradients of the above: of W_i and bias_i where `gradient` has memory, and of x unless dx is empty.
struct Backward {
  const Linear* weights;
  const Linear* gradient;
  ConstView dy;
};
void multiply_backward(Context&, ConstView x, std::initializer_list<Backward>, View dx);

struct KdaKept {
  View q, k, v;                 // [T,HK], [T,HV]  before the convolution
  View conv_q, conv_k, conv_v;  // after it
  View unit_q, unit_k;          // what the recurrence takes besides conv_v
  View f, log_decay, b, beta;
  View f_mid, g_mid;  // between the two matrices of the gates
  View g, o, y;       // y: after the gated norm
  View states;        // kda_forward_keep's
};
struct KdaScratch {
  View d_y, dq, dk, df, db, d_f_mid, d_g_mid;
};
KdaKept keep_kda(const Context&, Cutter&, const LayerWeights&, const Rows&);
KdaScratch kda_scratch(Cutter&, const LayerWeights&, int64_t T, int64_t D);
void kda_workspace(Workspace&, const LayerWeights&);
void kda_forward_pass(Pass&, const LayerWeights&, const KdaKept&, ConstView h, View out);
// dh [T,D] is cut from scratch.d_y and returned when it is wanted.
View kda_backward_pass(Pass&, const LayerWeights&, const LayerWeights& gradient, const KdaKept&, const KdaScratch&,
                       ConstView h, ConstView d_out, bool want_dh);

struct FullKept {
  View q, k, v, o, lse;  // q, k after rotation
};
struct FullScratch {
  View d_o, dq, dk, dv;
};
FullKept keep_full(Cutter&, const LayerWeights&, int64_t T);
FullScratch full_scratch(Cutter&, const LayerWeights&, int64_t T, int64_t D);
void full_workspace(Workspace&, const LayerWeights&);
void full_forward_pass(Pass&, const LayerWeights&, const FullKept&, ConstView h, View out);
View full_backward_pass(Pass&, const LayerWeights&, const LayerWeights& gradient, const FullKept&, const FullScratch&,
                        ConstView h, ConstView d_out, bool want_dh);

struct MlpKept {
  View gate, up, y;  // gate: swiglu only
};
struct MlpScratch {
  View dh, d_up;  // d_up: swiglu only
};
MlpKept keep_mlp(Cutter&, const LayerWeights&, int64_t T);
MlpScratch mlp_scratch(Cutter&, const LayerWeights&, int64_t T, int64_t D);
void mlp_workspace(Workspace&, const LayerWeights&);
// `out` empty: only what is kept.
void mlp_forward_pass(Pass&, const LayerWeights&, const MlpKept&, ConstView h, View out);
View mlp_backward_pass(Pass&, const LayerWeights&, const LayerWeights& gradient, const MlpKept&, const MlpScratch&,
                       ConstView h, ConstView d_out, bool want_dh);

// Whether any of these tensors has memory: a gradient of it is wanted. `inside`: not counting the output projection.
bool any_kda(const KdaWeights&, bool inside);
bool any_full(const FullAttentionWeights&, bool inside);
bool any_mlp(const MlpWeights&, bool inside);

}  // namespace kda::training
