// tests/kernels/kda_problem.h — a pack of sequences for the KDA ops, the kernels' answer and the reference's.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "kernels/kda.h"
#include "tests/check.h"
#include "tests/ref/kda.h"

namespace kda::test {

using Doubles = std::vector<double>;
inline Doubles doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// Packed sequences with a slot each.
struct Pack {
  std::vector<int32_t> start{0}, in, out;

  explicit Pack(const std::vector<int64_t>& lengths) {
    for (int64_t n : lengths) {
      in.push_back(int32_t(in.size()));
      out.push_back(int32_t(out.size()));
      start.push_back(start.back() + int32_t(n));
    }
  }
  int64_t N() const { return int64_t(in.size()); }
  int64_t T() const { return start.back(); }
  Packing packing() const { return {start, start.data()}; }
  Slots slots() const { return {in.data(), out.data()}; }
};

// Which decays a problem has, per token and channel.
enum class Decay { ordinary, strong, weak, mixed };

struct KdaProblem {
  int64_t H, K, V, slots;
  Pack pack;
  std::vector<float> q, k, v, g, beta, state;

  KdaProblem(const std::string& name, const std::vector<int64_t>& lengths, int64_t H_, int64_t K_, int64_t V_,
             Decay decay = Decay::ordinary, int64_t slots_ = 0)
      : H(H_), K(K_), V(V_), slots(slots_ ? slots_ : int64_t(lengths.size())), pack(lengths) {
    const int64_t T = pack.T();
    q = unit(values(name + "/q", T * H * K));
    k = unit(values(name + "/k", T * H * K));
    v = values(name + "/v", T * H * V);
    g = values(name + "/g", T * H * K);
    beta = values(name + "/beta", T * H, 0.5f);
    state = values(name + "/state", slots * H * V * K, 0.3f);
    const auto pick = values(name + "/pick", T * H * K);
    for (float& b : beta) b += 0.5f;
    for (size_t i = 0; i < g.size(); ++i) {
      const float x = std::abs(g[i]);
      if (decay == Decay::ordinary) g[i] = -x;
      if (decay == Decay::strong) g[i] = -60 * x;
      if (decay == Decay::weak) g[i] = -1e-3f * x;
      if (decay == Decay::mixed) g[i] = pick[i] > 0.8f ? -150 * x : -0.01f * x;  // mild pairs behind strong decays
    }
  }

  std::vector<float> unit(const std::vector<float>& x) const {
    const auto y = ref::unit_rows(doubles(x), K);
    return {y.begin(), y.end()};
  }
};

struct KdaAnswer {
  std::vector<float> o, state;
  bool operator==(const KdaAnswer&) const = default;
};

inline KdaAnswer run_forward(Context& ctx, const KdaProblem& p) {
  const int64_t T = p.pack.T(), H = p.H, K = p.K, V = p.V;
  Buffer q(ctx, p.q), k(ctx, p.k), v(ctx, p.v), g(ctx, p.g), beta(ctx, p.beta), state(ctx, p.state), o(ctx, T * H * V);
  kda_forward(ctx, {.q = q.view({T, H, K}),
                    .k = k.view({T, H, K}),
                    .v = v.view({T, H, V}),
                    .log_decay = g.view({T, H, K}),
                    .beta = beta.view({T, H}),
                    .state = state.view({p.slots, H, V, K}),
                    .slots = p.pack.slots(),
                    .packing = p.pack.packing(),
                    .o = o.view({T, H, V})});
  EXPECT_TRUE(o.guards_intact() && state.guards_intact());
  return {o.fetch(), state.fetch()};
}

// The recurrence in double, through the slots.
inline std::pair<Doubles, Doubles> reference(const KdaProblem& p) {
  const int64_t H = p.H, K = p.K, V = p.V;
  Doubles o(size_t(p.pack.T() * H * V)), state = doubles(p.state);
  const Doubles before = state;
  for (int64_t n = 0; n < p.pack.N(); ++n)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t a = p.pack.start[size_t(n)], b = p.pack.start[size_t(n) + 1];
      const int64_t in = p.pack.in[size_t(n)], out = p.pack.out[size_t(n)];
      const auto cut = [&](const std::vector<float>& x, int64_t D) { return ref::head(doubles(x), a, b, H, h, D); };
      Doubles S(size_t(V * K));
      if (in >= 0) std::copy_n(before.begin() + (in * H + h) * V * K, V * K, S.begin());
      const auto on = ref::recurrence(cut(p.q, K), cut(p.k, K), cut(p.v, V), cut(p.g, K), cut(p.beta, 1), S, K, V);
      for (int64_t t = a; t < b; ++t) std::copy_n(on.begin() + (t - a) * V, V, o.begin() + (t * H + h) * V);
      if (out >= 0) std::copy_n(S.begin(), V * K, state.begin() + (out * H + h) * V * K);
    }
  return {o, state};
}

// Sums of up to a thousand terms of size <= 1, each with a handful of roundings: a few times 1e-6 at most, and relative
// to the whole vector far less.
inline constexpr double kKdaTolerance = 2e-6;

inline void expect_reference(const KdaProblem& p, const KdaAnswer& got, const std::string& what) {
  const auto [o, state] = reference(p);
  EXPECT_LE(relative_l2(got.o, o), kKdaTolerance) << what;
  EXPECT_LE(relative_l2(got.state, state), kKdaTolerance) << what;
  EXPECT_LE(relative_max(got.state, state), 2e-6) << what;
}

}  // namespace kda::test
