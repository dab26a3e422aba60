// kernels/cuda/kda_decode_kernel.cuh — one token of a KDA layer: each state is read once and written once.
//
// A block holds one head's state in registers. The state's loads are issued first; convolutions and gates are found
// while they are under way. kda_decode_few.cuh and kda_decode_many.cuh do the same for few and for many heads. What
// all of them share is here, so that sums have one order and results the same bits.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_decode_args.h"

namespace kda::cuda {

// Within a unit in the last place, in one instruction; a division is ten and a branch, in the way of every gate.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ inline float warp_total(float v) {
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(0xffffffffu, v, m);
  return v;
}
__device__ inline float decay_of(const KdaGateParams& gate, float A, float z) {
  return expf(gate.kind == KdaGate::softplus ? -A * softplus(z) : gate.lower_bound * sigmoid(A * z));
}

// One channel's convolution; keeps what the window becomes.
struct ConvChannel {
  __nv_bfloat16 past[4];
  __device__ void load_past(const KdaDecodeArgs& a, int64_t slot, int64_t channels, int64_t channel) {
    load_past(a.window + slot * 3 * channels + channel, slot, channels);
  }
  __device__ void load_past(const __nv_bfloat16* w, int64_t slot, int64_t channels) {
    for (int i = 0; i < 3; ++i) past[i] = slot < 0 ? __float2bfloat16(0.0f) : __ldcg(w + i * channels);
  }
  __device__ void load_new(const __nv_bfloat16* x) { past[3] = __ldcg(x); }
  __device__ float silu(float4 taps) const {
    float s = __bfloat162float(past[0]) * taps.x;
    s = fmaf(__bfloat162float(past[1]), taps.y, s);
    s = fmaf(__bfloat162float(past[2]), taps.z, s);
    s = fmaf(__bfloat162float(past[3]), taps.w, s);
    return s * sigmoid(s);
  }
  __device__ void store(const KdaDecodeArgs& a, int64_t slot, int64_t channels, int64_t channel) const {
    if (slot < 0) return;
    __nv_bfloat16* w = a.window + slot * 3 * channels + channel;
    for (int i = 0; i < 3; ++i) w[i * channels] = past[i + 1];
  }
};

// ---- Sums. Eight lanes have a row of the state, lane l of them the values from 4 l on of every 32; a warp has four
// rows.
template <int kFrom, int kTo>
__device__ inline float lanes_total(float v) {
#pragma unroll
  for (int m = kFrom; m != kTo; m = kFrom > kTo ? m / 2 : m * 2) v += __shfl_xor_sync(0xffffffffu, v, m);
  return v;
}
__device__ inline float row_total(float v) { return lanes_total<4, 0>(v); }         // of a row's eight lanes
__device__ inline float four_rows_total(float v) { return lanes_total<8, 32>(v); }  // one value to a row
__device__ inline float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
// Of kCount = 2^n values at a multiple of 16 bytes.
template <int kCount>
__device__ inline float total_of(const float* values) {
  float s[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float4 v = reinterpret_cast<const float4*>(values)[i];
    s[i] = (v.x + v.y) + (v.z + v.w);
  }
#pragma unroll
  for (int n = kCount / 8; n; n /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// One token: each S[d] an eighth of row d, from `first` on. decay, k and q [32 kPieces] lie in shared memory, k and q
// not yet of unit length. S becomes S decay + u k^T with u = beta (value(d) - S decay k), for which keep(d, p) is
// called as soon as S[d][p] is final; o becomes S q / sqrt(K), whole in each of the row's lanes.
template <int kDepth, int kPieces, class Value, class Keep>
__device__ inline void step_rows(float4 (&S)[kDepth][kPieces], const float* decay, const float* k, const float* q,
                                 int first, float beta, Value value, Keep keep, float (&o)[kDepth]) {
  float dot[kDepth] = {}, kk = 0, qq = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float4 d4 = *reinterpret_cast<const float4*>(decay + p * 32 + first);
    const float4 k4 = *reinterpret_cast<const float4*>(k + p * 32 + first);
    kk = dot4(k4, k4, kk);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float4& s = S[d][p];
      s.x *= d4.x, s.y *= d4.y, s.z *= d4.z, s.w *= d4.w;
      dot[d] = dot4(s, k4, dot[d]);
    }
  }
  const float k_scale = rsqrtf(row_total(kk) + kL2NormEps);
  float u[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) u[d] = beta * (value(d) - row_total(dot[d]) * k_scale) * k_scale, o[d] = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float4 k4 = *reinterpret_cast<const float4*>(k + p * 32 + first);
    const float4 q4 = *reinterpret_cast<const float4*>(q + p * 32 + first);
    qq = dot4(q4, q4, qq);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float4& s = S[d][p];
      s.x = fmaf(u[d], k4.x, s.x), s.y = fmaf(u[d], k4.y, s.y), s.z = fmaf(u[d], k4.z, s.z),
      s.w = fmaf(u[d], k4.w, s.w);
      o[d] = dot4(s, q4, o[d]);
      keep(d, p);
    }
  }
  constexpr float kPerLength = kPieces == 4 ? 0.08838834764831845f : 0.125f;  // 1 / sqrt(K)
  static_assert(kPieces == 4 || kPieces == 2);
  const float q_scale = rsqrtf(row_total(qq) + kL2NormEps) * kPerLength;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) o[d] = row_total(o[d]) * q_scale;
}

