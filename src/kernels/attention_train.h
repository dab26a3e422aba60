// kernels/attention_train.h — causal softmax attention with grouped heads over packed sequences without a cache,
// keeping what its gradient needs; and the gradient. Same sum as kernels/attention.h, every sequence from its first
// token.
//
//   forward   lse[t,h] = ln sum_{i<=t} exp(d^-1/2 q_t . k_i)
//   backward  p = exp(d^-1/2 q_t . k_i - lse);  dv_i += p do_t;  ds = p (do_t . v_i - do_t . o_t);
//             dq_t += d^-1/2 ds k_i;  dk_i += d^-1/2 ds q_t          dk, dv: summed over the heads of a group
// p is recomputed tile by tile: memory is linear in T. dtypes (cpu) all f32.   Source: arXiv:2205.14135.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct AttentionTrain {
  ConstView q;     // [T,H,d]
  ConstView k, v;  // [T,G,d]  G divides H
  Packing packing;
  View o;    // [T,H,d]
  View lse;  // [T,H]
};

struct AttentionBackward {
  ConstView q;       // [T,H,d]
  ConstView k, v;    // [T,G,d]
  ConstView o, d_o;  // [T,H,d]
  ConstView lse;     // [T,H]
  Packing packing;
  View dq;      // [T,H,d]  written in full
  View dk, dv;  // [T,G,d]  written in full
};

void attention_train(Context&, const AttentionTrain&);
void attention_backward(Context&, const AttentionBackward&);
size_t attention_train_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t d);
size_t attention_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t G, int64_t d);

}  // namespace kda
