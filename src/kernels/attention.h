// kernels/attention.h — causal softmax attention with grouped heads over a growing, contiguous KV cache.
//
// Sequence n already has past[n] tokens in its slot; its new keys and values (rotated beforehand where the layer has
// positions) are appended there, then each new token attends to every token up to and including itself:
//   o[t,h,:] = sum_i softmax_i(d^-1/2 q[t,h,:] . k[i,h / (H/G),:]) v[i, h / (H/G), :]
//
// One op for prompts and for single tokens: a row's order of summation depends on its position only.
// slot = -1: a place of a fixed-size batch that nobody uses; nothing is appended and its o is unspecified but finite.
// dtypes        f32 (cpu) | bf16 (cuda); past, slot i32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct Attention {
  ConstView q;           // [T,H,d]
  ConstView k, v;        // [T,G,d]  G divides H
  View k_cache, v_cache; // [slots,capacity,G,d]  capacity >= past + new tokens, for every sequence
  const int32_t* slot;   // [N]
  const int32_t* past;   // [N]
  Packing packing;
  View o;                // [T,H,d]
};

void attention(Context&, const Attention&);
size_t attention_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t d, int64_t capacity);

}  // namespace kda
