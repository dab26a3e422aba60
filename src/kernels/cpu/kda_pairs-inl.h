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

// A vector of key channels of a chunk, from column j of its rows on. With p_t, r_i and D_ti as in docs/KDA.md:
//   dq_t = s (dQ_t p_t + sum_{i<=t} dP_ti k_i D_ti)
//   dk_i = dK_i p_i + dR_i r_i + sum_{t>i} (dL_ti k_t + dP_ti s q_t) D_ti + dP_ii s q_i + sum_{j<i} dL_ij k_j D_ij
//   dg_m = what passes m: reads of the old state at t >= m, writes at i < m, the old state itself (`whole`), and the
//          pairs i < m <= t
// answers: dK, dQ and dR, 16 rows of 32 each: gradients of k p, s q p and k r. scores: dL then dP, [16 t, 16 i] each.
// dq, dk, dg: their rows for the chunk's first token, `stride` floats apart; `left` channels remain. Of the 16 rows the
// last 16 - n are zeros and not stored.
//
// Pairs go by blocks of kKeys keys. For a token t behind the block, D_ti = D_t E_i, where E_i is the decay from i to
// the block's end: two multiply-adds for what the key gives t, two for what t gives the key, one for what lies between.
constexpr int kKeys = 4;
static_assert(C % kKeys == 0);

HWY_INLINE void PairGradients(const Rows& w, int64_t j, int64_t n, const float* answers, const float* scores, VF whole,
                              float* dq, float* dk, float* dg, int64_t stride, int64_t K, int64_t left) {
  const F32 d;
  const int64_t Kp = w.Kp;
  const float *decay = w.decay + j, *k = w.k + j, *q = w.q + j, *kp = w.decayed + j, *qp = kp + C * Kp;
  const float *kr = w.rest + j, *dK = answers, *dQ = dK + C * W, *dR = dQ + C * W, *dL = scores, *dP = dL + C * C;
  VF gk[C], gq[C], gg[C], D[C];
  VF passed = hn::Set(d, 1.0f), written = whole;
  for (int t = 0; t < C; ++t) {
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
  for (int64_t t = C - 1; t >= 0; --t) {
    if (t + 1 < n) passed = hn::Mul(passed, hn::Load(d, decay + (t + 1) * Kp));
    read = hn::Add(read, D[t]);
    gg[t] = hn::Add(gg[t], read);
    gk[t] = hn::MulAdd(hn::Load(d, dR + t * W), passed, gk[t]);
  }
  for (int64_t i0 = C - kKeys; i0 >= 0; i0 -= kKeys) {
    const int64_t end = i0 + kKeys;
    VF key[kKeys], E[kKeys], later[kKeys];  // k_i E_i; sum of D_t (dL_ti k_t + dP_ti q_t) over the tokens from t on
    E[kKeys - 1] = hn::Set(d, 1.0f);
    for (int i = kKeys - 2; i >= 0; --i) E[i] = hn::Mul(E[i + 1], hn::Load(d, decay + (i0 + i + 1) * Kp));
    for (int i = 0; i < kKeys; ++i) {
      key[i] = hn::Mul(hn::Load(d, k + (i0 + i) * Kp), E[i]);
      later[i] = hn::Zero(d);
    }
    const VF block = hn::Mul(E[0], hn::Load(d, decay + i0 * Kp));
    for (int64_t t = C - 1; t >= end; --t) {
      const VF Dk = hn::Mul(D[t], hn::Load(d, k + t * Kp)), Dq = hn::Mul(D[t], hn::Load(d, q + t * Kp));
      const float *l = dL + t * C + i0, *p = dP + t * C + i0;
      VF to_k = hn::Zero(d), to_q = hn::Zero(d), between = gg[t];
      HWY_UNROLL(4)
      for (int i = 0; i < kKeys; ++i) {
        const VF li = hn::Set(d, l[i]), pi = hn::Set(d, p[i]);
        to_k = hn::MulAdd(li, key[i], to_k);
        to_q = hn::MulAdd(pi, key[i], to_q);
        later[i] = hn::MulAdd(li, Dk, hn::MulAdd(pi, Dq, later[i]));
        between = hn::MulAdd(key[i], later[i], between);
      }
      gk[t] = hn::MulAdd(to_k, D[t], gk[t]);
      gq[t] = hn::MulAdd(to_q, D[t], gq[t]);
      gg[t] = between;
      D[t] = hn::Mul(D[t], block);
    }
    VF inside = hn::Set(d, 1.0f);
    for (int64_t t = i0; t < end; ++t) D[t] = inside = hn::Mul(inside, hn::Load(d, decay + t * Kp));  // from i0 - 1
    HWY_UNROLL(4)
    for (int i = 0; i < kKeys; ++i) {  // and the pairs within the block
      const VF ki = hn::Load(d, k + (i0 + i) * Kp);
      VF sum = hn::Mul(later[i], E[i]), from[kKeys];
      from[i] = hn::Set(d, 1.0f);
      for (int t = i + 1; t < kKeys; ++t) from[t] = hn::Mul(from[t - 1], hn::Load(d, decay + (i0 + t) * Kp));
      for (int t = kKeys - 1; t > i; --t) {
        const int64_t row = i0 + t;
        const VF l = hn::Set(d, dL[row * C + i0 + i]), p = hn::Set(d, dP[row * C + i0 + i]);
        const VF one = hn::Mul(from[t], ki);
        const VF both = hn::MulAdd(l, hn::Load(d, k + row * Kp), hn::Mul(p, hn::Load(d, q + row * Kp)));
        sum = hn::MulAdd(from[t], both, sum);
        gg[row] = hn::MulAdd(sum, ki, gg[row]);
        gk[row] = hn::MulAdd(l, one, gk[row]);
        gq[row] = hn::MulAdd(p, one, gq[row]);
      }
      gk[i0 + i] = hn::Add(gk[i0 + i], sum);
    }
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
