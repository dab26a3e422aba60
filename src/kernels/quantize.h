// kernels/quantize.h — a matrix in 8 bits with one scale per row.
//   scale[n] = max_k |W[n,k]| / 127        q[n,k] = W[n,k] / scale[n], rounded half to even, in [-127,127]
// A row of zeros (or of values below 4e-37, whose scale has no inverse) has scale 0 and all q 0. Made once when a model
// is loaded; host memory.
#pragma once
#include "base/parallel.h"
#include "base/tensor.h"
#include "kernels/backend.h"

namespace kda {

struct QuantizedRows {
  Tensor w;      // i8 [N,K]
  Tensor scale;  // f32 [N]
};

// The same for a matrix in the backend's memory, done when the stream comes to it: i8 as above; f8_e4m3 with
// scale[n] = max_k |W[n,k]| / 448 and q rounded to nearest, ties to even. A value that is not finite makes its row's scale NaN.
struct QuantizeRows {
  ConstView w;  // [N,K]  bf16
  View q;       // [N,K]  i8 | f8_e4m3
  View scale;   // [N]    f32
};

void quantize_rows(Context&, const QuantizeRows&);

// w: f32, bf16 or f16 [N,K]. Throws Error when a value is not finite, naming its row.
QuantizedRows quantize_rows_i8(ThreadPool&, const ConstView& w);

}  // namespace kda
