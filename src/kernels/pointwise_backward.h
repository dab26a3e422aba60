// kernels/pointwise_backward.h — gradients of the elementwise parts (kernels/pointwise.h), of rotary positions and of
// the embedding. dtypes (cpu): f32, ids i32. Sums over rows run in an order that sizes alone decide.
#pragma once
#include "kernels/rope.h"

namespace kda {

// dbias[c] += sum_r dy[r,c]
struct AddBiasBackward {
  ConstView dy;  // [R,D]
  View dbias;    // [D]  added to
};

// dx = 2 max(x, 0) dy
struct Relu2Backward {
  ConstView x;   // [R,F]
  ConstView dy;  // [R,F]
  View dx;       // [R,F]  may be dy
};

// y = silu(gate) * up
struct SwiGluBackward {
  ConstView gate, up;  // [R,F]
  ConstView dy;        // [R,F]
  View dgate, dup;     // [R,F]  written in full; either may be dy
};

// dtable[ids[t],:] += dy[t,:]
struct EmbeddingBackward {
  ConstView ids;  // [T]
  ConstView dy;   // [T,D]
  View dtable;    // [vocabulary,D]  f32, added to
};

void add_bias_backward(Context&, const AddBiasBackward&);
void relu2_backward(Context&, const Relu2Backward&);
void swiglu_backward(Context&, const SwiGluBackward&);
void embedding_backward(Context&, const EmbeddingBackward&);
// Turns x by minus the angle (and times `factor`): the transpose of rope.
void rope_backward(Context&, const Rope&);
size_t add_bias_backward_workspace_bytes(const Context&, int64_t R, int64_t D);

}  // namespace kda
