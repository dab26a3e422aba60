#include <algorithm>
#include <limits>

#include "kernels/cpu/loss.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/loss_passes.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kBlock = 4096;

// Calls f(i, left, all) for every vector of a row; `all` is a constant: false for the last, partial one.
template <class F>
HWY_INLINE void each_vector(int64_t from, int64_t to, const F& f) {
  const int64_t N = int64_t(hn::Lanes(F32()));
  int64_t i = from;
  for (; i + N <= to; i += N) f(i, N, std::true_type());
  if (i < to) f(i, to - i, std::false_type());
}
template <class All>
HWY_INLINE VF load(F32 d, const float* p, int64_t left, All) {
  if constexpr (All::value)
    return hn::LoadU(d, p);
  else
    return LoadPart(d, p, left);
}
template <class All>
HWY_INLINE void store(VF v, F32 d, float* p, int64_t left, All) {
  if constexpr (All::value)
    hn::StoreU(v, d, p);
  else
    StorePart(v, d, p, left);
}
// v, with zeros in the lanes that lie outside the row
template <class All>
HWY_INLINE VF inside(F32 d, VF v, int64_t left, All) {
  if constexpr (All::value)
    return v;
  else
    return hn::IfThenElseZero(hn::FirstN(d, size_t(left)), v);
}

float Max(const float* x, int64_t n) {
  const F32 d;
  VF most = hn::Set(d, -std::numeric_limits<float>::infinity()), other = most;
  const int64_t N = int64_t(hn::Lanes(d));
  int64_t i = 0;
  for (; i + 2 * N <= n; i += 2 * N) {
    most = hn::Max(most, hn::LoadU(d, x + i));
    other = hn::Max(other, hn::LoadU(d, x + i + N));
  }
  float m = hn::GetLane(hn::MaxOfLanes(d, hn::Max(most, other)));
  for (; i < n; ++i) m = std::max(m, x[i]);
  return m;
}

double Exps(const float* x, float max, float inverse_T, int64_t n, float* e) {
  const F32 d;
  const VF top = hn::Set(d, max), scale = hn::Set(d, inverse_T);
  double sum = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    VF part = hn::Zero(d);
    each_vector(from, std::min(n, from + kBlock), [&](int64_t i, int64_t left, auto all) {
      const VF y = Exp(d, hn::Mul(hn::Sub(load(d, x + i, left, all), top), scale));
      store(y, d, e + i, left, all);
      part = hn::Add(part, inside(d, y, left, all));
    });
    sum += double(Sum(d, part));
  }
  return sum;
}

DenseSums Dense(const float* x, float max, const float* t, float t_max, float inverse_T, int64_t n, float* e,
                float* f) {
  const F32 d;
  const VF x_top = hn::Set(d, max), t_top = hn::Set(d, t_max), scale = hn::Set(d, inverse_T);
  DenseSums sums{};
  for (int64_t from = 0; from < n; from += kBlock) {
    VF sx = hn::Zero(d), st = sx, cross = sx;
    each_vector(from, std::min(n, from + kBlock), [&](int64_t i, int64_t left, auto all) {
      const VF v = hn::Mul(hn::Sub(load(d, x + i, left, all), x_top), scale);
      const VF u = hn::Mul(hn::Sub(load(d, t + i, left, all), t_top), scale);
      const VF ev = Exp(d, v), eu = Exp(d, u);
      store(ev, d, e + i, left, all);
      store(eu, d, f + i, left, all);
      sx = hn::Add(sx, inside(d, ev, left, all));
      st = hn::Add(st, inside(d, eu, left, all));
      // A teacher's probability of zero adds nothing, though its logarithm may be infinite.
      const VF both = hn::IfThenZeroElse(hn::Lt(u, hn::Set(d, -87.33f)), hn::Mul(eu, hn::Sub(u, v)));
      cross = hn::Add(cross, inside(d, both, left, all));
    });
    sums.student += double(Sum(d, sx));
    sums.teacher += double(Sum(d, st));
    sums.cross += double(Sum(d, cross));
  }
  return sums;
}

