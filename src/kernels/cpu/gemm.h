// kernels/cpu/gemm.h — oneDNN's products on packed panels, one thread a call; generated code is kept for each shape.
#pragma once
#include <cstdint>

#include "kernels/cpu/onednn.h"
#include "kernels/matmul.h"

namespace kda::cpu {

// The three ways, by what the CPU has. f32_plain: no code for panels of 64 columns within a wider matrix, so there a
// product has exactly 64 columns.
enum class Kind { bf16, f32, f32_plain };

inline int64_t element_bytes(Kind k) { return k == Kind::bf16 ? 2 : 4; }

// y[rows,columns] = x[rows,K] w, or += with `accumulate`: x and y dense, w in panels (kernels/cpu/matmul.h).
struct GemmKey {
  Kind kind;
  int64_t rows, K, columns;
  bool accumulate = false;
  auto operator<=>(const GemmKey&) const = default;
};

struct Gemm {
  dnnl::matmul run;
  dnnl::memory::desc x, w, y, scratchpad;
};

// The code for a shape, made at the first call. Throws Error where the library has none.
const Gemm& gemm(const GemmKey&);

// One call on this thread alone; `scratchpad` has gemm.scratchpad.get_size() bytes.
void run_gemm(const Gemm&, const void* x, const void* w, void* y, void* scratchpad);

bool cpu_has_amx();
Kind f32_kind();

// Fast rounds activations to bf16, never weights: a matrix stored in more than bf16 is multiplied in f32.
Kind kind_for(Precision, Dtype weights);

}  // namespace kda::cpu
