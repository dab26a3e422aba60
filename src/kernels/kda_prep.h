// kernels/kda_prep.h — from a KDA layer's convolved q, k and its gate and beta logits to what the recurrence takes.
//
//   q <- q * rsqrt(sum q^2 + 1e-6), k likewise        per token and head
//   z = f + dt_bias
//   log_decay = -exp(A_log[h]) * softplus(z)                    KdaGate::softplus: unbounded below
//             or lower_bound * sigmoid(exp(A_log[h]) * z)       KdaGate::bounded
//   beta = beta_scale * sigmoid(b)                              beta_scale 2 where allow_neg_eigval
//
// dtypes (cpu)  all f32.   Source: fla/layers/kda.py, fla/ops/kda/gate.py, fla/modules/l2norm.py @ bc3b101d.
#pragma once
#include "kernels/backend.h"

namespace kda {

inline constexpr float kL2NormEps = 1e-6f;  // inside the root, on the sum; what checkpoints were trained with

enum class KdaGate { softplus, bounded };

struct KdaGateParams {
  KdaGate kind = KdaGate::softplus;
  float lower_bound = -5;  // bounded only, in [-5,0)
  float beta_scale = 1;
};

void check_gate(const char* op, const KdaGateParams&);  // for the doors of kda_prep and kda_decode

struct KdaPrep {
  View q, k;          // [T,H,K]  in place, or read only: see unit_q
  ConstView f;        // [T,H,K]  gate logits
  ConstView b;        // [T,H]    beta logits
  ConstView A_log;    // [H]
  ConstView dt_bias;  // [H*K]
  KdaGateParams gate;
  View log_decay;     // [T,H,K]  may be f's memory
  View beta;          // [T,H]    may be b's memory
  View unit_q = {}, unit_k = {};  // [T,H,K]  where q, k go at unit length; data == nullptr: in place
};

void kda_prep(Context&, const KdaPrep&);

}  // namespace kda
