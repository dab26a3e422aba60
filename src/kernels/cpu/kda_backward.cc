// kernels/cpu/kda_backward.cc — kda_backward in the chunks of kda_forward; docs/KDA.md has the formulas.
//
// Spans of four chunks from the last to the first: the states at their chunks' starts are made again from the kept one,
// then the chunks follow backwards. States lie in panels [V,32 key channels] here; the gradient of the state is needed
// the other way round as well, and is turned once a chunk. No gradient is a difference of sums over tokens: a decay
// gathers exactly the pairs that it stands between (kda_pairs-inl.h).
#include "kernels/kda_backward.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/kda_scratch.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_backward.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_chunk-inl.h"
#include "kernels/cpu/kda_pairs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

struct Back {
  KdaBackwardScratch at;
  float *s, *d_state, *d_state_t, *d_rows, *u_t, *scores, *out, *sums;

  Back(int64_t K, int64_t V, float* scratch)
      : at(K, V),
        s(scratch),
        d_state(s + at.d_state),
        d_state_t(s + at.d_state_t),
        d_rows(s + at.d_rows),
        u_t(s + at.u_t),
        scores(s + at.scores),
        out(s + at.out),
        sums(s + at.sums) {}
  Rows rows(int64_t c) const {
    float* p = s + at.rows + c * at.rows_size;
    const int64_t n = C * at.Kp;
    return {at.Kp, p, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n, p + 6 * n};
  }
  float* state(int64_t c) const { return s + at.states + c * at.Kp * at.Vp; }
  float* u(int64_t c) const { return s + at.u + c * C * at.Vp; }
};

// to[v,:] = from[v,:] * total + sum_r m[r,v] keys[r,:] for every v, in panels of 32 key channels; to may be from.
HWY_INLINE void WritePanels(const Back& b, const float* from, const float* total, const float* m, const float* keys,
                            int64_t count, float* to) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = b.at.Kp, Vp = b.at.Vp;
  for (int64_t p = 0; p < Kp; p += W)
    for (int64_t v = 0; v < Vp; v += kTile)
      for (int64_t c = 0; c < W; c += 2 * N) {
        const int64_t at = p * Vp + v * W + c;
        const VF e = hn::Load(d, total + p + c), f = hn::Load(d, total + p + c + N);
        VF x[kTile], y[kTile];
        for (int r = 0; r < kTile; ++r) {
          x[r] = hn::Mul(e, hn::Load(d, from + at + r * W));
          y[r] = hn::Mul(f, hn::Load(d, from + at + r * W + N));
        }
        for (int64_t t = 0; t < count; ++t) {
          const VF k = hn::Load(d, keys + t * Kp + p + c), l = hn::Load(d, keys + t * Kp + p + c + N);
          const float* g = m + t * Vp + v;
          HWY_UNROLL(8)
          for (int r = 0; r < kTile; ++r) {
            x[r] = hn::MulAdd(hn::Set(d, g[r]), k, x[r]);
            y[r] = hn::MulAdd(hn::Set(d, g[r]), l, y[r]);
          }
        }
        for (int r = 0; r < kTile; ++r) {
          hn::Store(x[r], d, to + at + r * W);
          hn::Store(y[r], d, to + at + r * W + N);
        }
      }
}

// Back through the solve for 32 value channels. In: out = what the written keys get from the state after the chunk.
//   du_t = out_t + sum_{j>=t} P[t,j] d_o_j - sum_{j>t} L[t,j] dx_j      dx_t = dv_t = beta_t du_t
// and sums[t,:] += du_t x_t, the gradient of beta_t.
HWY_INLINE void SolveBack(const Back& b, int64_t n, const float* L, const float* P, const float* x, const float* beta,
                          const float* d_o, float* dv, int64_t H, int64_t V, int64_t v) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Vp = b.at.Vp;
  for (int64_t c = 0; c < W; c += N) {
    const int64_t left = std::max<int64_t>(0, V - v - c);
    float *own = b.d_rows + v + c, *outer = own + C * Vp;
    VF minus[C];
    HWY_UNROLL(16)
    for (int t = C - 1; t >= 0; --t) {
      minus[t] = hn::Zero(d);
      if (t >= n) continue;
      const VF dot = LoadPart(d, d_o + t * H * V + c, left);
      hn::Store(dot, d, outer + t * Vp);
      VF read = hn::MulAdd(hn::Set(d, P[t * C + t]), dot, hn::Load(d, b.out + t * W + c)), later = hn::Zero(d);
      HWY_UNROLL(16)
      for (int j = C - 1; j > t; --j) {  // what is known last comes last
        read = hn::MulAdd(hn::Set(d, P[t * C + j]), hn::Load(d, outer + j * Vp), read);
        later = hn::MulAdd(hn::Set(d, L[t * C + j]), minus[j], later);
      }
      const VF du = hn::Add(read, later);
      hn::Store(hn::MulAdd(du, hn::LoadU(d, x + t * Vp + c), hn::Load(d, b.sums + t * N)), d, b.sums + t * N);
      const VF dx = hn::Mul(hn::Set(d, beta[t * H]), du);
      minus[t] = hn::Neg(dx);
      hn::Store(minus[t], d, own + t * Vp);
      if (left > 0) StorePart(dx, d, dv + t * H * V + c, left);
    }
  }
}

