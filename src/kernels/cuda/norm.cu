// kernels/cuda/norm.cu — RMSNorm of f32 rows to bf16, alone or after the sum that makes the row. A block has a row and
// keeps it in registers: each byte is read once. The sum's order depends on D alone.
#include "kernels/norm.h"

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using bf = __nv_bfloat16;

__device__ float block_sum(float x) {
  __shared__ float part[32];
#pragma unroll
  for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  const int warps = int(blockDim.x) / 32;
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < warps; ++w) x += part[w];
  return x;
}

// D a multiple of 4 and at most 4 kGroups blockDim.
template <bool kAdd, int kGroups>
__global__ void __launch_bounds__(1024)
    norm_row(const float* x, const bf* add, const float* w, float* x_out, bf* y, int64_t D, float eps) {
  const int64_t row = int64_t(blockIdx.x) * D;
  const int groups = int(D / 4);
  float v[kGroups][4], a[kGroups][4], s[kGroups][4];
  release_next();
#pragma unroll
  for (int g = 0; g < kGroups; ++g)  // of the weights nothing changes between launches
    if (const int i = int(threadIdx.x) + g * int(blockDim.x); i < groups) load(s[g], w + 4 * i);
  wait_for_previous();
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    if (const int i = int(threadIdx.x) + g * int(blockDim.x); i < groups) {
      load(v[g], x + row + 4 * i);
      if constexpr (kAdd) load(a[g], add + row + 4 * i);
    }
  float sum = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    if (const int i = int(threadIdx.x) + g * int(blockDim.x); i < groups) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kAdd) v[g][e] += a[g][e];
        sum += v[g][e] * v[g][e];
      }
      if constexpr (kAdd) store(x_out + row + 4 * i, v[g]);
    }
  const float r = 1.0f / sqrtf(block_sum(sum) / float(D) + eps);
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    if (const int i = int(threadIdx.x) + g * int(blockDim.x); i < groups) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[g][e] *= r * s[g][e];
      store(y + row + 4 * i, v[g]);
    }
}

// Any D, any address.
template <bool kAdd>
__global__ void norm_any(const float* x, const bf* add, const float* w, float* x_out, bf* y, int64_t D, float eps) {
  const int64_t row = int64_t(blockIdx.x) * D;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
    float v = x[row + i];
    if constexpr (kAdd) x_out[row + i] = v += widen(add[row + i]);
    sum += v * v;
  }
  const float r = 1.0f / sqrtf(block_sum(sum) / float(D) + eps);
  for (int64_t i = threadIdx.x; i < D; i += blockDim.x) {
    const float v = kAdd ? x_out[row + i] : x[row + i];  // this thread's own
    y[row + i] = narrow<bf>(v * (r * w[i]));
  }
}

template <bool kAdd>
void run(const char* op, Context& ctx, const float* x, const bf* add, const float* w, float* x_out, bf* y, int64_t R,
         int64_t D, float eps) {
  if (R == 0 || D == 0) return;
  constexpr int kGroups = 4;
  const bool wide =
      D % 4 == 0 && D <= 16 * 1024 && aligned(x, 16) && aligned(w, 16) && aligned(y, 8) && (!kAdd || aligned(add, 8));
  if (wide) {
    const auto threads = unsigned(ceil_div(D, 4 * kGroups * 32) * 32);
    launch_early(op, ctx, unsigned(R), threads, 0, norm_row<kAdd, kGroups>, x, add, w, x_out, y, D, eps);
  } else {
    launch(op, ctx, unsigned(R), 256, 0, norm_any<kAdd>, x, add, w, x_out, y, D, eps);
  }
}

}  // namespace

void rms_norm(Context& ctx, const RmsNorm& a) {
  run<false>("rms_norm", ctx, a.x.as<float>(), nullptr, a.w.as<float>(), nullptr, bf16_of(a.y), a.x.dim(0), a.x.dim(1),
             a.eps);
}

void add_rms_norm(Context& ctx, const AddRmsNorm& a) {
  float* x = a.x.as<float>();
  run<true>("add_rms_norm", ctx, x, bf16_of(a.add), a.w.as<float>(), x, bf16_of(a.y), a.x.dim(0), a.x.dim(1), a.eps);
}

}  // namespace kda::cuda
