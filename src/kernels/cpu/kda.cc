// kernels/cpu/kda.cc — kda_forward and kda_forward_keep in chunks of 16 tokens; docs/KDA.md has the formulas.
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
#include "kernels/kda_backward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

struct Work : Rows {
  KdaScratch at;
  float *state, *sums, *L, *P, *u, *o;

  Work(int64_t K, int64_t V, float* s)
      : at(K, V), state(s + at.state), sums(s + at.sums), L(s + at.L), P(s + at.P), u(s + at.u), o(s + at.o) {
    Rows::operator=({at.Kp, s + at.decayed, s + at.k, s + at.q, s + at.rest, s + at.decay, s + at.total});
  }
};

// The pool's [V,K] to panels [K,32], and back. Padding is zero and stays so.
void LoadState(const Work& w, const float* S, int64_t K, int64_t V) {
  const int64_t Kp = w.Kp;
  if (!S || K < Kp || V < w.at.Vp) std::fill_n(w.state, Kp * w.at.Vp, 0.0f);
  if (!S) return;
  for (int64_t v0 = 0; v0 < V; v0 += 16)
    for (int64_t d = 0; d < K; ++d) {
      float* to = w.state + (v0 / W * Kp + d) * W + v0 % W;
      for (int64_t v = v0; v < std::min(V, v0 + 16); ++v) to[v - v0] = S[v * K + d];
    }
}

void StoreState(const Work& w, float* S, int64_t K, int64_t V) {
  const int64_t Kp = w.Kp;
  for (int64_t v0 = 0; v0 < V; v0 += 16)
    for (int64_t d = 0; d < K; ++d) {
      const float* from = w.state + (v0 / W * Kp + d) * W + v0 % W;
      for (int64_t v = v0; v < std::min(V, v0 + 16); ++v) S[v * K + d] = from[v - v0];
    }
}

// panel[d,:] = panel[d,:] * total[d] + sum_t rest[t,d] u[t,:]
HWY_INLINE void WriteState(const Work& w, int64_t n, float* panel) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.Kp;
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

// In: u = what the state answers to the keys, o = what it answers to the queries. Out: u as written, o complete, and
// x [C,Vp] unless null.
//   x_t = v_t - u_t - sum_{i<t} L[i,t] u_i       u_t = beta_t x_t       o_t = o_t + sum_{i<=t} P[i,t] u_i
HWY_INLINE void Solve(const Work& w, int64_t n, const float* v, const float* beta, float* o, int64_t H, int64_t V,
                      int64_t width, float* x_kept) {
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
      if (x_kept) hn::StoreU(x, d, x_kept + t * w.at.Vp + c);
      u[t] = hn::Mul(hn::Set(d, beta[t * H]), x);
      VF y = hn::Load(d, w.o + t * W + c);
      HWY_UNROLL(16)
      for (int i = 0; i <= t; ++i) y = hn::MulAdd(hn::Set(d, w.P[i * C + t]), u[i], y);
      hn::Store(u[t], d, w.u + t * W + c);
      if (left > 0) StorePart(y, d, o + t * H * V + c, left);
    }
  }
}

// The state, in panels [K,32], to panels [V,32 key channels] of its own padding.
void KeepState(const Work& w, int64_t K, int64_t V, float* to) {
  const KdaKept kept(K, V);
  if (w.Kp < kept.Kp) std::fill_n(to, kept.state(), 0.0f);
  TransposePanels(w.state, w.at.Vp, w.Kp, to, kept.Vp);
}

