// kernels/matmul_backward.h — gradients of y_i = x W_i^T (kernels/matmul.h) for up to 8 matrices that share their
// input.
//
//   dx[r,k]   =  sum_i sum_n dy_i[r,n] W_i[n,k]        written in full
//   dW_i[n,k] += sum_r dy_i[r,n] x[r,k]                added to
//
// Sums are in fp32, in an order that sizes alone decide, never the number of threads.
// dtypes (cpu)  x, dy, dx, dW f32; W f32 | bf16 | f16.
// Precision     fast: bf16 operands where the CPU has such instructions (matmul_dx: and W is bf16); otherwise fp32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct MatmulDxSegment {
  WeightView w;  // [N,K]
  ConstView dy;  // [R,N]
};

struct MatmulDx {
  std::span<const MatmulDxSegment> segments;  // 1..8
  View dx;                                    // [R,K]
};

struct MatmulDwSegment {
  ConstView dy;  // [R,N]
  View dw;       // [N,K]
};

struct MatmulDw {
  ConstView x;                                // [R,K]
  std::span<const MatmulDwSegment> segments;  // 1..8
};

void matmul_dx(Context&, const MatmulDx&);
void matmul_dw(Context&, const MatmulDw&);

// Upper bounds on scratch for R rows, input width K and at most N rows in any one matrix.
size_t matmul_dx_workspace_bytes(const Context&, int64_t R, int64_t K, int64_t N);
size_t matmul_dw_workspace_bytes(const Context&, int64_t R, int64_t K, int64_t N);

}  // namespace kda
