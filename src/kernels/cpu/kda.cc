// kernels/cpu/kda.cc — kda_forward in chunks of 16 tokens; docs/KDA.md has the formulas.
//
// Within a chunk every decay is a product of the tokens' own, all in [0,1]: nothing overflows, nothing cancels, and
// what underflows is gone. The state lies in panels [K,32 value channels]: a panel meets a chunk's 16 keys and 16
// queries while it is in the first-level cache.
#include "kernels/kda.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/kda_scratch.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t C = kKdaChunk, W = kKdaPanel;
constexpr int kTile = HWY_MAX_BYTES >= 64 ? 8 : 4;   // rows of a product held in registers, two vectors wide
constexpr int kGroup = HWY_MAX_BYTES >= 64 ? 8 : 4;  // vectors of key channels held in registers

struct Work {
  KdaScratch at;
  float *state, *decayed, *k, *q, *rest, *decay, *total, *sums, *L, *P, *u, *o;

  Work(int64_t K, int64_t V, float* s)
      : at(K, V),
        state(s + at.state),
        decayed(s + at.decayed),
        k(s + at.k),
        q(s + at.q),
        rest(s + at.rest),
        decay(s + at.decay),
        total(s + at.total),
        sums(s + at.sums),
        L(s + at.L),
        P(s + at.P),
        u(s + at.u),
        o(s + at.o) {}
};

// The pool's [V,K] to panels [K,32], and back. Padding is zero and stays so.
void LoadState(const Work& w, const float* S, int64_t K, int64_t V) {
  const int64_t Kp = w.at.Kp;
  if (!S || K < Kp || V < w.at.Vp) std::fill_n(w.state, Kp * w.at.Vp, 0.0f);
  if (!S) return;
  for (int64_t v0 = 0; v0 < V; v0 += 16)
    for (int64_t d = 0; d < K; ++d) {
      float* to = w.state + (v0 / W * Kp + d) * W + v0 % W;
      for (int64_t v = v0; v < std::min(V, v0 + 16); ++v) to[v - v0] = S[v * K + d];
    }
}

void StoreState(const Work& w, float* S, int64_t K, int64_t V) {
  const int64_t Kp = w.at.Kp;
  for (int64_t v0 = 0; v0 < V; v0 += 16)
    for (int64_t d = 0; d < K; ++d) {
      const float* from = w.state + (v0 / W * Kp + d) * W + v0 % W;
      for (int64_t v = v0; v < std::min(V, v0 + 16); ++v) S[v * K + d] = from[v - v0];
    }
}

// Everything of a chunk of n tokens that does not touch the state, for G vectors of channels from j on. Rows of q, k
// and g are `stride` floats apart; `left` channels remain.
template <int G>
HWY_INLINE void PrepareColumns(const Work& w, const float* q, const float* k, const float* g, int64_t n, int64_t stride,
                               float scale, int64_t j, int64_t left) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  float *decay = w.decay + j, *kept_k = w.k + j, *kept_q = w.q + j, *decayed = w.decayed + j, *rest = w.rest + j;
  const VF s = hn::Set(d, scale);
  VF passed[G], sum[G];
  for (int c = 0; c < G; ++c) passed[c] = hn::Set(d, 1.0f), sum[c] = hn::Zero(d);
  for (int64_t t = 0; t < n; ++t) {
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t from = t * stride + j + c * N, to = t * Kp + c * N;
      const VF gt = LoadPart(d, g + from, left - c * N), kt = LoadPart(d, k + from, left - c * N);
      const VF qt = hn::Mul(LoadPart(d, q + from, left - c * N), s);
      const VF one = Exp(d, gt);
      sum[c] = hn::Add(sum[c], gt);
      passed[c] = hn::Mul(passed[c], one);
      hn::Store(one, d, decay + to);
      hn::Store(kt, d, kept_k + to);
      hn::Store(qt, d, kept_q + to);
      hn::Store(hn::Mul(kt, passed[c]), d, decayed + to);
      hn::Store(hn::Mul(qt, passed[c]), d, decayed + C * Kp + to);
    }
  }
  // The state outlives the chunk, so its factor comes from the sum: one rounding instead of n.
  for (int c = 0; c < G; ++c) {
    hn::Store(Exp(d, sum[c]), d, w.total + j + c * N);
    passed[c] = hn::Set(d, 1.0f);
  }
  for (int64_t t = n - 1; t >= 0; --t) {
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t to = t * Kp + c * N;
      hn::Store(hn::Mul(hn::Load(d, kept_k + to), passed[c]), d, rest + to);
      passed[c] = hn::Mul(passed[c], hn::Load(d, decay + to));
    }
  }
}