// One head of one sequence of T tokens. S_in may be null (zeros), S_out may be null (not kept), `keep` has null
// pointers where nothing is kept for a backward pass.
void ForwardHead(const KdaForward& a, int64_t start, int64_t T, int64_t h, const float* S_in, float* S_out,
                 const KdaKeptHead<float>& keep, float* scratch) {
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2);
  const Work w(K, V, scratch);
  const int64_t Kp = w.Kp;
  LoadState(w, S_in, K, V);
  for (int64_t t = start; t < start + T; t += C) {
    const int64_t n = std::min(C, start + T - t), at = (t * H + h) * K;
    Prepare(w, a.q.as<float>() + at, a.k.as<float>() + at, a.log_decay.as<float>() + at, n, H * K, K);
    Scores(w, n, K, w.sums, w.L, w.P);
    float* chunk = keep.chunks ? keep.chunk((t - start) / C) : nullptr;
    if (chunk) {
      if ((t - start) % (kKdaSpan * C) == 0) KeepState(w, K, V, keep.state((t - start) / (kKdaSpan * C)));
      std::copy_n(w.L, C * C, chunk + KdaKept::L);
      std::copy_n(w.P, C * C, chunk + KdaKept::P);
    }
    if (const int64_t more = std::min(C, start + T - t - C); more > 0) {
      const int64_t next = (t + C) * H + h;
      Ask(a.q.as<float>() + next * K, more, H * K, K);
      Ask(a.k.as<float>() + next * K, more, H * K, K);
      Ask(a.log_decay.as<float>() + next * K, more, H * K, K);
      Ask(a.v.as<float>() + next * V, more, H * V, V);
    }
    for (int64_t v = 0; v < V; v += W) {
      float* panel = w.state + v * Kp;
      for (int64_t r = 0; r < n; r += kTile) {
        MeetState(w.decayed + r * Kp, Kp, K, panel, w.u + r * W);
        MeetState(w.decayed + (C + r) * Kp, Kp, K, panel, w.o + r * W);
      }
      Solve(w, n, a.v.as<float>() + (t * H + h) * V + v, a.beta.as<float>() + t * H + h,
            a.o.as<float>() + (t * H + h) * V + v, H, V, std::min(W, V - v), chunk ? chunk + KdaKept::x + v : nullptr);
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

// A task is one head of one sequence.
void run_forward(Context& ctx, const KdaForward& a, float* kept, size_t workspace_bytes, const char* op) {
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = a.packing.N();
  const int64_t size = KdaScratch(K, V).size;
  float* scratch = static_cast<float*>(workspace(ctx, workspace_bytes, op));
  const auto head = HWY_DYNAMIC_DISPATCH(ForwardHead);
  ctx.pool->run(N * H, [&](int64_t task, int worker) {
    const FlushTiny flush;
    const int64_t n = task / H, h = task % H;
    const int64_t start = a.packing.start[n], T = a.packing.start[n + 1] - start;
    const int64_t in = a.slots.in[n], out = a.slots.out[n];
    if (T == 0 && (out < 0 || in == out)) return;
    float* pool = a.state.as<float>();
    head(a, start, T, h, in < 0 ? nullptr : pool + (in * H + h) * V * K,
         out < 0 ? nullptr : pool + (out * H + h) * V * K, KdaKept(K, V).head(kept, a.q.dim(0), N, H, start, n, h),
         scratch + worker * size);
  });
}
}  // namespace

void kda_forward(Context& ctx, const KdaForward& a) {
  const size_t bytes = kda_forward_workspace_bytes(ctx, a.q.dim(0), a.q.dim(1), a.q.dim(2), a.v.dim(2));
  run_forward(ctx, a, nullptr, bytes, "kda_forward");
}

void kda_forward_keep(Context& ctx, const KdaForwardKeep& k) {
  const KdaForward& a = k.forward;
  const size_t bytes = kda_forward_keep_workspace_bytes(ctx, a.q.dim(0), a.q.dim(1), a.q.dim(2), a.v.dim(2));
  run_forward(ctx, a, k.kept.as<float>(), bytes, "kda_forward_keep");
}

}  // namespace kda::cpu

namespace kda {

size_t kda_forward_workspace_bytes(const Context& ctx, int64_t, int64_t, int64_t K, int64_t V) {
  return size_t(ctx.pool->threads()) * size_t(cpu::KdaScratch(K, V).size) * sizeof(float);
}

size_t kda_forward_keep_workspace_bytes(const Context& ctx, int64_t T, int64_t H, int64_t K, int64_t V) {
  return kda_forward_workspace_bytes(ctx, T, H, K, V);
}

int64_t kda_kept_floats(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V) {
  return cpu::KdaKept(K, V).floats(T, N, H);
}

int64_t kda_kept_floats(const Context& ctx, const Packing& p, int64_t H, int64_t K, int64_t V) {
  return kda_kept_floats(ctx, p.T(), p.N(), H, K, V);
}

}  // namespace kda
#endif