// scores[r,i] = sum_v d_rows[r,v] u[i,v]: dL in the first 16 rows, dP in the others.
HWY_INLINE void ScoreGradients(const Back& b, const float* u) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Vp = b.at.Vp;
  for (int64_t v = 0; v < Vp; v += C) Transpose16(u + v, Vp, b.u_t + v * C, C);
  for (int64_t r0 = 0; r0 < 2 * C; r0 += 8)
    for (int64_t c = 0; c < C; c += N) {
      VF a[8];
      for (int r = 0; r < 8; ++r) a[r] = hn::Zero(d);
      for (int64_t v = 0; v < Vp; ++v) {
        const VF x = hn::Load(d, b.u_t + v * C + c);
        HWY_UNROLL(8)
        for (int r = 0; r < 8; ++r) a[r] = hn::MulAdd(hn::Set(d, b.d_rows[(r0 + r) * Vp + v]), x, a[r]);
      }
      for (int r = 0; r < 8; ++r) hn::Store(a[r], d, b.scores + (r0 + r) * C + c);
    }
}

// sum_v a[v,:] b[v,:] of N of a panel's columns
HWY_INLINE VF ColumnProduct(const float* x, const float* y, int64_t Vp) {
  const F32 d;
  VF sum0 = hn::Zero(d), sum1 = hn::Zero(d);
  for (int64_t v = 0; v < Vp; v += 2) {
    sum0 = hn::MulAdd(hn::Load(d, x + v * W), hn::Load(d, y + v * W), sum0);
    sum1 = hn::MulAdd(hn::Load(d, x + (v + 1) * W), hn::Load(d, y + (v + 1) * W), sum1);
  }
  return hn::Add(sum0, sum1);
}

// Chunk c of the span whose first token is t0; n tokens.
HWY_INLINE void BackwardChunk(const KdaBackward& a, const Back& b, int64_t c, int64_t t0, int64_t n, int64_t h,
                              const float* kept) {
  const F32 d;
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = int64_t(hn::Lanes(d));
  const int64_t Kp = b.at.Kp, Vp = b.at.Vp, th = t0 * H + h;
  const Rows w = b.rows(c);
  const float *L = kept + KdaKept::L, *P = kept + KdaKept::P;
  if (n < C) {  // what lies beyond n was never written
    float *l = b.s + b.at.L, *p = b.s + b.at.P;
    for (int64_t i = 0; i < C; ++i)
      for (int64_t t = i; t < C; ++t) {
        l[i * C + t] = t > i && t < n ? L[i * C + t] : 0;
        p[i * C + t] = t < n ? P[i * C + t] : 0;
      }
    L = l, P = p;
  }
  std::fill_n(b.sums, C * N, 0.0f);
  Ask<true>(a.dv.as<float>() + th * V, n, H * V, V);
  for (int64_t v = 0; v < V; v += W) {
    for (int64_t r = 0; r < C; r += kTile) MeetState(w.rest + r * Kp, Kp, K, b.d_state_t + v * Kp, b.out + r * W);
    SolveBack(b, n, L, P, kept + KdaKept::x + v, a.beta.as<float>() + th, a.d_o.as<float>() + th * V + v,
              a.dv.as<float>() + th * V + v, H, V, v);
  }
  float* d_beta = b.sums + C * C;
  SumRows(b.sums, d_beta);
  for (int64_t t = 0; t < n; ++t) a.d_beta.as<float>()[th + t * H] = d_beta[t];

  Ask<true>(a.dq.as<float>() + th * K, n, H * K, K);
  ScoreGradients(b, b.u(c));
  Ask<true>(a.dk.as<float>() + th * K, n, H * K, K);
  for (int64_t p = 0; p < K; p += W) {
    const float *S = b.state(c) + p * Vp, *dS = b.d_state + p * Vp;
    for (int64_t r = 0; r < 2 * C; r += kTile) MeetState(b.d_rows + r * Vp, Vp, V, S, b.out + r * W);
    if (p == 0) Ask<true>(a.d_log_decay.as<float>() + th * K, n, H * K, K);
    for (int64_t r = 0; r < C; r += kTile) MeetState(b.u(c) + r * Vp, Vp, V, dS, b.out + (2 * C + r) * W);
    for (int64_t j = 0; j < W && p + j < K; j += N) {
      const VF whole = hn::Mul(hn::Load(d, w.total + p + j), ColumnProduct(S + j, dS + j, Vp));
      const int64_t to = th * K + p + j;
      PairGradients(w, p + j, n, b.out + j, b.scores, whole, a.dq.as<float>() + to, a.dk.as<float>() + to,
                    a.d_log_decay.as<float>() + to, H * K, K, K - p - j);
    }
  }
  WritePanels(b, b.d_state, w.total, b.d_rows, w.decayed, 2 * C, b.d_state);
  TransposePanels(b.d_state, Kp, Vp, b.d_state_t, Kp);
}

