// kernels/conv.h — causal depthwise convolution over 4 tokens, then SiLU, with the last 3 inputs carried over.
//
//   y[t,c] = silu(sum_{j=0..3} w[c,j] x[t-3+j,c])     x before a sequence's first token comes from its window
//
// The window pool is shared by q, k and v (channels q|k|v, oldest token first); a call handles the C channels from
// `channel` on. The window left behind holds the last 3 inputs, older window rows included when a sequence brought fewer.
// dtypes        f32 (cpu); x, y, window bf16 and w f32 (cuda).   Source: fla/modules/convolution.py @ bc3b101d.
#pragma once
#include "kernels/backend.h"

namespace kda {

inline constexpr int kConvTaps = 4;  // w's last dimension; a checkpoint with another is refused

struct Conv {
  ConstView x;          // [T,C]
  ConstView w;          // [C,4]
  View window;          // [slots,3,channels]
  int64_t channel = 0;  // first of the C channels within the window
  Slots slots;
  Packing packing;
  View y;               // [T,C]  may not be x
  StateMarks marks = {};
};

void conv_silu(Context&, const Conv&);

}  // namespace kda
