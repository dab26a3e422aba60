// kernels/logits.h — what scoring needs of a row of logits.
//   loss[r] = log sum_j exp(logits[r,j]) - logits[r,target[r]]       0 where target[r] is -1
// dtypes (cpu)  logits, loss f32 (sums in f64), target i32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct TokenLoss {
  ConstView logits;  // [R,vocabulary]
  ConstView target;  // [R]
  View loss;         // [R]
};

void token_loss(Context&, const TokenLoss&);

}  // namespace kda
