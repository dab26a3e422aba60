// kernels/norm_backward.h — gradient of RMSNorm (kernels/norm.h); with r = 1 / sqrt(mean x^2 + eps):
//   dx += r (w dy - x r^2 mean(w dy x))        dw += sum_r dy x r
// dtypes (cpu)  all f32. The rows are summed in an order that sizes alone decide.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct RmsNormBackward {
  ConstView x;   // [R,D]
  ConstView w;   // [D]
  ConstView dy;  // [R,D]
  View dx;       // [R,D]  added to; not dy's memory
  View dw;       // [D]    added to; data == nullptr: not wanted
  float eps;
};

void rms_norm_backward(Context&, const RmsNormBackward&);
size_t rms_norm_backward_workspace_bytes(const Context&, int64_t R, int64_t D);

}  // namespace kda
