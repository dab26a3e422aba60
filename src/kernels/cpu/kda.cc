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
constexpr int kTile = HWY_MAX_BYTES >= 64 ? 8 : 4;  // rows of a product held in registers, two vectors wide

struct Work {
  KdaScratch at;
  float *state, *decayed, *k, *q, *rest, *decay, *total, *row, *L, *P, *u, *o;

  Work(int64_t K, int64_t V, float* s)
      : at(K, V),
        state(s + at.state),
        decayed(s + at.decayed),
        k(s + at.k),
        q(s + at.q),
        rest(s + at.rest),
        decay(s + at.decay),
        total(s + at.total),
        row(s + at.row),
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

// Everything of a chunk of n tokens that does not touch the state. Rows of q, k, g are `stride` floats apart.
void Prepare(const Work& w, const float* q, const float* k, const float* g, int64_t n, int64_t stride, int64_t K) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  const VF scale = hn::Set(d, 1.0f / std::sqrt(float(K)));
  for (int64_t j = 0; j < K; j += N) {
    const int64_t left = K - j;
    VF passed = hn::Set(d, 1.0f), sum = hn::Zero(d);
    for (int64_t t = 0; t < n; ++t) {
      const VF gt = LoadPart(d, g + t * stride + j, left);
      const VF qt = hn::Mul(LoadPart(d, q + t * stride + j, left), scale), kt = LoadPart(d, k + t * stride + j, left);
      const VF one = Exp(d, gt);
      sum = hn::Add(sum, gt);
      passed = hn::Mul(passed, one);
      hn::Store(one, d, w.decay + t * Kp + j);
      hn::Store(kt, d, w.k + t * Kp + j);
      hn::Store(qt, d, w.q + t * Kp + j);
      hn::Store(hn::Mul(kt, passed), d, w.decayed + t * Kp + j);
      hn::Store(hn::Mul(qt, passed), d, w.decayed + (C + t) * Kp + j);
    }
    for (int64_t t = n; t < C; ++t) {
      hn::Store(hn::Zero(d), d, w.decayed + t * Kp + j);
      hn::Store(hn::Zero(d), d, w.decayed + (C + t) * Kp + j);
    }
    VF ahead = hn::Set(d, 1.0f);
    for (int64_t t = n - 1; t >= 0; --t) {
      hn::Store(hn::Mul(hn::Load(d, w.k + t * Kp + j), ahead), d, w.rest + t * Kp + j);
      ahead = hn::Mul(ahead, hn::Load(d, w.decay + t * Kp + j));
    }
    // The state outlives the chunk, so its factor comes from the sum: one rounding instead of n.
    hn::Store(Exp(d, sum), d, w.total + j);
  }
  for (int64_t j = round_up(K, N); j < Kp; j += N) {  // padding beyond the last vector used above
    hn::Store(hn::Zero(d), d, w.total + j);
    for (int64_t t = 0; t < n; ++t) hn::Store(hn::Zero(d), d, w.rest + t * Kp + j);
  }
}

// L[t,i] = sum_d k_t k_i D, P[t,i] = sum_d q_t k_i D, D the decay from after i up to and including t.
void Scores(const Work& w, int64_t n, int64_t K) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.at.Kp;
  std::fill_n(w.L, C * C, 0.0f);
  std::fill_n(w.P, C * C, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    VF own = hn::Zero(d);
    for (int64_t j = 0; j < K; j += N) {
      const VF ki = hn::Load(d, w.k + i * Kp + j);
      own = hn::MulAdd(ki, hn::Load(d, w.q + i * Kp + j), own);
      hn::Store(ki, d, w.row + j);
    }
    w.P[i * C + i] = Sum(d, own);
    for (int64_t t = i + 1; t < n; ++t) {
      VF kk = hn::Zero(d), qk = hn::Zero(d);
      for (int64_t j = 0; j < K; j += N) {
        const VF ki = hn::Mul(hn::Load(d, w.row + j), hn::Load(d, w.decay + t * Kp + j));
        hn::Store(ki, d, w.row + j);
        kk = hn::MulAdd(ki, hn::Load(d, w.k + t * Kp + j), kk);
        qk = hn::MulAdd(ki, hn::Load(d, w.q + t * Kp + j), qk);
      }
      w.L[t * C + i] = Sum(d, kk);
      w.P[t * C + i] = Sum(d, qk);
    }
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
//   u_t = beta_t (v_t - u_t - sum_{i<t} L[t,i] u_i)       o_t = o_t + sum_{i<=t} P[t,i] u_i
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
      for (int i = 0; i < t; ++i) x = hn::NegMulAdd(hn::Set(d, w.L[t * C + i]), u[i], x);
      u[t] = hn::Mul(hn::Set(d, beta[t * H]), x);
      VF y = hn::Load(d, w.o + t * W + c);
      HWY_UNROLL(16)
      for (int i = 0; i <= t; ++i) y = hn::MulAdd(hn::Set(d, w.P[t * C + i]), u[i], y);
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
