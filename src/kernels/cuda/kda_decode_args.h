// kernels/cuda/kda_decode_args.h — what the kernels of kda_decode take.
#pragma once
#include <cuda_bf16.h>

#include "kernels/kda_prep.h"

namespace kda::cuda {

struct KdaDecodeArgs {
  const __nv_bfloat16 *q, *k, *v, *f, *b, *g;
  const float *q_conv, *k_conv, *v_conv, *A_log, *dt_bias, *g_bias, *o_norm;
  __nv_bfloat16* window;
  float* state;
  const int32_t *in, *out;
  __nv_bfloat16* y;
  int64_t slots;
  int N, H, K, V;
  KdaGateParams gate;
  float eps;
};

}  // namespace kda::cuda
