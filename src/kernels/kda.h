// kernels/kda.h — Kimi Delta Attention over packed sequences, for prompts.
//
// Per sequence and head, a state S[V,K] and, token by token:
//     S  <- S * exp(log_decay_t)[None,:]        decay first, along K
//     u  =  beta_t * (v_t - S k_t)              what the DECAYED state still gets wrong
//     S  <- S + u k_t^T
//     o_t = K^-1/2 S q_t                        read AFTER the write
// computed in chunks (docs/KDA.md): equal to the recurrence up to rounding, for any decay.
//
// Names   T tokens in all, N sequences packed along T, H heads, K key width, V value width.
// Units   log_decay is a natural log, <= 0, one token's own; a sum over tokens is named *_cum.
// State   fp32, K innermost: the only layout, in every backend and in every saved session.
// dtypes (cpu)  all f32.
// Source  arXiv:2510.26692; fla/ops/kda/naive.py @ bc3b101d, which keeps S as [K,V].
#pragma once
#include "kernels/backend.h"
#include "kernels/kda_prep.h"

namespace kda {

struct KdaForward {
  ConstView q, k;       // [T,H,K]  unit length
  ConstView v;          // [T,H,V]
  ConstView log_decay;  // [T,H,K]  <= 0
  ConstView beta;       // [T,H]    in (0,2)
  View state;           // [slots,H,V,K]
  Slots slots;
  Packing packing;
  View o;               // [T,H,V]  written in full
};

// From what the convolutions gave and the raw gate and beta logits: kda_prep.h's maths, then the above.
// dtypes        f32 (cpu); q, k, v, f, b, o bf16, A_log, dt_bias, state f32 (cuda).
struct KdaPrefill {
  View q, k;          // [T,H,K]  convolved, of any length; may be overwritten
  ConstView v;        // [T,H,V]
  View f;             // [T,H,K]  gate logits; may be overwritten
  View b;             // [T,H]    beta logits; may be overwritten
  ConstView A_log;    // [H]
  ConstView dt_bias;  // [H*K]
  KdaGateParams gate;
  View state;         // [slots,H,V,K]
  Slots slots;
  Packing packing;
  StateMarks marks = {};
  View o;             // [T,H,V]  written in full
};

void kda_forward(Context&, const KdaForward&);
void kda_prefill(Context&, const KdaPrefill&);
size_t kda_prefill_workspace_bytes(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V);
size_t kda_forward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t K, int64_t V);

// Gated RMSNorm over each head's values, before the output projection (dtypes as KdaPrefill's; g_bias and w f32):
//   y[t,h,:] = o[t,h,:] / sqrt(mean_v o^2 + eps) * w * sigmoid(g[t,h,:] + g_bias[h,:])
struct KdaOutput {
  ConstView o;       // [T,H,V]
  ConstView g;       // [T,H,V]  gate logits
  ConstView g_bias;  // [H*V]
  ConstView w;       // [V]
  View y;            // [T,H,V]  may be o or g
  float eps;
};

void kda_output(Context&, const KdaOutput&);

}  // namespace kda
