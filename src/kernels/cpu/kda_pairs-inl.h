// kernels/cpu/kda_pairs-inl.h — gradients of q, k and log_decay within a chunk of kda_backward.
#if defined(KDA_CPU_KDA_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_CPU_KDA_PAIRS_INL_H_
#undef KDA_CPU_KDA_PAIRS_INL_H_
#else
#define KDA_CPU_KDA_PAIRS_INL_H_
#endif

#include <cmath>

#include "kernels/cpu/kda_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// A vector of key channels of a chunk of n tokens, from column j of its rows on. With p_t, r_i and D_ti as in kda.cc,
// L_ti and P_ti their scores:
//   dq_t = s (dQ_t p_t + sum_{i<=t} dP_ti k_i D_ti)
//   dk_i = dK_i p_i + dR_i r_i + sum_{t>i} dL_ti k_t D_ti + sum_{t>=i} dP_ti s q_t D_ti + sum_{j<i} dL_ij k_j D_ij
//   dg_m = what passes m: reads of the old state at t >= m, writes at i < m, the old state itself (`whole`), and the
//          pairs i < m <= t
// answers: dK, dQ and dR, 16 rows of 32 each: gradients of k p, s q p and k r. scores: dL then dP, [16 t, 16 i] each.
// dq, dk, dg: their rows for the chunk's first token, `stride` floats apart; `left` channels remain.
HWY_INLINE void PairGradients(const Rows& w, int64_t j, int64_t n, const float* answers, const float* scores, VF whole,
                              float* dq, float* dk, float* dg, int64_t stride, int64_t K, int64_t left) {
  const F32 d;
  const int64_t Kp = w.Kp;
  const float *decay = w.decay + j, *k = w.k + j, *q = w.q + j, *kp = w.decayed + j, *qp = kp + C * Kp;
  const float *kr = w.rest + j, *dK = answers, *dQ = dK + C * W, *dR = dQ + C * W, *dL = scores, *dP = dL + C * C;
  VF gk[C], gq[C], gg[C], D[C];
  VF passed = hn::Set(d, 1.0f), written = whole;
  for (int64_t t = 0; t < n; ++t) {
    passed = hn::Mul(passed, hn::Load(d, decay + t * Kp));
    const VF a = hn::Load(d, dK + t * W), b = hn::Load(d, dQ + t * W), own = hn::Set(d, dP[t * C + t]);
    gk[t] = hn::MulAdd(a, passed, hn::Mul(own, hn::Load(d, q + t * Kp)));
    gq[t] = hn::MulAdd(b, passed, hn::Mul(own, hn::Load(d, k + t * Kp)));
    D[t] = hn::MulAdd(a, hn::Load(d, kp + t * Kp), hn::Mul(b, hn::Load(d, qp + t * Kp)));  // for a moment: what is read
    gg[t] = written;
    written = hn::MulAdd(hn::Load(d, dR + t * W), hn::Load(d, kr + t * Kp), written);
  }
  VF read = hn::Zero(d);
  passed = hn::Set(d, 1.0f);
  for (int64_t t = n - 1; t >= 0; --t) {
    read = hn::Add(read, D[t]);
    gg[t] = hn::Add(gg[t], read);
    gk[t] = hn::MulAdd(hn::Load(d, dR + t * W), passed, gk[t]);
    passed = hn::Mul(passed, hn::Load(d, decay + t * Kp));
    D[t] = hn::Set(d, 1.0f);
  }
  for (int64_t i = n - 2; i >= 0; --i) {
    const VF one = hn::Load(d, decay + (i + 1) * Kp), ki = hn::Load(d, k + i * Kp);
    VF later = hn::Zero(d);  // sum over the tokens from t on
    for (int64_t t = n - 1; t > i; --t) {
      D[t] = hn::Mul(D[t], one);
      const VF l = hn::Set(d, dL[t * C + i]), p = hn::Set(d, dP[t * C + i]);
      const VF key = hn::Mul(D[t], ki);
      const VF both = hn::MulAdd(l, hn::Load(d, k + t * Kp), hn::Mul(p, hn::Load(d, q + t * Kp)));
      later = hn::MulAdd(D[t], both, later);
      gg[t] = hn::MulAdd(later, ki, gg[t]);
      gk[t] = hn::MulAdd(l, key, gk[t]);
      gq[t] = hn::MulAdd(p, key, gq[t]);
    }
    gk[i] = hn::Add(gk[i], later);
  }
  const VF s = hn::Set(d, 1.0f / std::sqrt(float(K)));
  for (int64_t t = 0; t < n; ++t) {
    StorePart(hn::Mul(gq[t], s), d, dq + t * stride, left);
    StorePart(gk[t], d, dk + t * stride, left);
    StorePart(gg[t], d, dg + t * stride, left);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
