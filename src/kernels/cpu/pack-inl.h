// kernels/cpu/pack-inl.h — conversions of rows and the transposition of dwords, once for each instruction set.
#if defined(KDA_KERNELS_CPU_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_KERNELS_CPU_PACK_INL_H_
#undef KDA_KERNELS_CPU_PACK_INL_H_
#else
#define KDA_KERNELS_CPU_PACK_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/weights-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
using DU32 = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;

// bf16 in the lower halves. Rounds to nearest even; a NaN stays a NaN (the integer trick alone would carry it into an
// infinity or a zero).
HWY_INLINE hn::Vec<DU32> bf16_bits(VF x) {
  const DU32 du;
  const auto u = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff))));
  const auto nan = hn::Or(hn::ShiftRight<16>(u), hn::Set(du, 0x40));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
  return hn::IfThenElse(is_nan, nan, rounded);
}

HWY_INLINE hn::Vec<DU32> bf16_bits(const float* p) { return bf16_bits(load(p)); }
HWY_INLINE hn::Vec<DU32> bf16_bits(const f16* p) { return bf16_bits(load(p)); }
HWY_INLINE hn::Vec<DU32> bf16_bits(const int8_t* p) {  // exact, so the upper half is all of it
  return hn::ShiftRight<16>(hn::BitCast(DU32(), load(p)));
}
HWY_INLINE hn::Vec<DU32> bf16_bits(const bf16* p) {
  return hn::PromoteTo(DU32(), hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(p)));
}

template <class T>
HWY_INLINE hn::Vec<DU16> to_bf16(T x) {
  return hn::TruncateTo(DU16(), bf16_bits(x));
}

template <class T>
inline void row_to_bf16(const T* x, int64_t n, uint16_t* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(to_bf16(x + k), DU16(), out + k);
  for (; k < n; ++k) out[k] = bf16(float(x[k])).bits;
}
inline void row_to_bf16(const bf16* x, int64_t n, uint16_t* out) { std::memcpy(out, x, size_t(n) * 2); }

template <class T>
inline void row_to_f32(const T* x, int64_t n, float* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(load(x + k), DF(), out + k);
  for (; k < n; ++k) out[k] = float(x[k]);
}

// dst[k * dst_stride + n] = src[n][k] for kGroup rows of `depth` dwords, a multiple of 16. src_stride in bytes,
// dst_stride in dwords.
constexpr int64_t kGroup = 16;

#if HWY_TARGET == HWY_SCALAR
inline void transpose(const void* src, int64_t src_stride, int64_t depth, uint32_t* dst, int64_t dst_stride) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < kGroup; ++n)
      std::memcpy(dst + k * dst_stride + n, static_cast<const char*>(src) + n * src_stride + k * 4, 4);
}
#else
using DB = hn::CappedTag<uint8_t, 64>;  // vectors of 1, 2 or 4 blocks of 16 bytes
using D32 = hn::Repartition<uint32_t, DB>;
using D64 = hn::Repartition<uint64_t, DB>;
using V32 = hn::Vec<D32>;

// Four vectors as a matrix of 4 dwords by 4 within each block, transposed.
HWY_INLINE void transpose_in_blocks(V32& a, V32& b, V32& c, V32& d) {
  const D32 d32;
  const D64 d64;
  const auto ab0 = hn::BitCast(d64, hn::InterleaveLower(d32, a, b)),
             ab1 = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
  const auto cd0 = hn::BitCast(d64, hn::InterleaveLower(d32, c, d)),
             cd1 = hn::BitCast(d64, hn::InterleaveUpper(d32, c, d));
  a = hn::BitCast(d32, hn::InterleaveLower(d64, ab0, cd0));
  b = hn::BitCast(d32, hn::InterleaveUpper(d64, ab0, cd0));
  c = hn::BitCast(d32, hn::InterleaveLower(d64, ab1, cd1));
  d = hn::BitCast(d32, hn::InterleaveUpper(d64, ab1, cd1));
}

inline void transpose(const void* src, int64_t src_stride, int64_t depth, uint32_t* dst, int64_t dst_stride) {
  const D32 d32;
  const DB d8;
  const auto* s = static_cast<const uint8_t*>(src);
  const int64_t lanes = int64_t(hn::Lanes(d32));
  for (int64_t k = 0; k < depth; k += lanes) {
    V32 v[kGroup];
    for (int64_t n = 0; n < kGroup; ++n) v[n] = hn::BitCast(d32, hn::LoadU(d8, s + n * src_stride + k * 4));
    for (int64_t n = 0; n < kGroup; n += 4) transpose_in_blocks(v[n], v[n + 1], v[n + 2], v[n + 3]);
#if HWY_TARGET <= HWY_AVX3
    for (int64_t j = 0; j < 4; ++j) {  // v[4 g + j], block b: dwords of k = 4 b + j, rows 4 g .. 4 g + 3
      const V32 p0 = hn::ConcatLowerLower(d32, v[8 + j], v[j]), p1 = hn::ConcatUpperUpper(d32, v[8 + j], v[j]);
      const V32 q0 = hn::ConcatLowerLower(d32, v[12 + j], v[4 + j]),
                q1 = hn::ConcatUpperUpper(d32, v[12 + j], v[4 + j]);
      uint32_t* q = dst + (k + j) * dst_stride;
      hn::StoreU(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(q0), p0), d32, q);
      hn::StoreU(hn::OddEvenBlocks(q0, hn::SwapAdjacentBlocks(p0)), d32, q + 4 * dst_stride);
      hn::StoreU(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(q1), p1), d32, q + 8 * dst_stride);
      hn::StoreU(hn::OddEvenBlocks(q1, hn::SwapAdjacentBlocks(p1)), d32, q + 12 * dst_stride);
    }
#else
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t j = 0; j < 4; ++j)
        for (int64_t b = 0; b < lanes / 4; ++b) {
          const hn::Full128<uint32_t> block;
          alignas(64) uint32_t part[16];
          hn::Store(v[4 * g + j], d32, part);
          hn::StoreU(hn::Load(block, part + 4 * b), block, dst + (k + 4 * b + j) * dst_stride + 4 * g);
        }
#endif
  }
}
#endif

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
