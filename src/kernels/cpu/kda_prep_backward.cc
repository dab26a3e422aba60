#include <algorithm>
#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/partial_sums.h"
#include "kernels/kda_backward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_prep_backward.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// dx = r (dy - y (y . dy)), y = r x, in place of dy
HWY_INLINE void UnitRowBackward(F32 d, const float* x, float* dy, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  VF squares = hn::Zero(d), dot = hn::Zero(d);
  for (int64_t i = 0; i < n; i += N) {
    const VF v = LoadPart(d, x + i, n - i);
    squares = hn::MulAdd(v, v, squares);
    dot = hn::MulAdd(v, LoadPart(d, dy + i, n - i), dot);
  }
  const float r = 1.0f / std::sqrt(Sum(d, squares) + kL2NormEps);
  const VF rv = hn::Set(d, r), along = hn::Set(d, r * Sum(d, dot));
  for (int64_t i = 0; i < n; i += N) {
    const VF y = hn::Mul(LoadPart(d, x + i, n - i), rv);
    StorePart(hn::Mul(rv, hn::NegMulAdd(y, along, LoadPart(d, dy + i, n - i))), d, dy + i, n - i);
  }
}

// df in place of dg, added to bias_sum as well; returns what the row adds to dA.
HWY_INLINE VF DecayRowBackward(F32 d, const KdaGateParams& gate, float exp_A, const float* f, const float* bias,
                               float* df, float* bias_sum, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  const VF a = hn::Set(d, exp_A), bound = hn::Set(d, gate.lower_bound);
  VF dA = hn::Zero(d);
  for (int64_t i = 0; i < n; i += N) {
    const int64_t left = n - i;
    const VF z = hn::Add(LoadPart(d, f + i, left), LoadPart(d, bias + i, left)), dg = LoadPart(d, df + i, left);
    VF out;
    if (gate.kind == KdaGate::softplus) {
      const VF scaled = hn::Neg(hn::Mul(a, dg));
      out = hn::Mul(scaled, Sigmoid(d, z));
      dA = hn::MulAdd(scaled, Softplus(d, z), dA);
    } else {
      const VF az = hn::Mul(a, z);  // s (1 - s) is even
      const VF e = Exp(d, hn::Neg(hn::Abs(az))), one = hn::Add(e, hn::Set(d, 1.0f));
      out = hn::Mul(hn::Mul(hn::Mul(bound, a), hn::Div(e, hn::Mul(one, one))), dg);
      dA = hn::MulAdd(out, z, dA);
    }
    StorePart(out, d, df + i, left);
    StorePart(hn::Add(LoadPart(d, bias_sum + i, left), out), d, bias_sum + i, left);
  }
  return dA;
}

// Tokens [from,to), sums over them in `sums`: H of dA_log, H*K of d_dt_bias.
void PrepBackwardTokens(const KdaPrepBackward& a, int64_t from, int64_t to, float* sums) {
  const F32 d;
  const int64_t H = a.q.dim(1), K = a.q.dim(2), N = int64_t(hn::Lanes(d));
  const float *q = a.q.as<float>(), *k = a.k.as<float>(), *f = a.f.as<float>(), *bias = a.dt_bias.as<float>();
  float *dq = a.dq.as<float>(), *dk = a.dk.as<float>(), *df = a.df.as<float>();
  const float* b = a.b.as<float>() + from * H;
  float* db = a.db.as<float>() + from * H;
  for (int64_t i = 0, n = (to - from) * H; i < n; i += N) {  // scale sigmoid(b) sigmoid(-b), even too
    const VF e = Exp(d, hn::Neg(hn::Abs(LoadPart(d, b + i, n - i)))), one = hn::Add(e, hn::Set(d, 1.0f));
    const VF slope = hn::Mul(hn::Set(d, a.gate.beta_scale), hn::Div(e, hn::Mul(one, one)));
    StorePart(hn::Mul(slope, LoadPart(d, db + i, n - i)), d, db + i, n - i);
  }
  std::fill_n(sums, H + H * K, 0.0f);
  for (int64_t h = 0; h < H; ++h) {
    const float exp_A = std::exp(a.A_log.as<float>()[h]);
    VF dA = hn::Zero(d);
    for (int64_t t = from; t < to; ++t) {
      const int64_t at = (t * H + h) * K;
      UnitRowBackward(d, q + at, dq + at, K);
      UnitRowBackward(d, k + at, dk + at, K);
      dA = hn::Add(dA, DecayRowBackward(d, a.gate, exp_A, f + at, bias + h * K, df + at, sums + H + h * K, K));
    }
    sums[h] = Sum(d, dA);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(PrepBackwardTokens);
}  // namespace

void kda_prep_backward(Context& ctx, const KdaPrepBackward& a) {
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2), blocks = sum_blocks(T), n = H + H * K;
  float* sums =
      static_cast<float*>(workspace(ctx, kda_prep_backward_workspace_bytes(ctx, T, H, K), "kda_prep_backward"));
  const auto tokens = HWY_DYNAMIC_DISPATCH(PrepBackwardTokens);
  each_sum_block(*ctx.pool, T, n, sums, [&](int64_t from, int64_t to, float* own) { tokens(a, from, to, own); });
  add_partials(sums, blocks, n, H, a.dA_log);
  add_partials(sums + H, blocks, n, H * K, a.d_dt_bias);
}

}  // namespace kda::cpu

namespace kda {

size_t kda_prep_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t K) {
  return size_t(cpu::sum_blocks(T) * (H + H * K)) * sizeof(float);
}

}  // namespace kda
#endif
