// kernels/cuda/gemm.h — cuBLASLt's product for batches of generated tokens.
#pragma once
#include <cuda_bf16.h>

#include "kernels/backend.h"

namespace kda::cuda {

inline constexpr size_t kGemmScratchBytes = size_t(32) << 20;  // NVIDIA's advice for sm_90

// y = x W^T, or y += x W^T (add; y is f32 then). w [N,K], x [R,K] bf16, y [R,N] bf16 | f32. With few rows the weights are
// what takes time, and blocks must share a sum along K to read them fast enough: parts are added up in a fixed order, so
// the bits of a row depend on R, N, K, device and library version, on no other row. scratch: kGemmScratchBytes.
void gemm_few_rows(Context&, const __nv_bfloat16* w, const __nv_bfloat16* x, View y, bool add, int64_t K, void* scratch);

}  // namespace kda::cuda
