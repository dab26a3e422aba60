// kernels/pointwise.h — elementwise parts of a layer. dtypes: f32 (cpu) | bf16 (cuda); y of
// add_rows and add_bias may be f32 on both, bias is f32.
#pragma once
#include "kernels/backend.h"

namespace kda {

// y += x
struct AddRows {
  ConstView x;  // [R,D]
  View y;       // [R,D]
};

// y[r,:] += bias
struct AddBias {
  ConstView bias;  // [D]
  View y;          // [R,D]
};

// y = max(x, 0)^2
struct Relu2 {
  ConstView x;  // [R,F]
  View y;       // [R,F]  may be x
};

// y = gate * sigmoid(gate) * up
struct SwiGlu {
  ConstView gate, up;  // [R,F]
  View y;              // [R,F]  may be gate or up
};

void add_rows(Context&, const AddRows&);
void add_bias(Context&, const AddBias&);
void relu2(Context&, const Relu2&);
void swiglu(Context&, const SwiGlu&);

}  // namespace kda
