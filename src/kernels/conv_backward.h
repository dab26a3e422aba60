// kernels/conv_backward.h — gradient of conv_silu (kernels/conv.h) for sequences that start from an empty window.
//   s[t,c] = sum_j w[c,j] x[t-3+j,c];  ds = dy silu'(s);  dx[t,c] = sum_j w[c,j] ds[t+3-j,c];  dw[c,j] += sum_t ds[t,c]
//   x[t-3+j,c]
// s is recomputed. Nothing crosses from one sequence to the next. dtypes (cpu) all f32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct ConvBackward {
  ConstView x;  // [T,C]
  ConstView w;  // [C,4]
  Packing packing;
  ConstView dy;  // [T,C]
  View dx;       // [T,C]  written in full; not dy's or x's memory
  View dw;       // [C,4]  added to; data == nullptr: not wanted
};

void conv_silu_backward(Context&, const ConvBackward&);
size_t conv_silu_backward_workspace_bytes(const Context&, int64_t T, int64_t C);

}  // namespace kda
