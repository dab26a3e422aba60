#include "kernels/norm.h"

#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include "kernels/cpu/tail-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// One row. The sum runs in four vectors, whatever the row's place.
void rms_norm_row(const float* x, const float* w, float* y, size_t D, float eps) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  size_t i = 0;
  for (; i + 4 * L <= D; i += 4 * L) {
    const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + L);
    const auto e = hn::LoadU(d, x + i + 2 * L), f = hn::LoadU(d, x + i + 3 * L);
    s0 = hn::MulAdd(a, a, s0);
    s1 = hn::MulAdd(b, b, s1);
    s2 = hn::MulAdd(e, e, s2);
    s3 = hn::MulAdd(f, f, s3);
  }
  for (; i + L <= D; i += L) {
    const auto a = hn::LoadU(d, x + i);
    s0 = hn::MulAdd(a, a, s0);
  }
  if (i < D) {
    const auto a = load_tail(d, x + i, D - i);
    s1 = hn::MulAdd(a, a, s1);
  }
  const auto sum = hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
  const auto r = hn::Set(d, 1.0f / std::sqrt(hn::GetLane(sum) / float(D) + eps));
  for (i = 0; i + L <= D; i += L) hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), r), hn::LoadU(d, w + i)), d, y + i);
  if (i < D) store_tail(d, hn::Mul(hn::Mul(load_tail(d, x + i, D - i), r), load_tail(d, w + i, D - i)), y + i, D - i);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(rms_norm_row);

void rms_norm(Context& ctx, const RmsNorm& a) {
  const float *x = a.x.as<float>(), *w = a.w.as<float>();
  float* y = a.y.as<float>();
  const int64_t D = a.x.dim(1);
  const float eps = a.eps;
  const auto row = HWY_DYNAMIC_DISPATCH(rms_norm_row);
  in_pieces(*ctx.pool, a.x.dim(0), D, [=](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) row(x + r * D, w, y + r * D, size_t(D), eps);
  });
}

}  // namespace kda::cpu
#endif
