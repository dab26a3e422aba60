#include "kernels/kda_decode.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/kda_scratch.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_decode.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// y = silu(conv) of n channels of one sequence; the window moves on by x. in may be null (zeros), out null or in.
void ConvStep(const float* x, const float* w, const float* in, float* out, int64_t channels, float* y, int64_t n) {
  const F32 d;
  float taps[4 * kConvGroup] = {};
  static constexpr float kZeros[kConvGroup] = {};
  for (int64_t c = 0; c < n; c += kConvGroup) {
    const int64_t m = std::min(kConvGroup, n - c);
    ConvTaps(w + 4 * c, m, taps);
    const float* x0 = in ? in + c : kZeros;
    const float* x1 = in ? in + channels + c : kZeros;
    const float* x2 = in ? in + 2 * channels + c : kZeros;
    ConvRow(d, x0, x1, x2, x + c, taps, y + c, m);
    if (!out) continue;
    std::copy_n(x1, m, out + c);
    std::copy_n(x2, m, out + channels + c);
    std::copy_n(x + c, m, out + 2 * channels + c);
  }
}

// Row by row of the state [V,K]: u = beta (v - S' k), S = S' + u k^T, o = s (S' q + u (k.q)), S' = S diag(decay).
// S' k = S (decay k), so one reading gives both products and the second finds the rows in the first-level cache.
// kWhole: K is a multiple of the vector, no row has a partial one.
template <bool kWhole>
void StateStep(const float* in, float* out, const float* decay, const float* k, const float* dk, const float* dq,
               float kq, const float* v, float beta, float scale, float* o, int64_t K, int64_t V) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  constexpr int64_t kRows = 8;
  HWY_ALIGN float parts[16 * hn::MaxLanes(F32())] = {};  // of S' k for 8 rows, then of S' q
  HWY_ALIGN float sums[16] = {};
  const auto load = [&](const float* p, int64_t j)
                        HWY_ATTR { return kWhole ? hn::LoadU(d, p + j) : LoadPart(d, p + j, K - j); };
  for (int64_t r0 = 0; r0 < V; r0 += kRows) {
    const int64_t rows = std::min(kRows, V - r0);
    if (in) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = in + (r0 + r) * K;
        VF a = hn::Zero(d), b = hn::Zero(d);
        for (int64_t j = 0; j < K; j += N) {
          const VF s = load(row, j);
          a = hn::MulAdd(s, hn::Load(d, dk + j), a);
          b = hn::MulAdd(s, hn::Load(d, dq + j), b);
        }
        hn::Store(a, d, parts + r * N);
        hn::Store(b, d, parts + (kRows + r) * N);
      }
      SumRows(parts, sums);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float u = beta * (v[r0 + r] - sums[r]);
      o[r0 + r] = scale * (sums[kRows + r] + u * kq);
      if (!out) continue;
      const VF written = hn::Set(d, u);
      const int64_t at = (r0 + r) * K;
      for (int64_t j = 0; j < K; j += N) {
        const VF s = in ? hn::Mul(load(in + at, j), hn::Load(d, decay + j)) : hn::Zero(d);
        const VF sum = hn::MulAdd(written, hn::Load(d, k + j), s);
        if (kWhole)
          hn::StoreU(sum, d, out + at + j);
        else
          StorePart(sum, d, out + at + j, K - j);
      }
    }
  }
}

void DecodeHead(const KdaDecode& a, int64_t n, int64_t h, float* scratch) {
  const F32 d;
  const int64_t H = a.A_log.dim(0), V = a.o_norm.dim(0), K = a.dt_bias.dim(0) / H, Kp = round_up(K, 16);
  const int64_t N = int64_t(hn::Lanes(d)), channels = a.window.dim(2);
  float *q = scratch, *k = q + Kp, *decay = k + Kp, *dk = decay + Kp, *dq = dk + Kp, *v = dq + Kp;
  float* o = v + round_up(V, 16);
  std::fill_n(q, 3 * Kp, 0.0f);

  const int64_t in = a.slots.in[n], out = a.slots.out[n];
  const auto conv = [&](const ConstView& x, const ConstView& w, int64_t first, int64_t size, float* y) {
    float* window = a.window.as<float>() + first + h * size;
    ConvStep(x.as<float>() + (n * H + h) * size, w.as<float>() + 4 * h * size,
             in < 0 ? nullptr : window + in * 3 * channels, out < 0 ? nullptr : window + out * 3 * channels, channels,
             y, size);
  };
  conv(a.q, a.q_conv, 0, K, q);
  conv(a.k, a.k_conv, H * K, K, k);
  conv(a.v, a.v_conv, 2 * H * K, V, v);
  UnitRow(d, q, q, K);
  UnitRow(d, k, k, K);
  DecayRow(d, a.gate, std::exp(a.A_log.as<float>()[h]), a.f.as<float>() + (n * H + h) * K,
           a.dt_bias.as<float>() + h * K, decay, K);
  float beta;
  BetaRow(d, a.gate.beta_scale, a.b.as<float>() + n * H + h, &beta, 1);

  VF kq = hn::Zero(d);
  for (int64_t j = 0; j < K; j += N) {
    const VF e = Exp(d, hn::Load(d, decay + j)), kj = hn::Load(d, k + j), qj = hn::Load(d, q + j);
    hn::Store(e, d, decay + j);
    hn::Store(hn::Mul(e, kj), d, dk + j);
    hn::Store(hn::Mul(e, qj), d, dq + j);
    kq = hn::MulAdd(kj, qj, kq);
  }
  float* pool = a.state.as<float>();
  const auto step = K % N == 0 ? StateStep<true> : StateStep<false>;
  step(in < 0 ? nullptr : pool + (in * H + h) * V * K, out < 0 ? nullptr : pool + (out * H + h) * V * K, decay, k, dk,
       dq, Sum(d, kq), v, beta, 1.0f / std::sqrt(float(K)), o, K, V);
  GatedNormRow(d, o, a.g.as<float>() + (n * H + h) * V, a.g_bias.as<float>() + h * V, a.o_norm.as<float>(), a.eps,
               a.y.as<float>() + (n * H + h) * V, V);
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(DecodeHead);
}  // namespace

// A task is one head of one sequence: its own channels of the window, its own state.
void kda_decode(Context& ctx, const KdaDecode& a) {
  const int64_t N = a.q.dim(0), H = a.A_log.dim(0), V = a.o_norm.dim(0), K = a.dt_bias.dim(0) / H;
  const int64_t size = kda_decode_scratch(K, V);
  float* scratch =
      static_cast<float*>(workspace(ctx, kda_decode_workspace_bytes(ctx, a.q.dim(0), H, K, V), "kda_decode"));
  const auto head = HWY_DYNAMIC_DISPATCH(DecodeHead);
  ctx.pool->run(N * H, [&](int64_t task, int worker) {
    const FlushTiny flush;
    head(a, task / H, task % H, scratch + worker * size);
  });
}

}  // namespace kda::cpu

namespace kda {

size_t cpu::kda_decode_workspace(const Context& ctx, int64_t, int64_t, int64_t K, int64_t V) {
  return size_t(ctx.pool->threads()) * size_t(cpu::kda_decode_scratch(K, V)) * sizeof(float);
}

}  // namespace kda
#endif
