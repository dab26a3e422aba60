// kernels/cuda/kda_decode_many.h — kda_decode's kernel for at least as many heads as multiprocessors; sm_90.
#pragma once
#include "kernels/cuda/kda_decode_kernel.cuh"

namespace kda::cuda {

// sm_90a code, K = V = 128, 16-byte addresses of the state, and heads enough that it is the faster one.
bool kda_decode_many_takes(const Context&, const KdaDecodeArgs&);
void kda_decode_many(Context&, const KdaDecodeArgs&);

}  // namespace kda::cuda
