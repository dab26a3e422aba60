// Converts and transposes weights into the panels that the GEMM reads, and rows of x into its input type.
#include "kernels/cpu/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_pack.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/cpu/weights-inl.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
using DU32 = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;

// Rounds to nearest even; a NaN stays a NaN (the integer trick alone would carry it into an infinity or a zero).
HWY_INLINE hn::Vec<DU16> to_bf16(VF x) {
  const DU32 du;
  const auto u = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff))));
  const auto nan = hn::Or(hn::ShiftRight<16>(u), hn::Set(du, 0x40));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(x));
  return hn::TruncateTo(DU16(), hn::IfThenElse(is_nan, nan, rounded));
}

HWY_INLINE hn::Vec<DU16> to_bf16(const float* p) { return to_bf16(load(p)); }
HWY_INLINE hn::Vec<DU16> to_bf16(const f16* p) { return to_bf16(load(p)); }
HWY_INLINE hn::Vec<DU16> to_bf16(const int8_t* p) {  // exact, so the upper half is all of it
  return hn::TruncateTo(DU16(), hn::ShiftRight<16>(hn::BitCast(DU32(), load(p))));
}

template <class T>
void row_to_bf16(const T* x, int64_t n, uint16_t* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(to_bf16(x + k), DU16(), out + k);
  for (; k < n; ++k) out[k] = bf16(float(x[k])).bits;
}
inline void row_to_bf16(const bf16* x, int64_t n, uint16_t* out) { std::memcpy(out, x, size_t(n) * 2); }

template <class T>
void row_to_f32(const T* x, int64_t n, float* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(load(x + k), DF(), out + k);
  for (; k < n; ++k) out[k] = float(x[k]);
}

// dst[k * kPanel + n] = src[n][k] for kGroup rows of `depth` dwords, a multiple of 16; src_stride in bytes.
constexpr int64_t kGroup = 16;

#if HWY_TARGET == HWY_SCALAR
void transpose(const void* src, int64_t src_stride, int64_t depth, uint32_t* dst) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < kGroup; ++n)
      std::memcpy(dst + k * kPanel + n, static_cast<const char*>(src) + n * src_stride + k * 4, 4);
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

void transpose(const void* src, int64_t src_stride, int64_t depth, uint32_t* dst) {
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
      uint32_t* q = dst + (k + j) * kPanel;
      hn::StoreU(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(q0), p0), d32, q);
      hn::StoreU(hn::OddEvenBlocks(q0, hn::SwapAdjacentBlocks(p0)), d32, q + 4 * kPanel);
      hn::StoreU(hn::OddEvenBlocks(hn::SwapAdjacentBlocks(q1), p1), d32, q + 8 * kPanel);
      hn::StoreU(hn::OddEvenBlocks(q1, hn::SwapAdjacentBlocks(p1)), d32, q + 12 * kPanel);
    }
#else
    for (int64_t g = 0; g < 4; ++g)
      for (int64_t j = 0; j < 4; ++j)
        for (int64_t b = 0; b < lanes / 4; ++b) {
          const hn::Full128<uint32_t> block;
          alignas(64) uint32_t part[16];
          hn::Store(v[4 * g + j], d32, part);
          hn::StoreU(hn::Load(block, part + 4 * b), block, dst + (k + 4 * b + j) * kPanel + 4 * g);
        }
#endif
  }
}
#endif

// `Out` uint16_t: two elements a dword; float: one. Goes along kGroup rows of W at a time, so that memory is read in as
// many streams, and writes whole cache lines.
template <class T, class Out>
void pack(const T* w, int64_t K, int64_t n, Out* out) {
  constexpr int64_t kPerDword = 4 / int64_t(sizeof(Out)), kTile = 64 * kPerDword;
  constexpr bool kAsStored = std::is_same_v<T, std::conditional_t<sizeof(Out) == 2, bf16, float>>;
  alignas(64) Out tile[kGroup * kTile];
  const int64_t Kp = round_up(K, kStep);
  for (int64_t g = 0; g < kPanel; g += kGroup)
    for (int64_t k = 0; k < Kp; k += kTile) {
      const int64_t depth = std::min(kTile, Kp - k), have = std::min(kTile, K - k);
      auto* q = reinterpret_cast<uint32_t*>(out + k * kPanel) + g;
      if (kAsStored && g + kGroup <= n && have == depth) {
        transpose(w + g * K + k, K * int64_t(sizeof(T)), depth / kPerDword, q);
        continue;
      }
      for (int64_t i = 0; i < kGroup; ++i) {
        Out* row = tile + i * kTile;
        const int64_t m = g + i < n ? have : 0;
        const T* from = m ? w + (g + i) * K + k : w;
        if constexpr (sizeof(Out) == 2)
          row_to_bf16(from, m, row);
        else
          row_to_f32(from, m, row);
        std::fill(row + m, row + depth, Out(0));
      }
      transpose(tile, kTile * int64_t(sizeof(Out)), depth / kPerDword, q);
    }
}

template <class Out>
void pack_any(const ConstView& w, int64_t n0, int64_t n, Out* out) {
  const int64_t K = w.dim(1);
  switch (w.dtype) {
    case Dtype::f32: return pack(w.as<float>() + n0 * K, K, n, out);
    case Dtype::bf16: return pack(w.as<bf16>() + n0 * K, K, n, out);
    case Dtype::f16: return pack(w.as<f16>() + n0 * K, K, n, out);
    default: return pack(w.as<int8_t>() + n0 * K, K, n, out);
  }
}

void PackBf16(const ConstView& w, int64_t n0, int64_t n, uint16_t* out) { pack_any(w, n0, n, out); }
void PackF32(const ConstView& w, int64_t n0, int64_t n, float* out) { pack_any(w, n0, n, out); }
void RowBf16(const float* x, int64_t K, uint16_t* out) {
  row_to_bf16(x, K, out);
  std::fill(out + K, out + round_up(K, kStep), uint16_t(0));
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(PackBf16);
HWY_EXPORT(PackF32);
HWY_EXPORT(RowBf16);

void pack_panel_bf16(const ConstView& w, int64_t n0, int64_t n, uint16_t* out) {
  HWY_DYNAMIC_DISPATCH(PackBf16)(w, n0, n, out);
}
void pack_panel_f32(const ConstView& w, int64_t n0, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(PackF32)(w, n0, n, out);
}
void convert_row_bf16(const float* x, int64_t K, uint16_t* out) { HWY_DYNAMIC_DISPATCH(RowBf16)(x, K, out); }
void convert_row_f32(const float* x, int64_t K, float* out) {
  std::memcpy(out, x, size_t(K) * sizeof(float));
  std::fill(out + K, out + round_up(K, kStep), 0.0f);
}

}  // namespace kda::cpu
#endif
