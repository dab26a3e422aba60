// kernels/cuda/kda_decode_kernel.cuh — one token of a KDA layer: each state is read once and written once.
//
// A block holds `kRows` rows of one head's state in registers. The state's loads are issued first; convolutions, gates
// and lengths are found while they are under way. Where sequences are few, the four blocks of a cluster share a head,
// so that more multiprocessors take part; what they exchange is the sum of squares of the gated norm. Sums have one
// order whether a head is shared or not.
#pragma once
#include <cooperative_groups.h>

#include "kernels/cuda/async.cuh"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_decode_args.h"

namespace kda::cuda {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
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
    const __nv_bfloat16* w = a.window + slot * 3 * channels + channel;
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

// f and g of a head, as they were stored.
struct StoredGates {
  const KdaDecodeArgs& a;
  int64_t n, h;
  template <class Sync>
  __device__ void find(Sync) {}
  __device__ float f(int channel) const { return __bfloat162float(__ldcg(a.f + (n * a.H + h) * a.K + channel)); }
  __device__ float g(int channel) const { return __bfloat162float(__ldcg(a.g + (n * a.H + h) * a.V + channel)); }
};

// Head h of sequence n, of which this block of kThreads takes a share: kShare blocks of a cluster have one head
// together. A thread holds kDepth rows' pieces: 8 lanes to a row. What was computed before is read past the first-level
// cache, for a block that lives longer than one step (chain_kernel). sync: a barrier of the kThreads; all of them call
// wait, which returns when what this step takes is there, and done, when y is written. kAhead: nothing before wait
// writes slots, states or windows, so they are read before it, and written after done. gates: StoredGates, or what
// finds f and g here.
template <int K, int V, int kShare, int kThreads, bool kAhead, class Gates, class Sync, class Wait, class Done>
__device__ void kda_decode_head(const KdaDecodeArgs& a, int64_t n, int64_t h, int share, Gates gates, Sync sync,
                                Wait wait, Done done) {
  constexpr int kRows = V / kShare, kPass = kThreads / 8, kDepth = kRows / kPass, kPieces = K / 32;
  static_assert(kRows % kPass == 0 && kRows % 32 == 0 && kThreads >= K && kThreads >= kRows);
  __shared__ __align__(16) float q[K], k[K], decay[K], v[kRows], o[kRows];
  __shared__ float q_sums[K / 32], k_sums[K / 32], o_sums[V / 32], beta_shared;
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t H = a.H, channels = H * (2 * K + V);
  const bool takes_q = tid < K, takes_v = tid < kRows;
  constexpr bool kBoth = kThreads < 2 * K;  // a thread has a channel of q and one of k
  const bool takes_k = kBoth ? tid < K : tid >= kThreads - K;
  const int kc = kBoth ? tid : tid - (kThreads - K);

  // Of the weights nothing changes between launches. The slot may: what is read here is only a guess.
  float4 q_taps{}, k_taps{}, v_taps{};
  float dt = 0, A = expf(a.A_log[h]);
  if (takes_q) q_taps = reinterpret_cast<const float4*>(a.q_conv)[h * K + tid];
  if (takes_k) k_taps = reinterpret_cast<const float4*>(a.k_conv)[h * K + kc], dt = a.dt_bias[h * K + kc];
  if (takes_v) v_taps = reinterpret_cast<const float4*>(a.v_conv)[h * V + share * kRows + tid];
#if __CUDA_ARCH__ >= 900
  if constexpr (kShare > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  const int row0 = tid / 8;
  const int64_t piece = (h * V + share * kRows + row0) * K + (tid % 8) * 4;
  const auto known = [&](const int32_t* p) { return int64_t(*reinterpret_cast<const volatile int32_t*>(p)); };
#if __CUDA_ARCH__ >= 900
  if constexpr (kShare > 1) {
    const int64_t guess = known(a.in + n);
    if (guess >= 0 && guess < a.slots) {
      const float* at = a.state + guess * H * V * K + (h * V + share * kRows) * K;
      for (int i = tid; i < kRows * K / 32; i += kThreads) prefetch_l2(at + i * 32);
    }
  }
#endif
  if constexpr (!kAhead) wait();
  const int64_t in = known(a.in + n), out = known(a.out + n);

  // ---- loads: the state, then what the gates need
  float4 S[kDepth][kPieces];
  if (in >= 0) {
    const float* at = a.state + in * H * V * K + piece;
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) S[d][p] = __ldcs(reinterpret_cast<const float4*>(at + d * kPass * K + p * 32));
  } else {
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) S[d][p] = float4{};
  }
  ConvChannel cq, ck, cv;
  float f = 0, b = 0, gate = 0, gb = 0, ow = 0;
  const int64_t vc = h * V + share * kRows + tid;
  if (takes_q) cq.load_past(a, in, channels, h * K + tid);
  if (takes_k) ck.load_past(a, in, channels, (H + h) * K + kc);
  if (takes_v) cv.load_past(a, in, channels, 2 * H * K + vc), gb = a.g_bias[vc], ow = a.o_norm[share * kRows + tid];
  if constexpr (kAhead) wait();
  if (takes_q) cq.load_new(a.q + (n * H + h) * K + tid);
  if (takes_k) ck.load_new(a.k + (n * H + h) * K + kc);
  if (takes_v) cv.load_new(a.v + n * H * V + vc);
  gates.find(sync);
  if (takes_k) f = gates.f(kc);
  if (takes_v) gate = gates.g(share * kRows + tid);
  if (tid == 0) b = __bfloat162float(__ldcg(a.b + n * H + h));

