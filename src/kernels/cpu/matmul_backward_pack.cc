#include "kernels/cpu/matmul_backward_pack.h"

#include <algorithm>

#include "kernels/cpu/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_backward_pack.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/cpu/pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// Rows of a matrix lie far apart, so the CPU does not see what comes next: asks for `n` elements of the row kAhead below,
// where there is one.
constexpr int64_t kAhead = 64;
template <class T>
HWY_INLINE void ask_ahead(const T* row, int64_t stride, int64_t r, int64_t rows, int64_t n) {
  if (r + kAhead >= rows) return;
  const char* p = reinterpret_cast<const char*>(row + kAhead * stride);
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(p + byte, 0, 2);
}

// out[c] = a[c] and b[c] as bf16 in one dword, a below; b may be null: zeros.
template <class T>
HWY_INLINE void pair_rows(const T* a, const T* b, int64_t n, uint32_t* out) {
  const DU32 du;
  const int64_t lanes = int64_t(hn::Lanes(du));
  int64_t c = 0;
  if (b)
    for (; c + lanes <= n; c += lanes)
      hn::StoreU(hn::Or(bf16_bits(a + c), hn::ShiftLeft<16>(bf16_bits(b + c))), du, out + c);
  else
    for (; c + lanes <= n; c += lanes) hn::StoreU(bf16_bits(a + c), du, out + c);
  for (; c < n; ++c) out[c] = uint32_t(bf16(float(a[c])).bits) | (b ? uint32_t(bf16(float(b[c])).bits) << 16 : 0u);
}

template <class T>
void pack_rows(const T* m, int64_t stride, int64_t rows, int64_t columns, int64_t depth, uint32_t* out) {
  for (int64_t r = 0; r < depth; r += 2, out += kPanel) {
    if (r < rows) {
      ask_ahead(m + r * stride, stride, r, rows, columns);
      ask_ahead(m + (r + 1) * stride, stride, r + 1, rows, columns);
      pair_rows(m + r * stride, r + 1 < rows ? m + (r + 1) * stride : nullptr, columns, out);
    }
    std::fill(out + (r < rows ? columns : 0), out + kPanel, 0u);
  }
}

template <class T>
void pack_rows(const T* m, int64_t stride, int64_t rows, int64_t columns, int64_t depth, float* out) {
  for (int64_t r = 0; r < depth; ++r, out += kPanel) {
    if (r < rows) {
      ask_ahead(m + r * stride, stride, r, rows, columns);
      row_to_f32(m + r * stride, columns, out);
    }
    std::fill(out + (r < rows ? columns : 0), out + kPanel, 0.0f);
  }
}

template <class Out>
void pack_rows_of(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth, Out* out) {
  const int64_t stride = m.dim(1), at = r0 * stride + c0;
  switch (m.dtype) {
    case Dtype::f32: return pack_rows(m.as<float>() + at, stride, rows, columns, depth, out);
    case Dtype::bf16: return pack_rows(m.as<bf16>() + at, stride, rows, columns, depth, out);
    default: return pack_rows(m.as<f16>() + at, stride, rows, columns, depth, out);
  }
}

void PackRowsBf16(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth,
                  uint16_t* out) {
  pack_rows_of(m, r0, rows, c0, columns, depth, reinterpret_cast<uint32_t*>(out));
}
void PackRowsF32(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth, float* out) {
  pack_rows_of(m, r0, rows, c0, columns, depth, out);
}

// 32 rows at a time become 16 rows of dwords, and those are transposed.
void TransposeRowsBf16(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                       uint16_t* out) {
  alignas(64) uint32_t tile[kGroup * kMaxWidth];
  for (int64_t r = 0; r < depth; r += 2 * kGroup) {
    for (int64_t j = 0; j < kGroup; ++j) {
      const int64_t low = r + 2 * j;
      const float* from = x + low * stride;
      if (low < rows) {
        ask_ahead(from, stride, low, rows, columns);
        ask_ahead(from + stride, stride, low + 1, rows, columns);
        pair_rows(from, low + 1 < rows ? from + stride : nullptr, columns, tile + j * width);
      }
      std::fill(tile + j * width + (low < rows ? columns : 0), tile + (j + 1) * width, 0u);
    }
    transpose(tile, width * 4, width, reinterpret_cast<uint32_t*>(out) + r / 2, depth / 2);
  }
}

void TransposeRowsF32(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                      float* out) {
  alignas(64) float tile[kGroup * kMaxWidth];
  for (int64_t r = 0; r < depth; r += kGroup) {
    const bool whole = r + kGroup <= rows && columns == width;
    for (int64_t j = 0; j < kGroup && r + j < rows; ++j) ask_ahead(x + (r + j) * stride, stride, r + j, rows, columns);
    for (int64_t j = 0; j < kGroup && !whole; ++j) {
      const int64_t n = r + j < rows ? columns : 0;
      if (n) std::copy_n(x + (r + j) * stride, n, tile + j * width);
      std::fill(tile + j * width + n, tile + (j + 1) * width, 0.0f);
    }
    const float* from = whole ? x + r * stride : tile;
    transpose(from, (whole ? stride : width) * 4, width, reinterpret_cast<uint32_t*>(out) + r, depth);
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(PackRowsBf16);
HWY_EXPORT(PackRowsF32);
HWY_EXPORT(TransposeRowsBf16);
HWY_EXPORT(TransposeRowsF32);

void pack_rows_bf16(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth,
                    uint16_t* out) {
  HWY_DYNAMIC_DISPATCH(PackRowsBf16)(m, r0, rows, c0, columns, depth, out);
}
void pack_rows_f32(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth,
                   float* out) {
  HWY_DYNAMIC_DISPATCH(PackRowsF32)(m, r0, rows, c0, columns, depth, out);
}
void transpose_rows_bf16(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                         uint16_t* out) {
  HWY_DYNAMIC_DISPATCH(TransposeRowsBf16)(x, stride, rows, columns, width, depth, out);
}
void transpose_rows_f32(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                        float* out) {
  HWY_DYNAMIC_DISPATCH(TransposeRowsF32)(x, stride, rows, columns, width, depth, out);
}

}  // namespace kda::cpu
#endif
