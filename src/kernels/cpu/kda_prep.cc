#include "kernels/kda_prep.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_prep.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

void PrepTokens(const KdaPrep& a, int64_t from, int64_t to) {
  const F32 d;
  const int64_t H = a.q.dim(1), K = a.q.dim(2);
  const float *q = a.q.as<float>(), *k = a.k.as<float>();
  float* unit_q = (a.unit_q.data ? a.unit_q : a.q).as<float>();
  float* unit_k = (a.unit_k.data ? a.unit_k : a.k).as<float>();
  float* out = a.log_decay.as<float>();
  const float *f = a.f.as<float>(), *A_log = a.A_log.as<float>(), *bias = a.dt_bias.as<float>();
  BetaRow(d, a.gate.beta_scale, a.b.as<float>() + from * H, a.beta.as<float>() + from * H, (to - from) * H);
  for (int64_t h = 0; h < H; ++h) {
    const float exp_A = std::exp(A_log[h]);
    for (int64_t t = from; t < to; ++t) {
      const int64_t at = (t * H + h) * K;
      UnitRow(d, q + at, unit_q + at, K);
      UnitRow(d, k + at, unit_k + at, K);
      DecayRow(d, a.gate, exp_A, f + at, bias + h * K, out + at, K);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(PrepTokens);
}  // namespace

void kda_prep(Context& ctx, const KdaPrep& a) {
  constexpr int64_t kBlock = 4;
  const int64_t T = a.q.dim(0);
  const auto tokens = HWY_DYNAMIC_DISPATCH(PrepTokens);
  ctx.pool->run((T + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const FlushTiny flush;
    tokens(a, task * kBlock, std::min(T, (task + 1) * kBlock));
  });
}

}  // namespace kda::cpu
#endif
