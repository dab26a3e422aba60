// Converts and transposes weights into the panels that the GEMM reads, and rows of x into its input type.
#include "kernels/cpu/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_pack.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/cpu/pack-inl.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
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
        transpose(w + g * K + k, K * int64_t(sizeof(T)), depth / kPerDword, q, kPanel);
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
      transpose(tile, kTile * int64_t(sizeof(Out)), depth / kPerDword, q, kPanel);
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
