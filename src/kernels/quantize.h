// kernels/quantize.h — a matrix in int8 with one scale per row.
//   scale[n] = max_k |W[n,k]| / 127        q[n,k] = W[n,k] / scale[n], rounded half to even, in [-127,127]
// A row of zeros (or of values below 4e-37, whose scale has no inverse) has scale 0 and all q 0. Made once when a model
// is loaded; host memory.
#pragma once
#include "base/parallel.h"
#include "base/tensor.h"

namespace kda {

struct QuantizedRows {
  Tensor w;      // i8 [N,K]
  Tensor scale;  // f32 [N]
};

// w: f32, bf16 or f16 [N,K]. Throws Error when a value is not finite, naming its row.
QuantizedRows quantize_rows_i8(ThreadPool&, const ConstView& w);

}  // namespace kda
