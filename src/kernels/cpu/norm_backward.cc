#include "kernels/norm_backward.h"

#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/row_sums.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm_backward.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include "kernels/cpu/tail-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// One row: dx += r (w dy - x r^2 mean(w dy x)), and with kDw: dw += dy x r.
template <bool kDw>
HWY_INLINE void norm_row(const float* x, const float* w, const float* dy, float* dx, float* dw, size_t D, float eps) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = s0, t0 = s0, t1 = s0;
  size_t i = 0;
  for (; i + 2 * L <= D; i += 2 * L) {
    const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + L);
    s0 = hn::MulAdd(a, a, s0);
    s1 = hn::MulAdd(b, b, s1);
    t0 = hn::MulAdd(hn::Mul(hn::LoadU(d, w + i), hn::LoadU(d, dy + i)), a, t0);
    t1 = hn::MulAdd(hn::Mul(hn::LoadU(d, w + i + L), hn::LoadU(d, dy + i + L)), b, t1);
  }
  for (; i + L <= D; i += L) {
    const auto a = hn::LoadU(d, x + i);
    s0 = hn::MulAdd(a, a, s0);
    t0 = hn::MulAdd(hn::Mul(hn::LoadU(d, w + i), hn::LoadU(d, dy + i)), a, t0);
  }
  if (i < D) {
    const auto a = load_tail(d, x + i, D - i);
    s1 = hn::MulAdd(a, a, s1);
    t1 = hn::MulAdd(hn::Mul(load_tail(d, w + i, D - i), load_tail(d, dy + i, D - i)), a, t1);
  }
  const float square = hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
  const float along = hn::GetLane(hn::SumOfLanes(d, hn::Add(t0, t1)));
  const float inverse = 1.0f / std::sqrt(square / float(D) + eps);
  const auto r = hn::Set(d, inverse), back = hn::Set(d, inverse * inverse * along / float(D));
  for (i = 0; i + L <= D; i += L) {
    const auto a = hn::LoadU(d, x + i), g = hn::LoadU(d, dy + i);
    const auto v = hn::NegMulAdd(a, back, hn::Mul(hn::LoadU(d, w + i), g));
    hn::StoreU(hn::MulAdd(r, v, hn::LoadU(d, dx + i)), d, dx + i);
    if (kDw) hn::StoreU(hn::MulAdd(hn::Mul(g, r), a, hn::LoadU(d, dw + i)), d, dw + i);
  }
  if (i < D) {
    const size_t n = D - i;
    const auto a = load_tail(d, x + i, n), g = load_tail(d, dy + i, n);
    const auto v = hn::NegMulAdd(a, back, hn::Mul(load_tail(d, w + i, n), g));
    store_tail(d, hn::MulAdd(r, v, load_tail(d, dx + i, n)), dx + i, n);
    if (kDw) store_tail(d, hn::MulAdd(hn::Mul(g, r), a, load_tail(d, dw + i, n)), dw + i, n);
  }
}

// dw null: not wanted.
void norm_rows(const float* x, const float* w, const float* dy, float* dx, float* dw, int64_t rows, int64_t D,
               float eps) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * D;
    if (dw)
      norm_row<true>(x + at, w, dy + at, dx + at, dw, size_t(D), eps);
    else
      norm_row<false>(x + at, w, dy + at, dx + at, nullptr, size_t(D), eps);
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {

HWY_EXPORT(norm_rows);

void rms_norm_backward(Context& ctx, const RmsNormBackward& a) {
  const float *x = a.x.as<float>(), *w = a.w.as<float>(), *dy = a.dy.as<float>();
  float* dx = a.dx.as<float>();
  const int64_t R = a.x.dim(0), D = a.x.dim(1);
  const float eps = a.eps;
  const auto f = HWY_DYNAMIC_DISPATCH(norm_rows);
  const auto rows = [=](int64_t from, int64_t to, float* sum) {
    f(x + from * D, w, dy + from * D, dx + from * D, sum, to - from, D, eps);
  };
  if (a.dw.data)
    add_row_sums(ctx, R, D, a.dw.as<float>(), "rms_norm_backward", rows);
  else
    in_pieces(*ctx.pool, R, D, [&](int64_t from, int64_t to) { rows(from, to, nullptr); });
}

}  // namespace cpu

size_t rms_norm_backward_workspace_bytes(const Context&, int64_t R, int64_t D) { return cpu::row_sums_bytes(R, D); }

}  // namespace kda
#endif