void Prepare(const Work& w, const float* q, const float* k, const float* g, int64_t n, int64_t stride, int64_t K) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  const float scale = 1.0f / std::sqrt(float(K));
  int64_t j = 0;
  for (; j + kGroup * N <= K; j += kGroup * N) PrepareColumns<kGroup>(w, q, k, g, n, stride, scale, j, K - j);
  for (; j < K; j += N) PrepareColumns<1>(w, q, k, g, n, stride, scale, j, K - j);
  for (; j < Kp; j += N) {  // padding beyond the last vector used above
    hn::Store(hn::Zero(d), d, w.total + j);
    for (int64_t t = 0; t < n; ++t) hn::Store(hn::Zero(d), d, w.rest + t * Kp + j);
  }
  for (int64_t t = n; t < round_up(n, kTile); ++t) {
    std::fill_n(w.decayed + t * Kp, Kp, 0.0f);
    std::fill_n(w.decayed + (C + t) * Kp, Kp, 0.0f);
  }
}

// What G vectors of channels from j on add to the scores of key i: kk[t,:] and qk[t,:], to be summed over their lanes.
template <int G>
HWY_INLINE void ScoreColumns(const Work& w, int64_t i, int64_t n, int64_t j, float* kk, float* qk) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  const float *decay = w.decay + j, *k = w.k + j, *q = w.q + j;
  VF key[G], own = j ? hn::Load(d, qk + i * N) : hn::Zero(d);
  for (int c = 0; c < G; ++c) {
    key[c] = hn::Load(d, k + i * Kp + c * N);
    own = hn::MulAdd(key[c], hn::Load(d, q + i * Kp + c * N), own);
  }
  hn::Store(own, d, qk + i * N);
  for (int64_t t = i + 1; t < n; ++t) {
    VF a = j ? hn::Load(d, kk + t * N) : hn::Zero(d), b = j ? hn::Load(d, qk + t * N) : hn::Zero(d);
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t at = t * Kp + c * N;
      key[c] = hn::Mul(key[c], hn::Load(d, decay + at));
      a = hn::MulAdd(key[c], hn::Load(d, k + at), a);
      b = hn::MulAdd(key[c], hn::Load(d, q + at), b);
    }
    hn::Store(a, d, kk + t * N);
    hn::Store(b, d, qk + t * N);
  }
}

// L[i,t] = sum_d k_t k_i D for t > i, P[i,t] = sum_d q_t k_i D for t >= i; D is the decay after i, up to t included.
void Scores(const Work& w, int64_t n, int64_t K) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t i = 0; i < n; ++i) {
    float *kk = w.sums, *qk = w.sums + C * C;
    int64_t j = 0;
    for (; j + kGroup * N <= K; j += kGroup * N) ScoreColumns<kGroup>(w, i, n, j, kk, qk);
    for (; j < K; j += N) ScoreColumns<1>(w, i, n, j, kk, qk);
    SumRows(kk, w.L + i * C);
    SumRows(qk, w.P + i * C);
  }
}

// out[r,:] = sum_d rows[r,d] panel[d,:] for kTile rows
HWY_INLINE void MeetState(const float* rows, int64_t Kp, int64_t K, const float* panel, float* out) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t c = 0; c < W; c += 2 * N) {
    VF a[kTile], b[kTile];
    for (int r = 0; r < kTile; ++r) a[r] = b[r] = hn::Zero(d);
    for (int64_t i = 0; i < K; ++i) {
      const VF x = hn::Load(d, panel + i * W + c), y = hn::Load(d, panel + i * W + c + N);
      HWY_UNROLL(8)
      for (int r = 0; r < kTile; ++r) {
        const VF m = hn::Set(d, rows[r * Kp + i]);
        a[r] = hn::MulAdd(m, x, a[r]);
        b[r] = hn::MulAdd(m, y, b[r]);
      }
    }
    for (int r = 0; r < kTile; ++r) {
      hn::Store(a[r], d, out + r * W + c);
      hn::Store(b[r], d, out + r * W + c + N);
    }
  }
}

// panel[d,:] = panel[d,:] * total[d] + sum_t rest[t,d] u[t,:]
HWY_INLINE void WriteState(const Work& w, int64_t n, float* panel) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  for (int64_t i = 0; i < Kp; i += kTile)
    for (int64_t c = 0; c < W; c += 2 * N) {
      VF a[kTile], b[kTile];
      for (int r = 0; r < kTile; ++r) {
        const VF m = hn::Set(d, w.total[i + r]);
        a[r] = hn::Mul(m, hn::Load(d, panel + (i + r) * W + c));
        b[r] = hn::Mul(m, hn::Load(d, panel + (i + r) * W + c + N));
      }
      for (int64_t t = 0; t < n; ++t) {
        const VF x = hn::Load(d, w.u + t * W + c), y = hn::Load(d, w.u + t * W + c + N);
        const float* m = w.rest + t * Kp + i;
        HWY_UNROLL(8)
        for (int r = 0; r < kTile; ++r) {
          a[r] = hn::MulAdd(hn::Set(d, m[r]), x, a[r]);
          b[r] = hn::MulAdd(hn::Set(d, m[r]), y, b[r]);
        }
      }
      for (int r = 0; r < kTile; ++r) {
        hn::Store(a[r], d, panel + (i + r) * W + c);
        hn::Store(b[r], d, panel + (i + r) * W + c + N);
      }
    }
}

