// kernels/optimizer.h — AdamW (arXiv:1711.05101) as PyTorch counts it, and the norm that clipping needs.
//   g' = grad_scale g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
//   p = p (1 - lr decay) - lr (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)
// dtypes (cpu)  p, g, m, v f32; working bf16.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct AdamW {
  View p;        // any shape, n elements
  ConstView g;   // n
  View m, v;     // n
  View working;  // n  p rounded to bf16, for the products of the next step; data == nullptr: none
  float lr, beta1, beta2, eps, decay;
  int64_t step;      // 1 for the first
  float grad_scale;  // clipping
};

// sum[0] += sum x^2, added up in double inside, in an order that sizes alone decide.
struct SumSquares {
  ConstView x;  // n
  View sum;     // f32 [1]
};

void adamw(Context&, const AdamW&);
void sum_squares(Context&, const SumSquares&);
size_t sum_squares_workspace_bytes(const Context&, int64_t n);

}  // namespace kda
