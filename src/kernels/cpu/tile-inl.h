// kernels/cpu/tile-inl.h — products of tiles and exponentials, once for each instruction set.
#if defined(KDA_KERNELS_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_KERNELS_CPU_TILE_INL_H_
#undef KDA_KERNELS_CPU_TILE_INL_H_
#else
#define KDA_KERNELS_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include "kernels/cpu/tile.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, 16>;

// c[m][n] (+)= sum_k A[m][k] b[k * ldb + n] for m < 4, N vectors of n. A[m][k] = a[m * lda + k], or a[k * lda + m]
// where it is turned.
template <int N, bool kTurned>
HWY_INLINE void product_block(int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                              int64_t ldc, bool add) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f));
  const float *r1 = a + lda, *r2 = r1 + lda, *r3 = r2 + lda;
  hn::Vec<F> s0[N], s1[N], s2[N], s3[N];
  for (int i = 0; i < N; ++i) {
    s0[i] = add ? hn::Load(f, c + i * L) : hn::Zero(f);
    s1[i] = add ? hn::Load(f, c + ldc + i * L) : hn::Zero(f);
    s2[i] = add ? hn::Load(f, c + 2 * ldc + i * L) : hn::Zero(f);
    s3[i] = add ? hn::Load(f, c + 3 * ldc + i * L) : hn::Zero(f);
  }
  for (int64_t k = 0; k < K; ++k, b += ldb) {
    hn::Vec<F> x[N];
    for (int i = 0; i < N; ++i) x[i] = hn::LoadU(f, b + i * L);
    const auto a0 = hn::Set(f, kTurned ? a[0] : a[k]), a1 = hn::Set(f, kTurned ? a[1] : r1[k]);
    for (int i = 0; i < N; ++i) s0[i] = hn::MulAdd(a0, x[i], s0[i]);
    const auto a2 = hn::Set(f, kTurned ? a[2] : r2[k]), a3 = hn::Set(f, kTurned ? a[3] : r3[k]);
    for (int i = 0; i < N; ++i) s1[i] = hn::MulAdd(a1, x[i], s1[i]);
    for (int i = 0; i < N; ++i) s2[i] = hn::MulAdd(a2, x[i], s2[i]);
    for (int i = 0; i < N; ++i) s3[i] = hn::MulAdd(a3, x[i], s3[i]);
    if (kTurned) a += lda;
  }
  for (int i = 0; i < N; ++i) {
    hn::Store(s0[i], f, c + i * L);
    hn::Store(s1[i], f, c + ldc + i * L);
    hn::Store(s2[i], f, c + 2 * ldc + i * L);
    hn::Store(s3[i], f, c + 3 * ldc + i * L);
  }
}

// M a multiple of 4, columns one of 16. Blocks of columns as wide as the registers hold.
template <bool kTurned>
void product(int64_t M, int64_t columns, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  const int64_t L = int64_t(hn::Lanes(F())), step = kTurned ? 1 : lda;
  int64_t n = 0;
#if HWY_TARGET <= HWY_AVX3
  for (; n + 4 * L <= columns; n += 4 * L)
    for (int64_t m = 0; m < M; m += 4)
      product_block<4, kTurned>(K, a + m * step, lda, b + n, ldb, c + m * ldc + n, ldc, add);
#endif
  for (; n + 2 * L <= columns; n += 2 * L)
    for (int64_t m = 0; m < M; m += 4)
      product_block<2, kTurned>(K, a + m * step, lda, b + n, ldb, c + m * ldc + n, ldc, add);
  for (; n + L <= columns; n += L)
    for (int64_t m = 0; m < M; m += 4)
      product_block<1, kTurned>(K, a + m * step, lda, b + n, ldb, c + m * ldc + n, ldc, add);
}

// to[i][j] = x[j][i] * by, for kTile rows.
void transpose_tile(const Rows& x, int64_t dp, float by, float* to) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t j = 0; j < kTile; ++j)
    for (int64_t i = 0; i < dp; ++i) to[i * kTile + j] = x.at[j * x.stride + i] * by;
#else
  const hn::FixedTag<float, 4> f4;
  const hn::RepartitionToWide<decltype(f4)> wide;
  const auto times = hn::Set(f4, by);
  for (int64_t i = 0; i < dp; i += 4)
    for (int64_t j = 0; j < kTile; j += 4) {
      const float* from = x.at + j * x.stride + i;
      const auto a = hn::Mul(hn::LoadU(f4, from), times), b = hn::Mul(hn::LoadU(f4, from + x.stride), times);
      const auto c = hn::Mul(hn::LoadU(f4, from + 2 * x.stride), times);
      const auto e = hn::Mul(hn::LoadU(f4, from + 3 * x.stride), times);
      const auto ab0 = hn::BitCast(wide, hn::InterleaveLower(f4, a, b));
      const auto ab1 = hn::BitCast(wide, hn::InterleaveUpper(f4, a, b));
      const auto ce0 = hn::BitCast(wide, hn::InterleaveLower(f4, c, e));
      const auto ce1 = hn::BitCast(wide, hn::InterleaveUpper(f4, c, e));
      float* out = to + i * kTile + j;
      hn::Store(hn::BitCast(f4, hn::InterleaveLower(wide, ab0, ce0)), f4, out);
      hn::Store(hn::BitCast(f4, hn::InterleaveUpper(wide, ab0, ce0)), f4, out + kTile);
      hn::Store(hn::BitCast(f4, hn::InterleaveLower(wide, ab1, ce1)), f4, out + 2 * kTile);
      hn::Store(hn::BitCast(f4, hn::InterleaveUpper(wide, ab1, ce1)), f4, out + 3 * kTile);
    }
#endif
}

// 2^x for x up to 126, about 2^-126 below -126; a NaN stays one. With x = r + f, |f| <= 1/2: 2^f by a polynomial
// through the seven Chebyshev nodes (off by 3e-9 before rounding), r added to the exponent.
HWY_INLINE hn::Vec<F> power_of_2(hn::Vec<F> x) {
  const F d;
  const hn::RebindToSigned<F> di;
  const auto low = hn::Set(d, -126.0f);
  const auto y = hn::IfThenElse(hn::Lt(x, low), low, x);
  const auto r = hn::Round(y), f = hn::Sub(y, r);
  auto p = hn::MulAdd(hn::Set(d, 1.54614447e-4f), f, hn::Set(d, 1.34004282e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.61805668e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.55032723e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.40226509e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.93147207e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto scaled = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::ConvertTo(di, r)));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::BitCast(d, scaled));
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
