// kernels/cuda/quantize.cu — the body of quantize_rows: a block per row, which is read twice (the second time from
// cache).
#include "kernels/quantize.h"

#include <cuda_fp8.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"

namespace kda::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kF8>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const __nv_bfloat16* w, uint8_t* q, float* scale, int64_t K) {
  __shared__ uint32_t most_of[kThreads / 32];
  const int64_t n = blockIdx.x;
  const uint16_t* row = reinterpret_cast<const uint16_t*>(w) + n * K;
  // The bits of |w| order as integers do, infinities and NaNs above everything else.
  uint32_t most = 0;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) most = max(most, uint32_t(row[k] & 0x7fff));
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0) most_of[threadIdx.x / 32] = most;
  __syncthreads();
  for (uint32_t m : most_of) most = max(most, m);
  constexpr float kTop = kF8 ? 448 : 127;
  const float size = __uint_as_float(most << 16), inverse = kTop / size;
  const bool finite = most < 0x7f80, usable = finite && isfinite(inverse);
  if (threadIdx.x == 0) scale[n] = !finite ? __int_as_float(0x7fc00000) : usable ? size / kTop : 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const float v = usable ? __uint_as_float(uint32_t(row[k]) << 16) * inverse : 0.0f;
    if constexpr (kF8)
      q[n * K + k] = uint8_t(__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3));
    else
      q[n * K + k] = uint8_t(int8_t(__float2int_rn(v)));
  }
}

}  // namespace

void quantize_rows(Context& ctx, const QuantizeRows& a) {
  const int64_t N = a.w.dim(0), K = a.w.dim(1);
  if (N == 0 || K == 0) return;
  const auto kernel = a.q.dtype == Dtype::f8_e4m3 ? quantize_rows_kernel<true> : quantize_rows_kernel<false>;
  launch("quantize_rows", ctx, dim3(unsigned(N)), dim3(kThreads), 0, kernel, bf16_of(a.w),
         static_cast<uint8_t*>(a.q.data), a.scale.as<float>(), K);
}

}  // namespace kda::cuda
