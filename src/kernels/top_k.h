// kernels/top_k.h — the k likeliest ids of each row of logits, with natural log-probabilities over the whole row:
//   logprobs[r,j] = x[r, ids[r,j]] - ln sum_i exp x[r,i], falling; of equal logits the lower id comes first.
// dtypes (cpu)  f32, ids i32. A row with a NaN gets NaN log-probabilities.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct TopK {
  ConstView logits;  // [R,V]
  View ids;          // i32 [R,k]  1 <= k <= V
  View logprobs;     // [R,k]
};

void top_k(Context&, const TopK&);

}  // namespace kda
