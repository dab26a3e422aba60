// kernels/cuda/kda_decode_launch.cuh — picks the instance of kda_decode_kernel and launches it.
#pragma once
#include "kernels/cuda/kda_decode_few.cuh"
#include "kernels/cuda/kda_decode_kernel.cuh"
#include "kernels/cuda/matvec_launch.cuh"

namespace kda::cuda {

// Any K and V: a warp takes rows in turn and goes over each twice. vectors: [2K + V + V + 32] floats of shared memory.
__global__ void __launch_bounds__(256) kda_decode_any_kernel(const __grid_constant__ KdaDecodeArgs a) {
  extern __shared__ __align__(16) float vectors[];
  const int K = a.K, V = a.V, tid = threadIdx.x, warp = tid / 32, lane = tid % 32, warps = blockDim.x / 32;
  float *q = vectors, *k = q + K, *decay = k + K, *v = decay + K, *o = v + V, *sums = o + V;
  const int64_t H = a.H, n = blockIdx.x / H, h = blockIdx.x % H, channels = H * (2 * K + V);
  release_next();
  wait_for_previous();
  const int64_t in = a.in[n], out = a.out[n];
  float q_sum = 0, k_sum = 0;
  ConvChannel c;
  const auto taps = [](const float* w, int64_t i) { return reinterpret_cast<const float4*>(w)[i]; };
  for (int i = tid; i < K; i += blockDim.x) {
    const int64_t at = (n * H + h) * K + i;
    c.load_past(a, in, channels, h * K + i), c.load_new(a.q + at);
    q[i] = c.silu(taps(a.q_conv, h * K + i));
    c.store(a, out, channels, h * K + i);
    c.load_past(a, in, channels, (H + h) * K + i), c.load_new(a.k + at);
    k[i] = c.silu(taps(a.k_conv, h * K + i));
    c.store(a, out, channels, (H + h) * K + i);
    decay[i] = decay_of(a.gate, expf(a.A_log[h]), __bfloat162float(a.f[at]) + a.dt_bias[h * K + i]);
    q_sum = fmaf(q[i], q[i], q_sum), k_sum = fmaf(k[i], k[i], k_sum);
  }
  for (int i = tid; i < V; i += blockDim.x) {
    const int64_t channel = 2 * H * K + h * V + i;
    c.load_past(a, in, channels, channel), c.load_new(a.v + (n * H + h) * V + i);
    v[i] = c.silu(taps(a.v_conv, h * V + i));
    c.store(a, out, channels, channel);
  }
  q_sum = warp_total(q_sum), k_sum = warp_total(k_sum);
  if (lane == 0) sums[warp] = q_sum, sums[warps + warp] = k_sum;
  __syncthreads();
  q_sum = k_sum = 0;
  for (int i = 0; i < warps; ++i) q_sum += sums[i], k_sum += sums[warps + i];
  const float k_scale = rsqrtf(k_sum + kL2NormEps), q_scale = rsqrtf(q_sum + kL2NormEps) / sqrtf(float(K));
  const float beta = a.gate.beta_scale * sigmoid(__bfloat162float(a.b[n * H + h]));
  for (int row = warp; row < V; row += warps) {
    const float* from = a.state + ((in < 0 ? 0 : in) * H + h) * V * K + int64_t(row) * K;
    float* to = a.state + ((out < 0 ? 0 : out) * H + h) * V * K + int64_t(row) * K;
    float dot = 0, read = 0;
    if (in >= 0)
      for (int i = lane; i < K; i += 32) dot = fmaf(from[i] * decay[i], k[i], dot);
    const float u = beta * (v[row] - warp_total(dot) * k_scale) * k_scale;
    for (int i = lane; i < K; i += 32) {
      const float s = fmaf(u, k[i], in < 0 ? 0.0f : from[i] * decay[i]);
      if (out >= 0) to[i] = s;
      read = fmaf(s, q[i], read);
    }
    read = warp_total(read);
    if (lane == 0) o[row] = read * q_scale;
  }
  __syncthreads();
  float sum = 0;
  for (int i = lane; i < V; i += 32) sum = fmaf(o[i], o[i], sum);
  const float factor = 1.0f / sqrtf(warp_total(sum) / float(V) + a.eps);
  for (int i = tid; i < V; i += blockDim.x) {
    const int64_t at = (n * H + h) * V + i;
    a.y[at] =
        __float2bfloat16_rn(o[i] * factor * a.o_norm[i] * sigmoid(__bfloat162float(a.g[at]) + a.g_bias[h * V + i]));
  }
}

template <int K, int V>
void launch_kda_decode_as(cudaStream_t stream, bool early, const KdaDecodeArgs& a) {
  launch_on(stream, early, 1, dim3(unsigned(a.N * a.H)), dim3(256), 0, kda_decode_kernel<K, V, 256>, "kda_decode", a);
}

// Takes any sizes. early: the device is sm_90 or later.
inline void launch_kda_decode(cudaStream_t stream, bool early, int sms, const KdaDecodeArgs& a) {
  if (a.N * a.H == 0) return;
  if (a.K == kFewWidth && a.V == kFewWidth && early && a.N * a.H * kFewShare <= 2 * sms)
    return launch_on(stream, true, kFewShare, dim3(unsigned(a.N * a.H * kFewShare)), dim3(kFewThreads), 0,
                     kda_decode_few_kernel, "kda_decode", a);
  if (a.K == 128 && a.V == 128) return launch_kda_decode_as<128, 128>(stream, early, a);
  if (a.K == 64 && a.V == 64) return launch_kda_decode_as<64, 64>(stream, early, a);
  if (a.K == 64 && a.V == 128) return launch_kda_decode_as<64, 128>(stream, early, a);
  if (a.K == 128 && a.V == 64) return launch_kda_decode_as<128, 64>(stream, early, a);
  const size_t bytes = sizeof(float) * size_t(3 * a.K + 2 * a.V + 32);
  if (bytes > 40 << 10) allow_shared(kda_decode_any_kernel, bytes);
  launch_on(stream, early, 1, dim3(unsigned(a.N * a.H)), dim3(256), bytes, kda_decode_any_kernel, "kda_decode", a);
}

}  // namespace kda::cuda