// What the gated norm multiplies each of V values by; sums: their squares', four rows each.
template <int V>
__device__ inline float norm_factor(const float* sums, float eps) {
  return rsqrtf(total_of<V / 4>(sums) / float(V) + eps);
}

// A block has a head: a thread kDepth rows' pieces of its state, 8 lanes to a row, and a channel of q, k and v.
template <int K, int V, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) kda_decode_kernel(const __grid_constant__ KdaDecodeArgs a) {
  constexpr int kPass = kThreads / 8, kDepth = V / kPass, kPieces = K / 32;
  static_assert(V % kPass == 0 && kThreads >= K && kThreads >= V);
  __shared__ __align__(16) float q[K], k[K], decay[K], v[V], o[V], sums[V / 4];
  __shared__ float beta_shared;
  const int tid = threadIdx.x;
  const int64_t n = blockIdx.x / a.H, h = blockIdx.x % a.H, H = a.H, channels = H * (2 * K + V);
  const bool takes_q = tid < K, takes_v = tid < V;
  constexpr bool kBoth = kThreads < 2 * K;  // a thread has a channel of q and one of k
  const bool takes_k = kBoth ? tid < K : tid >= kThreads - K;
  const int kc = kBoth ? tid : tid - (kThreads - K);

  // Of the weights nothing changes between launches.
  float4 q_taps{}, k_taps{}, v_taps{};
  float dt = 0, A = expf(a.A_log[h]);
  if (takes_q) q_taps = reinterpret_cast<const float4*>(a.q_conv)[h * K + tid];
  if (takes_k) k_taps = reinterpret_cast<const float4*>(a.k_conv)[h * K + kc], dt = a.dt_bias[h * K + kc];
  if (takes_v) v_taps = reinterpret_cast<const float4*>(a.v_conv)[h * V + tid];
  const int row0 = tid / 8;
  const int64_t piece = (h * V + row0) * K + (tid % 8) * 4;
  release_next();
  wait_for_previous();
  const int64_t in = a.in[n], out = a.out[n];

  // ---- loads: the state, then what the gates need
  float4 S[kDepth][kPieces];
  const float* from = a.state + in * H * V * K + piece;
#pragma unroll
  for (int d = 0; d < kDepth; ++d)
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
      S[d][p] = in < 0 ? float4{} : __ldcs(reinterpret_cast<const float4*>(from + d * kPass * K + p * 32));
  ConvChannel cq, ck, cv;
  float f = 0, gate = 0, gb = 0, ow = 0;
  const int64_t vc = h * V + tid;
  if (takes_q) cq.load_past(a, in, channels, h * K + tid), cq.load_new(a.q + (n * H + h) * K + tid);
  if (takes_k) {
    ck.load_past(a, in, channels, (H + h) * K + kc), ck.load_new(a.k + (n * H + h) * K + kc);
    f = __bfloat162float(a.f[(n * H + h) * K + kc]);
  }
  if (takes_v) {
    cv.load_past(a, in, channels, 2 * H * K + vc), cv.load_new(a.v + n * H * V + vc);
    gate = __bfloat162float(a.g[n * H * V + vc]), gb = a.g_bias[vc], ow = a.o_norm[tid];
  }

  // ---- convolutions, gates
  if (takes_q) q[tid] = cq.silu(q_taps);
  if (takes_k) {
    k[kc] = ck.silu(k_taps);
    decay[kc] = decay_of(a.gate, A, f + dt);
  }
  if (takes_v) v[tid] = cv.silu(v_taps);
  if (tid == 0) beta_shared = a.gate.beta_scale * sigmoid(__bfloat162float(a.b[n * H + h]));
  const float y_gate = ow * sigmoid(gate + gb);
  __syncthreads();

  // ---- recurrence
  float* to = a.state + (out < 0 ? 0 : out) * H * V * K + piece;
  float mine[kDepth];
  step_rows(
      S, decay, k, q, tid % 8 * 4, beta_shared, [&](int d) { return v[row0 + d * kPass]; },
      [&](int d, int p) {
        if (out >= 0) __stcs(reinterpret_cast<float4*>(to + d * kPass * K + p * 32), S[d][p]);
      },
      mine);
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const float sum = four_rows_total(mine[d] * mine[d]);
    if (tid % 8 == 0) o[row0 + d * kPass] = mine[d];
    if (tid % 32 == 0) sums[(row0 + d * kPass) / 4] = sum;
  }
  __syncthreads();

  // ---- gated norm
  if (takes_v) a.y[n * H * V + vc] = __float2bfloat16_rn(o[tid] * norm_factor<V>(sums, a.eps) * y_gate);
  if (takes_v) cv.store(a, out, channels, 2 * H * K + vc);
  if (takes_q) cq.store(a, out, channels, h * K + tid);
  if (takes_k) ck.store(a, out, channels, (H + h) * K + kc);
}

}  // namespace kda::cuda
