// kernels/kda_backward.h — Kimi Delta Attention for training: the forward pass that keeps the states at the starts of
// its chunks, and the gradients of kda_forward, kda_prep and kda_output (kernels/kda.h, kernels/kda_prep.h).
//
// The inside of a chunk is recomputed from the inputs and the kept state; docs/KDA.md has the formulas. How long a
// chunk is is each backend's own business: `kept` is opaque memory of kda_kept_floats() floats, filled by
// kda_forward_keep. dtypes (cpu)  all f32. Sums over tokens run in an order that sizes alone decide.
#pragma once
#include "kernels/kda.h"
#include "kernels/kda_prep.h"

namespace kda {

// As kda_forward, same result; every sequence may start from a state (slots) or from zeros.
struct KdaForwardKeep {
  KdaForward forward;
  View kept;  // f32 [kda_kept_floats(..)]
};

int64_t kda_kept_floats(const Context&, const Packing&, int64_t H, int64_t K, int64_t V);
// The same for any packing of at most T tokens in at most N sequences.
int64_t kda_kept_floats(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V);

struct KdaBackward {
  ConstView q, k;       // [T,H,K]  unit length, as kda_forward took them
  ConstView v;          // [T,H,V]
  ConstView log_decay;  // [T,H,K]
  ConstView beta;       // [T,H]
  ConstView kept;       // f32, from kda_forward_keep with the same arguments
  Packing packing;
  ConstView d_o;          // [T,H,V]
  ConstView d_state_out;  // [N,H,V,K]  gradient of the final states; data == nullptr: zero
  View dq, dk;            // [T,H,K]  written in full
  View dv;                // [T,H,V]
  View d_log_decay;       // [T,H,K]
  View d_beta;            // [T,H]
  View d_state_in;        // [N,H,V,K]  written in full; data == nullptr: not wanted
};

// Through unit length, gate and beta. q, k, f, b as kda_prep took them, before it changed them in place.
//   dx = rstd (dy - y (y . dy));  softplus: df = -exp(A) sigmoid(z) dg, dA += sum g dg;  bounded: with s =
//   sigmoid(exp(A) z), df = lower_bound exp(A) s (1-s) dg, dA += sum df z;  db = beta (1 - beta / beta_scale) d_beta;
//   d dt_bias += sum df
struct KdaPrepBackward {
  ConstView q, k;     // [T,H,K]
  ConstView f;        // [T,H,K]
  ConstView b;        // [T,H]
  ConstView A_log;    // [H]
  ConstView dt_bias;  // [H*K]
  KdaGateParams gate;
  View dq, dk;     // [T,H,K]  in: of the unit vectors; out: of q, k
  View df;         // [T,H,K]  in: of log_decay; out: of f
  View db;         // [T,H]    in: of beta; out: of b
  View dA_log;     // [H]      added to; data == nullptr: not wanted
  View d_dt_bias;  // [H*K]    added to; data == nullptr: not wanted
};

struct KdaOutputBackward {
  ConstView o, g;    // [T,H,V]
  ConstView g_bias;  // [H*V]
  ConstView w;       // [V]
  ConstView dy;      // [T,H,V]
  float eps;
  View d_o;       // [T,H,V]  written in full; may be dy
  View dg;        // [T,H,V]  written in full
  View d_g_bias;  // [H*V]    added to; data == nullptr: not wanted
  View dw;        // [V]      added to; data == nullptr: not wanted
};

void kda_forward_keep(Context&, const KdaForwardKeep&);
void kda_backward(Context&, const KdaBackward&);
void kda_prep_backward(Context&, const KdaPrepBackward&);
void kda_output_backward(Context&, const KdaOutputBackward&);
size_t kda_forward_keep_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t K, int64_t V);
size_t kda_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t K, int64_t V);
size_t kda_prep_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t K);
size_t kda_output_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t V);

}  // namespace kda
