// kernels/cpu/kda_math-inl.h — the elementwise maths of a KDA layer on vectors, shared by conv, prep, forward, output
// and decode, so that a token comes out with the same bits whichever of them it takes.
//
// Exp and Softplus are within 2 units in the last place; a NaN comes out as a NaN. Rows of any length: the last,
// partial vector goes through the same instructions under a mask.
#if defined(KDA_CPU_KDA_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_CPU_KDA_MATH_INL_H_
#undef KDA_CPU_KDA_MATH_INL_H_
#else
#define KDA_CPU_KDA_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/kda_prep.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 16>;
using VF = hn::Vec<F32>;

// Up to a vector's worth of a row; lanes past `n` read as zero and neither read nor written in memory.
HWY_INLINE VF LoadPart(F32 d, const float* p, int64_t n) {
  const size_t N = hn::Lanes(d);
  if (n >= int64_t(N)) return hn::LoadU(d, p);
#if HWY_TARGET <= HWY_AVX2
  return hn::MaskedLoad(hn::FirstN(d, size_t(n)), d, p);
#else
  HWY_ALIGN float lanes[hn::MaxLanes(F32())] = {};
  std::copy_n(p, n, lanes);
  return hn::Load(d, lanes);
#endif
}
HWY_INLINE void StorePart(VF v, F32 d, float* p, int64_t n) {
  const size_t N = hn::Lanes(d);
  if (n >= int64_t(N)) return hn::StoreU(v, d, p);
#if HWY_TARGET <= HWY_AVX2
  hn::BlendedStore(v, hn::FirstN(d, size_t(n)), d, p);
#else
  HWY_ALIGN float lanes[hn::MaxLanes(F32())];
  hn::Store(v, d, lanes);
  std::copy_n(lanes, n, p);
#endif
}

// e^x for x <= 88.3 (held there above); exactly 0 below -87.3. x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r.
HWY_INLINE VF Exp(F32 d, VF x) {
  const hn::RebindToSigned<F32> di;
  const VF lo = hn::Set(d, -87.33f), magic = hn::Set(d, 12582912.0f);  // 1.5 * 2^23: its last bits hold n
  const VF held = hn::IfThenElse(hn::Gt(x, hn::Set(d, 88.3f)), hn::Set(d, 88.3f), x);
  const VF shifted = hn::MulAdd(held, hn::Set(d, 1.44269504f), magic);
  const VF n = hn::Sub(shifted, magic);
  VF r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), held);  // ln 2 in two parts; the first product is exact
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  VF p = hn::Set(d, 0.00138131448f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00836941879f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.041668456f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.166665152f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.49999994f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const VF scale = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::BitCast(di, shifted), hn::Set(di, 127))));
  return hn::IfThenZeroElse(hn::Lt(x, lo), hn::Mul(p, scale));
}

HWY_INLINE VF Sigmoid(F32 d, VF x) {
  const VF one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, Exp(d, hn::Neg(x))));
}

HWY_INLINE VF Silu(F32 d, VF x) { return hn::Div(x, hn::Add(hn::Set(d, 1.0f), Exp(d, hn::Neg(x)))); }

// ln(1 + e^x) = max(x,0) + 2 atanh(e / (2 + e)), e = e^-|x|: no cancellation, so it is right relative to its own size
// however negative x is.
HWY_INLINE VF Softplus(F32 d, VF x) {
  const VF e = Exp(d, hn::Neg(hn::Abs(x)));
  const VF t = hn::Div(e, hn::Add(e, hn::Set(d, 2.0f))), t2 = hn::Mul(t, t);
  VF p = hn::Set(d, 0.122124545f);
  p = hn::MulAdd(p, t2, hn::Set(d, 0.106949806f));
  p = hn::MulAdd(p, t2, hn::Set(d, 0.143105209f));
  p = hn::MulAdd(p, t2, hn::Set(d, 0.199993387f));
  p = hn::MulAdd(p, t2, hn::Set(d, 0.333333403f));
  const VF atanh = hn::MulAdd(hn::Mul(p, t2), t, t);
  const VF positive = hn::Mul(hn::Add(x, hn::Abs(x)), hn::Set(d, 0.5f));
  return hn::MulAdd(atanh, hn::Set(d, 2.0f), positive);
}

HWY_INLINE float Sum(F32 d, VF v) { return hn::GetLane(hn::SumOfLanes(d, v)); }

