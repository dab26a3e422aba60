// kernels/cuda/chain_head.cuh — a head's KDA step within a chain (docs/CUDA.md): one block, K = V = 128.
//
// The links around it wait for it, so all that is not given by a link before is there when the rest comes: weights of
// the gates, taps, windows and, where registers allow, the state. What comes is awaited once, by the threads that put
// it into shared memory, and between that and y lie three barriers. A thread has one channel: of f and k, or of g, q
// and v. States and windows are written when y is on its way.
#pragma once
#include "kernels/cuda/chain_values.cuh"
#include "kernels/cuda/eight_bits.cuh"
#include "kernels/cuda/kda_decode_kernel.cuh"

namespace kda::cuda {

#if __CUDA_ARCH__ >= 900

inline constexpr int kHeadWidth = kGateWidth, kHeadWarps = 8;  // the others only meet them at the barriers

struct HeadShared {
  __align__(16) __nv_bfloat16 in[5][kHeadWidth];  // q, k, v, f or what it is found from, g likewise
  __align__(16) float q[kHeadWidth], k[kHeadWidth], decay[kHeadWidth];
  __align__(16) float sums[kHeadWidth / 4];
  float v[kHeadWidth], o[kHeadWidth], b;
};

// 32 rows of a gate's weights to a warp, as two operands of the matrix unit: lane (g, t) has pieces t, t + 4 .. of 16
// bytes of rows g, g + 8, g + 16, g + 24.
template <Weight kW>
struct GateRows {
  static constexpr int kPieces = kW == Weight::bf16 ? 4 : 2;
  uint4 w[4][kPieces];

  __device__ void load(const uint8_t* rows) {
    constexpr int kRow = kHeadWidth << (kW == Weight::bf16);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        w[r][p] = __ldg(reinterpret_cast<const uint4*>(rows + (g + 8 * r) * kRow + (t + 4 * p) * 16));
  }
  // The product of this lane's row, g + 8 t, with x.
  __device__ float times(const __nv_bfloat16* x) const {
    const int t = threadIdx.x % 4;
    float sum[2][4] = {};
    const uint4* const in = reinterpret_cast<const uint4*>(x);
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kW == Weight::bf16) {
          const uint4 y = in[t + 4 * p];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint4 &a = w[2 * m][p], &b = w[2 * m + 1][p];
            if (half == 0)
              mma(sum[m], a.x, b.x, a.y, b.y, y.x, y.y);
            else
              mma(sum[m], a.z, b.z, a.w, b.w, y.z, y.w);
          }
        } else {
          const uint4 y = in[2 * (t + 4 * p) + half];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint4 &a = w[2 * m][p], &b = w[2 * m + 1][p];
            const uint32_t a0 = half ? a.z : a.x, a1 = half ? a.w : a.y, b0 = half ? b.z : b.x, b1 = half ? b.w : b.y;
            mma(sum[m], widen<kW>(a0, 0), widen<kW>(b0, 0), widen<kW>(a0, 1), widen<kW>(b0, 1), y.x, y.y);
            mma(sum[m], widen<kW>(a1, 0), widen<kW>(b1, 0), widen<kW>(a1, 1), widen<kW>(b1, 1), y.z, y.w);
          }
        }
      }
    // All columns are x: a lane takes the row of its own.
    const float low = t % 2 ? sum[0][2] : sum[0][0], high = t % 2 ? sum[1][2] : sum[1][0];
    return t < 2 ? low : high;
  }
};

// What a head reads of the links before, to shared memory, when it is there. 16 bytes to a thread.
__device__ inline void take_inputs(const ChainKda& kda, int64_t n, int64_t h, bool found, HeadShared& to) {
  const KdaDecodeArgs& k = kda.step;
  constexpr int kPieces = kHeadWidth * 2 / 16;
  const int which = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  const bool awaited = kda.awaited >> which & 1;
  if (which < 5) {
    const int64_t head = (n * k.H + h) * kHeadWidth;
    const __nv_bfloat16* const from = which == 0   ? k.q + head
                                      : which == 1 ? k.k + head
                                      : which == 2 ? k.v + head
                                      : found      ? (which == 3 ? kda.f_in : kda.g_in) + n * kHeadWidth
                                                   : (which == 3 ? k.f : k.g) + head;
    uint4 v = load16(from + piece * 8);
    while (awaited && has_mark<__nv_bfloat16>(v)) v = load16(from + piece * 8);
    *reinterpret_cast<uint4*>(&to.in[which][piece * 8]) = v;
  } else if (which == 5 && piece == 0) {
    uint16_t v;
    do asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(k.b + n * k.H + h) : "memory");
    while (awaited && v == uint16_t(kMark));
    to.b = __uint_as_float(uint32_t(v) << 16);
  }
}