// In: u = what the state answers to the keys, o = what it answers to the queries. Out: u as written, o complete.
//   u_t = beta_t (v_t - u_t - sum_{i<t} L[i,t] u_i)       o_t = o_t + sum_{i<=t} P[i,t] u_i
HWY_INLINE void Solve(const Work& w, int64_t n, const float* v, const float* beta, float* o, int64_t H, int64_t V,
                      int64_t width) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t c = 0; c < W; c += N) {
    const int64_t left = std::max<int64_t>(0, width - c);
    VF u[C];
    HWY_UNROLL(16)
    for (int t = 0; t < C; ++t) {
      if (t >= n) break;
      VF x = hn::Sub(LoadPart(d, v + t * H * V + c, left), hn::Load(d, w.u + t * W + c));
      HWY_UNROLL(16)
      for (int i = 0; i < t; ++i) x = hn::NegMulAdd(hn::Set(d, w.L[i * C + t]), u[i], x);
      u[t] = hn::Mul(hn::Set(d, beta[t * H]), x);
      VF y = hn::Load(d, w.o + t * W + c);
      HWY_UNROLL(16)
      for (int i = 0; i <= t; ++i) y = hn::MulAdd(hn::Set(d, w.P[i * C + t]), u[i], y);
      hn::Store(u[t], d, w.u + t * W + c);
      if (left > 0) StorePart(y, d, o + t * H * V + c, left);
    }
  }
}

// One head of one sequence of T tokens. S_in may be null (zeros), S_out may be null (not kept).
void ForwardHead(const KdaForward& a, int64_t start, int64_t T, int64_t h, const float* S_in, float* S_out,
                 float* scratch) {
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2);
  const Work w(K, V, scratch);
  const int64_t Kp = w.at.Kp;
  LoadState(w, S_in, K, V);
  for (int64_t t = start; t < start + T; t += C) {
    const int64_t n = std::min(C, start + T - t), at = (t * H + h) * K;
    Prepare(w, a.q.as<float>() + at, a.k.as<float>() + at, a.log_decay.as<float>() + at, n, H * K, K);
    Scores(w, n, K);
    for (int64_t v = 0; v < V; v += W) {
      float* panel = w.state + v * Kp;
      for (int64_t r = 0; r < n; r += kTile) {
        MeetState(w.decayed + r * Kp, Kp, K, panel, w.u + r * W);
        MeetState(w.decayed + (C + r) * Kp, Kp, K, panel, w.o + r * W);
      }
      Solve(w, n, a.v.as<float>() + (t * H + h) * V + v, a.beta.as<float>() + t * H + h,
            a.o.as<float>() + (t * H + h) * V + v, H, V, std::min(W, V - v));
      WriteState(w, n, panel);
    }
  }
  if (S_out) StoreState(w, S_out, K, V);
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(ForwardHead);
}  // namespace

// A task is one head of one sequence.
void kda_forward(Context& ctx, const KdaForward& a) {
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = a.packing.N();
  const int64_t size = KdaScratch(K, V).size;
  float* scratch =
      static_cast<float*>(workspace(ctx, kda_forward_workspace_bytes(ctx, a.q.dim(0), H, K, V), "kda_forward"));
  const auto head = HWY_DYNAMIC_DISPATCH(ForwardHead);
  ctx.pool->run(N * H, [&](int64_t task, int worker) {
    const FlushTiny flush;
    const int64_t n = task / H, h = task % H;
    const int64_t start = a.packing.start[n], T = a.packing.start[n + 1] - start;
    const int64_t in = a.slots.in[n], out = a.slots.out[n];
    if (T == 0 && (out < 0 || in == out)) return;
    float* pool = a.state.as<float>();
    head(a, start, T, h, in < 0 ? nullptr : pool + (in * H + h) * V * K,
         out < 0 ? nullptr : pool + (out * H + h) * V * K, scratch + worker * size);
  });
}

}  // namespace kda::cpu

namespace kda {

size_t kda_forward_workspace_bytes(const Context& ctx, int64_t, int64_t, int64_t K, int64_t V) {
  return size_t(ctx.pool->threads()) * size_t(cpu::KdaScratch(K, V).size) * sizeof(float);
}

}  // namespace kda
#endif
