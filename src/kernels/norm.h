// kernels/norm.h — RMSNorm: y[r,:] = x[r,:] / sqrt(mean_d x[r,d]^2 + eps) * w.
// dtypes (cpu)  all f32. Sums fp32.
// Source        transformers LlamaRMSNorm.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct RmsNorm {
  ConstView x;  // [R,D]
  ConstView w;  // [D]
  View y;       // [R,D]  may be x
  float eps;
};

void rms_norm(Context&, const RmsNorm&);

}  // namespace kda
