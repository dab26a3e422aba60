// kernels/cpu/matmul_backward_pack.h — operands of the gradients' products, whose sums run along rows.
#pragma once
#include <cstdint>

#include "base/tensor.h"

namespace kda::cpu {

// Rows [r0, r0 + rows) and columns [c0, c0 + columns), columns <= 64, of m [R,C] (f32, bf16 or f16) as one panel of the
// GEMM (kernels/cpu/matmul.h) that is summed along the rows; `depth` rows with zeros at the end, even.
//   bf16  u16 [depth/2][64][2]        f32  f32 [depth][64]
void pack_rows_bf16(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth,
                    uint16_t* out);
void pack_rows_f32(const ConstView& m, int64_t r0, int64_t rows, int64_t c0, int64_t columns, int64_t depth,
                   float* out);

// out[c][r] = x[r * stride + c] for `rows` rows and `columns` columns, zeros up to out [width][depth]; width a multiple
// of 16 up to kMaxWidth, depth one of 32.
inline constexpr int64_t kMaxWidth = 128;
void transpose_rows_bf16(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                         uint16_t* out);
void transpose_rows_f32(const float* x, int64_t stride, int64_t rows, int64_t columns, int64_t width, int64_t depth,
                        float* out);

}  // namespace kda::cpu