// sums[r] = rows[r,0] + rows[r,1] + .. for 16 rows of a vector each
HWY_INLINE void SumRows(const float* rows, float* sums) {
  const F32 d;
#if HWY_TARGET <= HWY_AVX3
  const hn::Repartition<uint64_t, F32> pairs;
  VF quarter[4];
  HWY_UNROLL(4)
  for (int l = 0; l < 4; ++l) {
    const auto halves = [&](int r) {  // [row r | row r+8], eight lanes of each folded onto the other eight
      const VF a = hn::Load(d, rows + r * 16), b = hn::Load(d, rows + (r + 8) * 16);
      return hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a));
    };
    const VF x = halves(l), y = halves(l + 4);  // then blocks of four: rows l, l+4, l+8, l+12
    quarter[l] = hn::Add(hn::OddEvenBlocks(y, x), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(x, y)));
  }
  const auto fold = [&](VF a, VF b) { return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)); };
  const auto a = hn::BitCast(pairs, fold(quarter[0], quarter[1])), b = hn::BitCast(pairs, fold(quarter[2], quarter[3]));
  hn::Store(hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, a, b)), hn::BitCast(d, hn::InterleaveUpper(pairs, a, b))),
            d, sums);
#else
  for (int64_t r = 0; r < 16; ++r) sums[r] = Sum(d, hn::Load(d, rows + r * int64_t(hn::Lanes(d))));
#endif
}

// sum_i x[i]^2
HWY_INLINE float SumOfSquares(F32 d, const float* x, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  VF sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += N) {
    const VF v = LoadPart(d, x + i, n - i);
    sum = hn::MulAdd(v, v, sum);
  }
  return Sum(d, sum);
}

// y = x / sqrt(sum x^2 + eps)
HWY_INLINE void UnitRow(F32 d, const float* x, float* y, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  const VF r = hn::Set(d, 1.0f / std::sqrt(SumOfSquares(d, x, n) + kL2NormEps));
  for (int64_t i = 0; i < n; i += N) StorePart(hn::Mul(LoadPart(d, x + i, n - i), r), d, y + i, n - i);
}

// log_decay of one head's channels; exp_A = exp(A_log[h]).
HWY_INLINE void DecayRow(F32 d, const KdaGateParams& gate, float exp_A, const float* f, const float* bias, float* y,
                         int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  const VF a = hn::Set(d, exp_A);
  if (gate.kind == KdaGate::softplus) {
    for (int64_t i = 0; i < n; i += N) {
      const VF z = hn::Add(LoadPart(d, f + i, n - i), LoadPart(d, bias + i, n - i));
      StorePart(hn::Neg(hn::Mul(a, Softplus(d, z))), d, y + i, n - i);
    }
  } else {
    const VF bound = hn::Set(d, gate.lower_bound);
    for (int64_t i = 0; i < n; i += N) {
      const VF z = hn::Add(LoadPart(d, f + i, n - i), LoadPart(d, bias + i, n - i));
      StorePart(hn::Mul(bound, Sigmoid(d, hn::Mul(a, z))), d, y + i, n - i);
    }
  }
}

// beta = scale * sigmoid(b)
HWY_INLINE void BetaRow(F32 d, float scale, const float* b, float* y, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += N)
    StorePart(hn::Mul(hn::Set(d, scale), Sigmoid(d, LoadPart(d, b + i, n - i))), d, y + i, n - i);
}

// y = o / sqrt(mean o^2 + eps) * w * sigmoid(g + bias). y may be o or g.
HWY_INLINE void GatedNormRow(F32 d, const float* o, const float* g, const float* bias, const float* w, float eps,
                             float* y, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  const VF r = hn::Set(d, 1.0f / std::sqrt(SumOfSquares(d, o, n) / float(n) + eps));
  for (int64_t i = 0; i < n; i += N) {
    const int64_t left = n - i;
    const VF gate = Sigmoid(d, hn::Add(LoadPart(d, g + i, left), LoadPart(d, bias + i, left)));
    const VF normed = hn::Mul(hn::Mul(LoadPart(d, o + i, left), r), LoadPart(d, w + i, left));
    StorePart(hn::Mul(normed, gate), d, y + i, left);
  }
}

// Channels handled together by the convolution; its weights for them are first laid out [4,kConvGroup].
inline constexpr int64_t kConvGroup = 128;

inline void ConvTaps(const float* w, int64_t n, float* taps) {
  for (int64_t c = 0; c < n; ++c)
    for (int j = 0; j < 4; ++j) taps[j * kConvGroup + c] = w[4 * c + j];
}

// y = silu(sum_j taps[j] x_j), x_0 the oldest input; n <= kConvGroup channels.
HWY_INLINE void ConvRow(F32 d, const float* x0, const float* x1, const float* x2, const float* x3, const float* taps,
                        float* y, int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t i = 0; i < n; i += N) {
    const int64_t left = n - i;
    const float* w = taps + i;
    VF sum = hn::Mul(LoadPart(d, x0 + i, left), hn::LoadU(d, w));
    sum = hn::MulAdd(LoadPart(d, x1 + i, left), hn::LoadU(d, w + kConvGroup), sum);
    sum = hn::MulAdd(LoadPart(d, x2 + i, left), hn::LoadU(d, w + 2 * kConvGroup), sum);
    sum = hn::MulAdd(LoadPart(d, x3 + i, left), hn::LoadU(d, w + 3 * kConvGroup), sum);
    StorePart(Silu(d, sum), d, y + i, left);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
