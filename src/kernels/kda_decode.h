// kernels/kda_decode.h — one generated token of a KDA layer for each of N sequences, from projections to the input of
// o_proj: window shift, conv, SiLU, unit length, gates, recurrence, gated norm. Bound by reading and writing the state
// once each: 8 H K V bytes per sequence.
// The parts' maths: conv.h, kda_prep.h, kda.h.
// dtypes        all f32 (cpu); q, k, v, f, b, g, y, window bf16, the rest f32 (cuda).
// A sequence with slots.in = -1 starts from zeros, one with slots.out = -1 leaves nothing behind.
#pragma once
#include "kernels/backend.h"
#include "kernels/kda_prep.h"

namespace kda {

struct KdaDecode {
  ConstView q, k;                 // [N,H*K]  projections, before the conv
  ConstView v;                    // [N,H*V]
  ConstView f;                    // [N,H*K]  gate logits
  ConstView b;                    // [N,H]    beta logits
  ConstView g;                    // [N,H*V]  output gate logits
  ConstView q_conv, k_conv;       // [H*K,4]
  ConstView v_conv;               // [H*V,4]
  ConstView A_log, dt_bias;       // [H], [H*K]
  ConstView g_bias, o_norm;       // [H*V], [V]
  KdaGateParams gate;
  float eps;                      // of o_norm
  View window;                    // [slots,3,2HK+HV]
  View state;                     // [slots,H,V,K]
  Slots slots;
  View y;                         // [N,H*V]
};

void kda_decode(Context&, const KdaDecode&);
size_t kda_decode_workspace_bytes(const Context&, int64_t N, int64_t H, int64_t K, int64_t V);

}  // namespace kda