// The panels of one state from [V,K], or zeros; and back.
HWY_INLINE void LoadPanels(const Back& b, const float* S, int64_t K, int64_t V) {
  for (int64_t v = 0; S && v < V; ++v)
    for (int64_t k = 0; k < K; k += W) std::copy_n(S + v * K + k, std::min(W, K - k), b.d_state + k * b.at.Vp + v * W);
  TransposePanels(b.d_state, b.at.Kp, b.at.Vp, b.d_state_t, b.at.Kp);
}

HWY_INLINE void StorePanels(const Back& b, float* S, int64_t K, int64_t V) {
  for (int64_t v = 0; v < V; ++v)
    for (int64_t k = 0; k < K; k += W) std::copy_n(b.d_state + k * b.at.Vp + v * W, std::min(W, K - k), S + v * K + k);
}

// One head of one sequence of T tokens. dS_out may be null (zeros), dS_in may be null (not wanted).
void BackwardHead(const KdaBackward& a, int64_t start, int64_t T, int64_t h, const float* dS_out, float* dS_in,
                  const KdaKeptHead<const float>& kept, float* scratch) {
  const F32 d;
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = int64_t(hn::Lanes(d));
  const Back b(K, V, scratch);
  const int64_t Vp = b.at.Vp, chunks = (T + C - 1) / C;
  std::fill_n(scratch, b.at.size,
              0.0f);  // padding stays zero; the rows that the last chunk lacks are used before others
  LoadPanels(b, dS_out, K, V);
  for (int64_t span = (chunks - 1) / kKdaSpan; chunks > 0 && span >= 0; --span) {
    const int64_t first = span * kKdaSpan, count = std::min(kKdaSpan, chunks - first);
    const auto tokens = [&](int64_t c) { return std::min(C, T - (first + c) * C); };
    std::copy_n(kept.state(span), b.at.Kp * Vp, b.state(0));
    for (int64_t c = 0; c < count; ++c) {
      const int64_t t0 = start + (first + c) * C, n = tokens(c), th = t0 * H + h;
      const Rows w = b.rows(c);
      Prepare(w, a.q.as<float>() + th * K, a.k.as<float>() + th * K, a.log_decay.as<float>() + th * K, n, H * K, K);
      const float *x = kept.chunk(first + c) + KdaKept::x, *beta = a.beta.as<float>() + th;
      for (int64_t t = 0; t < n; ++t)
        for (int64_t v = 0; v < Vp; v += N)
          hn::Store(hn::Mul(hn::Set(d, beta[t * H]), hn::LoadU(d, x + t * Vp + v)), d, b.u(c) + t * Vp + v);
      if (c + 1 < count) WritePanels(b, b.state(c), w.total, b.u(c), w.rest, C, b.state(c + 1));
    }
    for (int64_t c = count - 1; c >= 0; --c) {
      const int64_t th = (start + (first + c) * C) * H + h, next = th - C * H, back = th - kKdaSpan * C * H;
      if (first + c > 0) Ask(a.d_o.as<float>() + next * V, C, H * V, V);
      if (span > 0) {  // of the span before, in whose turn they are read all at once
        Ask(a.q.as<float>() + back * K, C, H * K, K);
        Ask(a.k.as<float>() + back * K, C, H * K, K);
        Ask(a.log_decay.as<float>() + back * K, C, H * K, K);
      }
      BackwardChunk(a, b, c, start + (first + c) * C, tokens(c), h, kept.chunk(first + c));
    }
  }
  if (dS_in) StorePanels(b, dS_in, K, V);
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(BackwardHead);
}  // namespace

// A task is one head of one sequence.
void kda_backward(Context& ctx, const KdaBackward& a) {
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = a.packing.N();
  const int64_t size = KdaBackwardScratch(K, V).size;
  float* scratch = static_cast<float*>(workspace(ctx, kda_backward_workspace_bytes(ctx, T, H, K, V), "kda_backward"));
  const auto head = HWY_DYNAMIC_DISPATCH(BackwardHead);
  ctx.pool->run(N * H, [&](int64_t task, int worker) {
    const FlushTiny flush;
    const int64_t n = task / H, h = task % H, state = task * V * K;
    const int64_t start = a.packing.start[n], length = a.packing.start[n + 1] - start;
    const float* dS_out = a.d_state_out.data ? a.d_state_out.as<float>() + state : nullptr;
    float* dS_in = a.d_state_in.data ? a.d_state_in.as<float>() + state : nullptr;
    head(a, start, length, h, dS_out, dS_in, KdaKept(K, V).head(a.kept.as<float>(), T, N, H, start, n, h),
         scratch + worker * size);
  });
}

}  // namespace kda::cpu

namespace kda {

size_t kda_backward_workspace_bytes(const Context& ctx, int64_t, int64_t, int64_t K, int64_t V) {
  return size_t(ctx.pool->threads()) * size_t(cpu::KdaBackwardScratch(K, V).size) * sizeof(float);
}

}  // namespace kda
#endif