CurvedSums Curved(const float* x, float max, const float* t, float t_max, float inverse_T, const CurvedArgs& a,
                  int64_t n, const float* e, float* f) {
  const F32 d;
  const VF x_top = hn::Set(d, max), t_top = hn::Set(d, t_max), scale = hn::Set(d, inverse_T);
  const VF q_scale = hn::Set(d, a.student_scale), p_scale = hn::Set(d, a.teacher_scale), shift = hn::Set(d, a.shift);
  const VF jsd = hn::Set(d, 0.5f * a.jsd), tvd = hn::Set(d, 0.5f * a.tvd), linear = hn::Set(d, a.linear);
  const VF zero = hn::Zero(d), one = hn::Set(d, 1.0f), most = hn::Set(d, 87.0f), ln2 = hn::Set(d, 0.693147181f);
  CurvedSums sums{};
  for (int64_t from = 0; from < n; from += kBlock) {
    VF p_log = zero, q_log = zero, distance = zero, q_sign = zero;
    each_vector(from, std::min(n, from + kBlock), [&](int64_t i, int64_t left, auto all) {
      const VF p = inside(d, hn::Mul(load(d, f + i, left, all), p_scale), left, all);
      const VF q = inside(d, hn::Mul(load(d, e + i, left, all), q_scale), left, all);
      const VF v = hn::Mul(hn::Sub(load(d, x + i, left, all), x_top), scale);
      const VF u = hn::Mul(hn::Sub(load(d, t + i, left, all), t_top), scale);
      // D = ln q - ln p; ln(p/m) = ln 2 - ln(1 + e^D), ln(q/m) = D + ln(p/m)
      VF D = hn::Add(hn::Sub(v, u), shift);
      D = hn::IfThenElse(hn::Gt(D, most), most, hn::IfThenElse(hn::Lt(D, hn::Neg(most)), hn::Neg(most), D));
      const VF log_p = hn::Sub(ln2, Softplus(d, D)), log_q = hn::Add(D, log_p);
      const VF sign = hn::IfThenElse(hn::Gt(q, p), one, hn::IfThenElse(hn::Lt(q, p), hn::Neg(one), zero));
      p_log = hn::MulAdd(p, log_p, p_log);
      q_log = hn::MulAdd(q, log_q, q_log);
      distance = hn::Add(distance, hn::Abs(hn::Sub(p, q)));
      q_sign = hn::MulAdd(q, sign, q_sign);
      const VF slope = hn::MulAdd(jsd, log_q, hn::Mul(tvd, sign));
      store(hn::MulAdd(q, slope, hn::Mul(linear, p)), d, f + i, left, all);
    });
    sums.p_log += double(Sum(d, p_log));
    sums.q_log += double(Sum(d, q_log));
    sums.distance += double(Sum(d, distance));
    sums.q_sign += double(Sum(d, q_sign));
  }
  return sums;
}

void Blend(const float* e, float a, const float* f, float b, bool add, int64_t n, float* y) {
  const F32 d;
  const VF va = hn::Set(d, a), vb = hn::Set(d, b);
  const auto run = [&](auto with_f, auto with_y) {
    each_vector(0, n, [&](int64_t i, int64_t left, auto all) {
      VF v = hn::Mul(load(d, e + i, left, all), va);
      if constexpr (decltype(with_f)::value) v = hn::MulAdd(load(d, f + i, left, all), vb, v);
      if constexpr (decltype(with_y)::value) v = hn::Add(v, load(d, y + i, left, all));
      store(v, d, y + i, left, all);
    });
  };
  if (f)
    add ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
  else
    add ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
}

double Hinge(float l_i, float y_i, const float* l, const float* y, float margin, int64_t n, float* derivative,
             double* above) {
  const F32 d;
  const VF li = hn::Set(d, l_i), gap = hn::Set(d, margin - y_i), one = hn::Set(d, 1.0f);
  VF sum = hn::Zero(d), count = sum;
  each_vector(0, n, [&](int64_t j, int64_t left, auto all) {
    const VF over = hn::Add(gap, load(d, y + j, left, all));
    const auto counts = hn::And(hn::Lt(load(d, l + j, left, all), li), hn::Not(hn::Le(over, hn::Zero(d))));
    sum = hn::Add(sum, inside(d, hn::IfThenElseZero(counts, over), left, all));
    const VF hit = inside(d, hn::IfThenElseZero(counts, one), left, all);
    count = hn::Add(count, hit);
    store(hn::Add(load(d, derivative + j, left, all), hit), d, derivative + j, left, all);
  });
  *above = double(Sum(d, count));
  return double(Sum(d, sum));
}

double Logistic(float l_i, float y_i, const float* l, const float* y, int64_t n, float* derivative, double* total) {
  const F32 d;
  const VF li = hn::Set(d, l_i), yi = hn::Set(d, y_i);
  VF sum = hn::Zero(d), slopes = sum;
  each_vector(0, n, [&](int64_t j, int64_t left, auto all) {
    const VF z = hn::Sub(load(d, y + j, left, all), yi);
    const auto counts = hn::Lt(load(d, l + j, left, all), li);
    sum = hn::Add(sum, inside(d, hn::IfThenElseZero(counts, Softplus(d, z)), left, all));
    const VF slope = inside(d, hn::IfThenElseZero(counts, Sigmoid(d, z)), left, all);
    slopes = hn::Add(slopes, slope);
    store(hn::Add(load(d, derivative + j, left, all), slope), d, derivative + j, left, all);
  });
  *total = double(Sum(d, slopes));
  return double(Sum(d, sum));
}

HiddenSums Hidden(const float* a, const float* b, int64_t n) {
  const F32 d;
  VF squares = hn::Zero(d), dot = squares, aa = squares, bb = squares;
  each_vector(0, n, [&](int64_t i, int64_t left, auto all) {
    const VF x = load(d, a + i, left, all), y = load(d, b + i, left, all), gap = hn::Sub(x, y);
    squares = hn::MulAdd(gap, gap, squares);
    dot = hn::MulAdd(x, y, dot);
    aa = hn::MulAdd(x, x, aa);
    bb = hn::MulAdd(y, y, bb);
  });
  return {double(Sum(d, squares)), double(Sum(d, dot)), double(Sum(d, aa)), double(Sum(d, bb))};
}

const LossPasses* Passes() {
  static constexpr LossPasses table{Max, Exps, Dense, Curved, Blend, Hinge, Logistic, Hidden};
  return &table;
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
HWY_EXPORT(Passes);
const LossPasses& loss_passes() { return *HWY_DYNAMIC_DISPATCH(Passes)(); }
}  // namespace kda::cpu
#endif
