// kernels/cuda/gemm90.h — products for many rows on sm_90a, with what follows them done in the same pass.
#pragma once
#include <cuda_bf16.h>

#include "kernels/backend.h"

namespace kda::cuda {

enum class Epilogue { none, relu2, add };  // y = p, y = max(p,0)^2 (both bf16); y += p (f32)

// Whether device, sizes and addresses suit: sm_90a code, K and N multiples of 8, 16-byte addresses.
bool gemm90_takes(const Context&, const void* x, const void* w, const void* y, int64_t R, int64_t N, int64_t K);

// x [R,K], w [N,K] bf16; y [R,N] bf16, or f32 where it is added to.
void gemm90(Context&, Epilogue, const __nv_bfloat16* x, const __nv_bfloat16* w, void* y, int64_t R, int64_t N,
            int64_t K);

}  // namespace kda::cuda