// kFind: f and g are products with weights in kW; else they are given. A function of its own: what a head holds in
// registers leaves no room for anything else.
template <bool kFind, Weight kW>
__device__ __noinline__ void take_head(const ChainKda& kda, int64_t n, int64_t h, HeadShared& s) {
  constexpr int K = kHeadWidth, V = kHeadWidth, kPass = 32 * kHeadWarps / 8, kDepth = V / kPass, kParts = K / 32;
  constexpr bool kStateFirst = !kFind || kW != Weight::bf16;  // beside bf16 weights it does not fit into registers
  const KdaDecodeArgs& a = kda.step;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int channel = warp % 4 * 32 + lane % 4 * 8 + lane / 4;
  const bool first = warp < 4;  // a channel of f and k, else of g, q and v
  const int64_t H = a.H, channels = H * (2 * K + V), in = a.in[n], out = a.out[n];
  const int64_t at_q = h * K + channel, at_k = (H + h) * K + channel, at_v = 2 * H * K + h * V + channel;

  GateRows<kW> gate;
  if constexpr (kFind) gate.load((first ? kda.f_w : kda.g_w) + ((h * K + warp % 4 * 32) * K << (kW == Weight::bf16)));
  const float gate_scale = kFind && kda.f_scale ? __ldg((first ? kda.f_scale : kda.g_scale) + h * K + channel) : 1.0f;
  float4 S[kDepth][kParts];
  const int row0 = tid / 8;
  const int64_t piece = (h * V + row0) * K + tid % 8 * 4;
  const auto load_state = [&] {
    const float* from = a.state + in * H * V * K + piece;
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int p = 0; p < kParts; ++p)
        S[d][p] = in < 0 ? float4{} : __ldcs(reinterpret_cast<const float4*>(from + d * kPass * K + p * 32));
  };
  if constexpr (kStateFirst) load_state();
  ConvChannel x, y;  // of k, or of q and v
  const float4 x_taps = reinterpret_cast<const float4*>(first ? a.k_conv : a.q_conv)[h * K + channel];
  float4 y_taps{};
  x.load_past(a, in, channels, first ? at_k : at_q);
  float bias, norm = 0;
  if (first) {
    bias = a.dt_bias[h * K + channel];
  } else {
    y_taps = reinterpret_cast<const float4*>(a.v_conv)[h * V + channel];
    y.load_past(a, in, channels, at_v);
    bias = a.g_bias[h * V + channel], norm = a.o_norm[channel];
  }
  const float A_log = a.A_log[h];

  take_inputs(kda, n, h, kFind, s);
  chain_sync();
  float value;
  if constexpr (kFind) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(gate.times(s.in[first ? 3 : 4]) * gate_scale);
    if (__nv_bfloat16* const to = first ? kda.f_out : kda.g_out) to[(n * H + h) * K + channel] = rounded;
    value = __bfloat162float(rounded);
  } else {
    value = __bfloat162float(s.in[first ? 3 : 4][channel]);
  }
  if constexpr (!kStateFirst) load_state();
  x.past[3] = s.in[first ? 1 : 0][channel];
  const float c = x.silu(x_taps);
  if (first) {
    s.k[channel] = c;
    s.decay[channel] = decay_of(a.gate, expf(A_log), value + bias);
  } else {
    s.q[channel] = c;
    y.past[3] = s.in[2][channel];
    s.v[channel] = y.silu(y_taps);
    value = norm * sigmoid(value + bias);  // times o of unit length is y
  }
  const float beta = a.gate.beta_scale * sigmoid(s.b);
  chain_sync();
  float o[kDepth];
  step_rows(
      S, s.decay, s.k, s.q, tid % 8 * 4, beta, [&](int d) { return s.v[row0 + d * kPass]; }, [](int, int) {}, o);
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    const float sum = four_rows_total(o[d] * o[d]);
    if (tid % 8 == 0) s.o[row0 + d * kPass] = o[d];
    if (lane == 0) s.sums[(row0 + d * kPass) / 4] = sum;
  }
  chain_sync();
  if (!first) {
    const float y_now = s.o[channel] * norm_factor<V>(s.sums, a.eps) * value;
    const int64_t to = (n * H + h) * V + channel;
    if (kda.passed) store_value(kda.passed + to, y_now);
    if (a.y) a.y[to] = __float2bfloat16_rn(y_now);
  }
  if (out < 0) return;
  float* const to = a.state + out * H * V * K + piece;
#pragma unroll
  for (int p = 0; p < kParts; ++p)
#pragma unroll
    for (int d = 0; d < kDepth; ++d) __stcs(reinterpret_cast<float4*>(to + d * kPass * K + p * 32), S[d][p]);
  x.store(a, out, channels, first ? at_k : at_q);
  if (!first) y.store(a, out, channels, at_v);
}

template <Weight kEight>
__device__ inline void take_heads(const ChainKda& kda, HeadShared& shared) {
  const int H = kda.step.H, heads = kda.step.N * H;
  for (int head = blockIdx.x; head < heads; head += gridDim.x) {
    const int n = head >= H, h = head - n * H;
    static_assert(kChainRows == 2);
    if (threadIdx.x >= 32 * kHeadWarps)
      chain_sync(), chain_sync(), chain_sync();
    else if (!kda.f_w)
      take_head<false, Weight::bf16>(kda, n, h, shared);
    else if (kEight == Weight::bf16 || kda.weight == Weight::bf16)
      take_head<true, Weight::bf16>(kda, n, h, shared);
    else
      take_head<true, kEight>(kda, n, h, shared);
  }
}

#endif

}  // namespace kda::cuda
