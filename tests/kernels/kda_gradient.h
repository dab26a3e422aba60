// tests/kernels/kda_gradient.h — the gradients of a KdaProblem: the kernel's and the reference's.
#pragma once
#include <string>
#include <vector>

#include "kernels/kda_backward.h"
#include "tests/kernels/kda_problem.h"
#include "tests/ref/kda_backward.h"

namespace kda::test {

// A gradient of the outputs and of the last states, drawn from a name.
struct KdaCotangent {
  std::vector<float> d_o, d_state;  // [T,H,V], [N,H,V,K]

  KdaCotangent(const std::string& name, const KdaProblem& p)
      : d_o(values(name + "/d_o", p.pack.T() * p.H * p.V)),
        d_state(values(name + "/d_state", p.pack.N() * p.H * p.V * p.K, 0.3f)) {}
};

struct KdaGradients {
  std::vector<float> q, k, v, g, beta, state;
  bool operator==(const KdaGradients&) const = default;
};

struct KdaBoth {
  KdaAnswer forward;
  KdaGradients d;
};

// Forward and back. An empty `d_state` passes none; kept memory starts as NaN.
inline KdaBoth run_backward(Context& ctx, const KdaProblem& p, const std::vector<float>& d_o,
                            const std::vector<float>& d_state, bool want_state = true) {
  const int64_t T = p.pack.T(), N = p.pack.N(), H = p.H, K = p.K, V = p.V;
  const int64_t size = kda_kept_floats(ctx, p.pack.packing(), H, K, V);
  EXPECT_GE(kda_kept_floats(ctx, T + 3, N + 1, H, K, V), size);
  Buffer q(ctx, p.q), k(ctx, p.k), v(ctx, p.v), g(ctx, p.g), beta(ctx, p.beta), state(ctx, p.state), o(ctx, T * H * V);
  Buffer kept(ctx, size), d_out(ctx, d_o), d_last(ctx, d_state);
  Buffer dq(ctx, T * H * K), dk(ctx, T * H * K), dv(ctx, T * H * V), dg(ctx, T * H * K), db(ctx, T * H),
      dS(ctx, N * H * V * K);
  const Shape thk{T, H, K}, thv{T, H, V}, states{N, H, V, K};
  kda_forward_keep(ctx, {.forward = {.q = q.view(thk),
                                     .k = k.view(thk),
                                     .v = v.view(thv),
                                     .log_decay = g.view(thk),
                                     .beta = beta.view({T, H}),
                                     .state = state.view({p.slots, H, V, K}),
                                     .slots = p.pack.slots(),
                                     .packing = p.pack.packing(),
                                     .o = o.view(thv)},
                         .kept = kept.view({size})});
  kda_backward(ctx, {.q = q.view(thk),
                     .k = k.view(thk),
                     .v = v.view(thv),
                     .log_decay = g.view(thk),
                     .beta = beta.view({T, H}),
                     .kept = kept.view({size}),
                     .packing = p.pack.packing(),
                     .d_o = d_out.view(thv),
                     .d_state_out = d_state.empty() ? View() : d_last.view(states),
                     .dq = dq.view(thk),
                     .dk = dk.view(thk),
                     .dv = dv.view(thv),
                     .d_log_decay = dg.view(thk),
                     .d_beta = db.view({T, H}),
                     .d_state_in = want_state ? dS.view(states) : View()});
  for (Buffer* b : {&o, &state, &kept, &dq, &dk, &dv, &dg, &db, &dS}) EXPECT_TRUE(b->guards_intact());
  return {{o.fetch(), state.fetch()},
          {dq.fetch(), dk.fetch(), dv.fetch(), dg.fetch(), db.fetch(), want_state ? dS.fetch() : std::vector<float>()}};
}

// Of the recurrence, in double.
inline ref::RecurrenceGradients reference_backward(const KdaProblem& p, const std::vector<float>& d_o,
                                                   const std::vector<float>& d_state) {
  const int64_t H = p.H, K = p.K, V = p.V, T = p.pack.T(), N = p.pack.N();
  ref::RecurrenceGradients all{Doubles(size_t(T * H * K)), Doubles(size_t(T * H * K)), Doubles(size_t(T * H * V)),
                               Doubles(size_t(T * H * K)), Doubles(size_t(T * H)),     Doubles(size_t(N * H * V * K))};
  for (int64_t n = 0; n < N; ++n)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t a = p.pack.start[size_t(n)], b = p.pack.start[size_t(n) + 1], in = p.pack.in[size_t(n)];
      const auto cut = [&](const std::vector<float>& x, int64_t D) { return ref::head(doubles(x), a, b, H, h, D); };
      Doubles S(size_t(V * K)), dS(size_t(V * K));
      if (in >= 0) std::copy_n(p.state.begin() + (in * H + h) * V * K, V * K, S.begin());
      if (!d_state.empty()) std::copy_n(d_state.begin() + (n * H + h) * V * K, V * K, dS.begin());
      const auto d = ref::recurrence_backward(cut(p.q, K), cut(p.k, K), cut(p.v, V), cut(p.g, K), cut(p.beta, 1), S,
                                              cut(d_o, V), dS, K, V);
      const auto put = [&](const Doubles& from, Doubles& to, int64_t D) {
        for (int64_t t = a; t < b; ++t) std::copy_n(from.begin() + (t - a) * D, D, to.begin() + (t * H + h) * D);
      };
      put(d.q, all.q, K), put(d.k, all.k, K), put(d.v, all.v, V), put(d.g, all.g, K), put(d.beta, all.beta, 1);
      std::copy_n(d.S.begin(), V * K, all.S.begin() + (n * H + h) * V * K);
    }
  return all;
}

// Twice the products of the forward pass in a row: each a few times 1e-6 at the most.
inline constexpr double kKdaGradientTolerance = 4e-6;

// The largest distance of a gradient from the reference, relative L2; says which where it is over the tolerance.
inline testing::AssertionResult gradients_follow(const KdaGradients& got, const ref::RecurrenceGradients& want) {
  const std::pair<const char*, double> errors[] = {
      {"q", relative_l2(got.q, want.q)},          {"k", relative_l2(got.k, want.k)},
      {"v", relative_l2(got.v, want.v)},          {"log_decay", relative_l2(got.g, want.g)},
      {"beta", relative_l2(got.beta, want.beta)}, {"state", relative_l2(got.state, want.S)}};
  for (const auto& [name, error] : errors)
    if (!(error <= kKdaGradientTolerance))
      return testing::AssertionFailure() << "d " << name << " is off by " << error << " relative L2";
  return testing::AssertionSuccess();
}

}  // namespace kda::test
