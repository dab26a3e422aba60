// Converts and transposes weights into the panels that the GEMM reads, and rows of x into its input type.
#include "kernels/cpu/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_pack.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU32 = hn::RebindToUnsigned<DF>;
using DU16 = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;

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

// 16 or so elements of a stored type as f32. Exact for each of them.
HWY_INLINE VF load_f32(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE VF load_f32(const bf16* p) {
  const auto u = hn::PromoteTo(DU32(), hn::LoadU(DU16(), reinterpret_cast<const uint16_t*>(p)));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(u));
}
HWY_INLINE VF load_f32(const f16* p) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE VF load_f32(const int8_t* p) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::Rebind<int32_t, DF> d32;
  return hn::ConvertTo(DF(), hn::PromoteTo(d32, hn::LoadU(d8, p)));
}

HWY_INLINE float to_float(float x) { return x; }
HWY_INLINE float to_float(bf16 x) { return float(x); }
HWY_INLINE float to_float(f16 x) { return float(x); }
HWY_INLINE float to_float(int8_t x) { return float(x); }

template <class T>
void row_to_bf16(const T* x, int64_t n, uint16_t* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(to_bf16(load_f32(x + k)), DU16(), out + k);
  for (; k < n; ++k) out[k] = bf16(to_float(x[k])).bits;
}
inline void row_to_bf16(const bf16* x, int64_t n, uint16_t* out) { std::memcpy(out, x, size_t(n) * 2); }

template <class T>
void row_to_f32(const T* x, int64_t n, float* out) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) hn::StoreU(load_f32(x + k), DF(), out + k);
  for (; k < n; ++k) out[k] = to_float(x[k]);
}

// dst[k][n] = src[n][k] for kPanel rows of `depth` dwords (a multiple of 4); src_stride in bytes.
HWY_INLINE void transpose(const void* src, int64_t src_stride, int64_t depth, uint32_t* dst) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < kPanel; ++n)
      std::memcpy(dst + k * kPanel + n, static_cast<const char*>(src) + n * src_stride + k * 4, 4);
#else
  const hn::Full128<uint8_t> d8;
  const hn::Full128<uint32_t> d32;
  const hn::Full128<uint64_t> d64;
  const auto* s = static_cast<const uint8_t*>(src);
  for (int64_t k = 0; k < depth; k += 4) {
    for (int64_t n = 0; n < kPanel; n += 4) {
      const uint8_t* p = s + n * src_stride + k * 4;
      const auto a = hn::BitCast(d32, hn::LoadU(d8, p)), b = hn::BitCast(d32, hn::LoadU(d8, p + src_stride));
      const auto c = hn::BitCast(d32, hn::LoadU(d8, p + 2 * src_stride));
      const auto d = hn::BitCast(d32, hn::LoadU(d8, p + 3 * src_stride));
      const auto ab0 = hn::BitCast(d64, hn::InterleaveLower(d32, a, b));
      const auto ab1 = hn::BitCast(d64, hn::InterleaveUpper(d32, a, b));
      const auto cd0 = hn::BitCast(d64, hn::InterleaveLower(d32, c, d));
      const auto cd1 = hn::BitCast(d64, hn::InterleaveUpper(d32, c, d));
      uint32_t* q = dst + k * kPanel + n;
      hn::StoreU(hn::BitCast(d32, hn::InterleaveLower(d64, ab0, cd0)), d32, q);
      hn::StoreU(hn::BitCast(d32, hn::InterleaveUpper(d64, ab0, cd0)), d32, q + kPanel);
      hn::StoreU(hn::BitCast(d32, hn::InterleaveLower(d64, ab1, cd1)), d32, q + 2 * kPanel);
      hn::StoreU(hn::BitCast(d32, hn::InterleaveUpper(d64, ab1, cd1)), d32, q + 3 * kPanel);
    }
  }
#endif
}

// `Out` uint16_t: two elements a dword; float: one. Walks W in tiles of 256 bytes a row.
template <class T, class Out>
void pack(const T* w, int64_t K, int64_t n, Out* out) {
  constexpr int64_t kPerDword = 4 / int64_t(sizeof(Out)), kTile = 64 * kPerDword;
  constexpr bool kAsStored = std::is_same_v<T, std::conditional_t<sizeof(Out) == 2, bf16, float>>;
  alignas(64) Out tile[kPanel * kTile];
  const int64_t Kp = round_up(K, kStep);
  for (int64_t k = 0; k < Kp; k += kTile) {
    const int64_t depth = std::min(kTile, Kp - k), have = std::min(kTile, K - k);
    auto* q = reinterpret_cast<uint32_t*>(out + k * kPanel);
    if (kAsStored && n == kPanel && have == depth) {
      transpose(w + k, K * int64_t(sizeof(T)), depth / kPerDword, q);
      continue;
    }
    for (int64_t i = 0; i < kPanel; ++i) {
      Out* row = tile + i * kTile;
      const int64_t m = i < n ? have : 0;
      if constexpr (sizeof(Out) == 2)
        row_to_bf16(w + i * K + k, m, row);
      else
        row_to_f32(w + i * K + k, m, row);
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
