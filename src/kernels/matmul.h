// kernels/matmul.h — y_i = x W_i^T for up to 8 matrices that share their input (q, k, v, f0, g0, b in one pass).
//
//   y_i[r,n] = sum_k x[r,k] * W_i[n,k]          (int8: times scale_i[n])
//
// Two ops with one meaning. matmul is for prompts: many rows; weights are repacked panel by panel and multiplied by a
// library GEMM (oneDNN on the CPU, cuBLASLt on CUDA). matvec is for generated tokens: the weights are streamed once,
// as they lie, for all R rows, and this is bound by memory. In each, a row's result depends only on that row: not on R,
// on the thread count, nor on its neighbours.
// dtypes (cpu)  x, y f32; W f32 | bf16 | f16 | i8 with f32 scale [N].
// dtypes (cuda) x bf16; y bf16 | f32; W bf16 | i8 | f8_e4m3, the last two with f32 scale [N].
// Precision     fast: bf16 operands, fp32 sums, where the CPU has such instructions and W is bf16 or i8 (weights are never
//               rounded); exact, and fast otherwise: fp32. matvec always has fp32 x
//               and exact products of it with the stored weights, fp32 sums.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct MatmulSegment {
  WeightView w;  // [N,K]
  View y;        // [R,N]  written in full
  ConstView x = {};  // matvec only: [R,K] its own input, where that is not the one shared
};

struct Matmul {
  ConstView x;                              // [R,K]  R >= 0
  std::span<const MatmulSegment> segments;  // 1..8
};

// y_i = W_i rms_norm(x)                       or, in norm_matvec_relu2, max(that, 0)^2
struct NormMatvec {
  ConstView x;                              // [R,K]  f32, the residual stream
  ConstView norm;                           // [K]    f32
  float eps;
  std::span<const MatmulSegment> segments;  // 1..8, without inputs of their own
  View h;                                   // [R,K]  activation dtype: scratch, where the normed rows may be kept
};

// y += x W^T: what a layer's part adds to the residual stream.
struct MatvecAdd {
  ConstView x;   // [R,K]
  WeightView w;  // [N,K]
  View y;        // [R,N]  f32
  View h;        // [R,N]  activation dtype: scratch
};

void matmul(Context&, const Matmul&);
void matmul_relu2(Context&, const Matmul&);  // y_i = max(x W_i^T, 0)^2
void matvec(Context&, const Matmul&);
void norm_matvec(Context&, const NormMatvec&);
void norm_matvec_relu2(Context&, const NormMatvec&);
void matvec_add(Context&, const MatvecAdd&);

// Upper bounds on scratch for a product with R rows, input width K and at most N rows in any one matrix.
size_t matmul_workspace_bytes(const Context&, int64_t R, int64_t K, int64_t N);
size_t matvec_workspace_bytes(const Context&, int64_t R, int64_t K, int64_t N);

}  // namespace kda
