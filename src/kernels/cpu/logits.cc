#include "kernels/logits.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/ops.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/logits.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "kernels/cpu/tail-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// log sum exp(x): exponentials of differences <= 0 in f32, a short run of them added in f32, the runs in f64.
double log_sum_exp(const float* x, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  auto most = hn::Set(d, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + L <= n; i += L) most = hn::Max(most, hn::LoadU(d, x + i));
  float m = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; i < n; ++i) m = std::max(m, x[i]);
  const auto shift = hn::Set(d, m);
  // Highway's exp takes a NaN for minus infinity; the sum must show it.
  const auto term = [&](auto v) HWY_ATTR {
    const auto u = hn::Sub(v, shift);
    return hn::IfThenElse(hn::IsNaN(u), u, hn::Exp(d, u));
  };
  constexpr size_t kRun = 8;
  double sum = 0;
  for (i = 0; i + L <= n;) {
    auto s = hn::Zero(d);
    for (size_t k = 0; k < kRun && i + L <= n; ++k, i += L) s = hn::Add(s, term(hn::LoadU(d, x + i)));
    sum += double(hn::GetLane(hn::SumOfLanes(d, s)));
  }
  for (; i < n; ++i) sum += std::exp(double(x[i] - m));
  return double(m) + std::log(sum);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(log_sum_exp);

void token_loss(Context& ctx, const TokenLoss& a) {
  const float* logits = a.logits.as<float>();
  const int32_t* target = a.target.as<int32_t>();
  float* loss = a.loss.as<float>();
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1);
  for (int64_t r = 0; r < R; ++r)
    KDA_CHECK(target[r] >= -1 && target[r] < V, "token_loss: target ", r, " must be in [-1,", V, "), got ", target[r]);
  const auto lse = HWY_DYNAMIC_DISPATCH(log_sum_exp);
  ctx.pool->run(R, [=](int64_t r, int) {
    const float* row = logits + r * V;
    loss[r] = target[r] < 0 ? 0.0f : float(lse(row, size_t(V)) - double(row[target[r]]));
  });
}

}  // namespace kda::cpu
#endif
