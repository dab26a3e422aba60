// kernels/rope.h — rotary positions, rotate-half pairing: channel i turns with channel i + d/2.
//
//   angle = f32(position) * inv_freq[i], rounded to f32 (as transformers does: float64 angles differ at 65k)
//   x'[i] = factor * (x[i] cos - x[i+d/2] sin)        x'[i+d/2] = factor * (x[i+d/2] cos + x[i] sin)
//
// dtypes        x f32 (cpu) | bf16 (cuda), inv_freq f32, position i32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct Rope {
  View x;              // [T,H,d]  in place, d even
  ConstView position;  // [T]
  ConstView inv_freq;  // [d/2]
  float factor = 1;    // YaRN's attention_factor; both cos and sin are multiplied by it
};

void rope(Context&, const Rope&);

}  // namespace kda