  // ---- convolutions, gates, lengths
  if (takes_q) {
    const float c = cq.silu(q_taps), s = warp_total(c * c);
    q[tid] = c;
    if (lane == 0) q_sums[tid / 32] = s;
  }
  if (takes_k) {
    const float c = ck.silu(k_taps), s = warp_total(c * c);
    k[kc] = c;
    decay[kc] = decay_of(a.gate, A, f + dt);
    if (lane == 0) k_sums[kc / 32] = s;
  }
  if (takes_v) v[tid] = cv.silu(v_taps);
  if (tid == 0) beta_shared = a.gate.beta_scale * sigmoid(b);
  sync();
  float q_total = 0, k_total = 0;
#pragma unroll
  for (int i = 0; i < K / 32; ++i) q_total += q_sums[i], k_total += k_sums[i];
  const float k_scale = rsqrtf(k_total + kL2NormEps), q_scale = rsqrtf(q_total + kL2NormEps) / sqrtf(float(K));
  const float beta = beta_shared;

  // ---- recurrence
  float dot[kDepth] = {};
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float4 d4 = *reinterpret_cast<const float4*>(decay + p * 32 + tid % 8 * 4);
    const float4 k4 = *reinterpret_cast<const float4*>(k + p * 32 + tid % 8 * 4);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float4& s = S[d][p];
      s.x *= d4.x, s.y *= d4.y, s.z *= d4.z, s.w *= d4.w;
      dot[d] = fmaf(s.x, k4.x, dot[d]), dot[d] = fmaf(s.y, k4.y, dot[d]);
      dot[d] = fmaf(s.z, k4.z, dot[d]), dot[d] = fmaf(s.w, k4.w, dot[d]);
    }
  }
  float u[kDepth], read[kDepth] = {};
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    for (int m = 4; m; m >>= 1) dot[d] += __shfl_xor_sync(0xffffffffu, dot[d], m);
    u[d] = beta * (v[row0 + d * kPass] - dot[d] * k_scale) * k_scale;
  }
  float* to = a.state + (out < 0 ? 0 : out) * H * V * K + piece;
  const auto keep = [&](int d, int p) {
    if (out >= 0) __stcs(reinterpret_cast<float4*>(to + d * kPass * K + p * 32), S[d][p]);
  };
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float4 k4 = *reinterpret_cast<const float4*>(k + p * 32 + tid % 8 * 4);
    const float4 q4 = *reinterpret_cast<const float4*>(q + p * 32 + tid % 8 * 4);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float4& s = S[d][p];
      s.x = fmaf(u[d], k4.x, s.x), s.y = fmaf(u[d], k4.y, s.y), s.z = fmaf(u[d], k4.z, s.z),
      s.w = fmaf(u[d], k4.w, s.w);
      read[d] = fmaf(s.x, q4.x, read[d]), read[d] = fmaf(s.y, q4.y, read[d]);
      read[d] = fmaf(s.z, q4.z, read[d]), read[d] = fmaf(s.w, q4.w, read[d]);
      if constexpr (!kAhead) keep(d, p);
    }
  }
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    for (int m = 4; m; m >>= 1) read[d] += __shfl_xor_sync(0xffffffffu, read[d], m);
    if (tid % 8 == 0) o[row0 + d * kPass] = read[d] * q_scale;
  }
  sync();

  // ---- gated norm
  if (takes_v) {
    const float mine = o[tid], sum = warp_total(mine * mine);
    if (lane == 0) o_sums[share * (kRows / 32) + tid / 32] = sum;
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kShare > 1) {
    static_assert(kRows == 32);
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all blocks of the cluster have begun
    auto cluster = cooperative_groups::this_cluster();
    sync();
    if (tid < kShare && tid != share) *cluster.map_shared_rank(&o_sums[share], tid) = o_sums[share];
    cluster.sync();
  }
#endif
  if constexpr (kShare == 1) sync();
  if (takes_v) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < V / 32; ++i) sum += o_sums[i];
    const float y = o[tid] * (1.0f / sqrtf(sum / float(V) + a.eps)) * ow * sigmoid(gate + gb);
    a.y[n * H * V + vc] = __float2bfloat16_rn(y);
  }
  done();
  if constexpr (kAhead) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int d = 0; d < kDepth; ++d) keep(d, p);
  }
  if (takes_v) cv.store(a, out, channels, 2 * H * K + vc);
  // Every block of the head has read these channels by now.
  if (share == 0) {
    if (takes_q) cq.store(a, out, channels, h * K + tid);
    if (takes_k) ck.store(a, out, channels, (H + h) * K + kc);
  }
}

template <int K, int V, int kShare, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads) kda_decode_kernel(const __grid_constant__ KdaDecodeArgs a) {
  const int64_t head = blockIdx.x / kShare;
  kda_decode_head<K, V, kShare, kThreads, false>(
      a, head / a.H, head % a.H, blockIdx.x % kShare, StoredGates{a, head / a.H, head % a.H}, [] { __syncthreads(); },
      [] {
        release_next();
        wait_for_previous();
      },
      [] {});
}

}  // namespace kda::cuda
