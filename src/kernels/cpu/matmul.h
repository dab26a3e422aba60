// kernels/cpu/matmul.h — the parts of the CPU's matmul.
//
// A panel is kPanel rows of W (columns of y), packed for the GEMM, dwords innermost over the panel's columns:
//   bf16  u16 [Kp/2][kPanel][2]      (oneDNN's BA16a64b2a for one block of 64 columns)
//   f32   f32 [Kp][kPanel]
// with Kp = K rounded up to kStep and zeros wherever W has no element.
#pragma once
#include "kernels/matmul.h"

namespace kda::cpu {

inline constexpr int64_t kPanel = 64;  // columns of one packed block
inline constexpr int64_t kStep = 32;   // K is padded to a multiple of this

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Whether the GEMM library may use bf16 instructions here: the CPU has them and no cap (DNNL_MAX_CPU_ISA) forbids them.
bool cpu_has_bf16();

// Packs rows [n0, n0 + n) of W, n <= kPanel, as above; int8 without its scale.
void pack_panel_bf16(const ConstView& w, int64_t n0, int64_t n, uint16_t* out);
void pack_panel_f32(const ConstView& w, int64_t n0, int64_t n, float* out);

// One row of x [K] to [Kp], zeros at the end.
void convert_row_bf16(const float* x, int64_t K, uint16_t* out);
void convert_row_f32(const float* x, int64_t K, float* out);

}  // namespace kda::cpu
