// kernels/cuda/gemm90.h — products for many rows on sm_90a, with what follows them done in the same pass.
#pragma once
#include <cuda_bf16.h>

#include <span>

#include "kernels/backend.h"

namespace kda::cuda {

enum class Epilogue { none, relu2 };  // y = p; y = max(p,0)^2

inline constexpr int kGemm90Parts = 8;

// One of up to eight matrices that share x.
struct Gemm90Part {
  const __nv_bfloat16* w;  // [N,K]
  __nv_bfloat16* y;        // [R,N]
  int64_t N, ld;           // ld: elements from row to row of y
};

// Whether device, sizes and addresses suit: sm_90a code, K a multiple of 8, N and ld even, 16-byte addresses of x and
// w.
bool gemm90_takes(const Context&, const void* x, std::span<const Gemm90Part>, int64_t R, int64_t K);
// Whether it is the faster one: there are tiles enough to fill the device. Below that cuBLASLt has smaller tiles.
bool gemm90_pays(const Context&, std::span<const Gemm90Part>, int64_t R);

// x [R,K] bf16
void gemm90(Context&, Epilogue, const __nv_bfloat16* x, std::span<const Gemm90Part>, int64_t R, int64_t K);

}  // namespace kda::cuda
