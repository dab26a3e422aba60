// kernels/norm.h — RMSNorm: y[r,:] = x[r,:] / sqrt(mean_d x[r,d]^2 + eps) * w.
// dtypes        x f32, w f32; y f32 (cpu) | bf16 (cuda). Sums fp32.
// Source        transformers LlamaRMSNorm.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct RmsNorm {
  ConstView x;  // [R,D]
  ConstView w;  // [D]
  View y;       // [R,D]  may be x where it has x's dtype
  float eps;
};

// What a layer's part adds to the residual stream, and the next part's norm, in one pass: x += add, then y = rms_norm(x).
struct AddRmsNorm {
  View x;         // [R,D]  f32
  ConstView add;  // [R,D]  the backend's activation dtype
  ConstView w;    // [D]
  View y;         // [R,D]  as add; may be add
  float eps;
};

void rms_norm(Context&, const RmsNorm&);
void add_rms_norm(Context&, const AddRmsNorm&);

}  // namespace kda
