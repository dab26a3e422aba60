#include "kernels/kda_prep.h"

#include "tests/kernels/kda_problem.h"

using namespace kda;
using namespace kda::test;

namespace {

struct PrepProblem {
  int64_t T, H, K;
  KdaGateParams gate;
  std::vector<float> q, k, f, b, A, bias;

  PrepProblem(const std::string& name, int64_t T_, int64_t H_, int64_t K_, KdaGateParams gate_, float size)
      : T(T_), H(H_), K(K_), gate(gate_) {
    q = values(name + "/q", T * H * K, size);
    k = values(name + "/k", T * H * K);
    f = values(name + "/f", T * H * K, 40 * size);
    b = values(name + "/b", T * H, 60 * size);
    A = values(name + "/A", H, 2);
    bias = values(name + "/bias", H * K, 4);
  }
};

struct Prepared {
  std::vector<float> q, k, log_decay, beta;
  bool operator==(const Prepared&) const = default;
};

Prepared run(Context& ctx, const PrepProblem& p, bool in_place = false) {
  const Shape thk{p.T, p.H, p.K}, th{p.T, p.H};
  Buffer q(ctx, p.q), k(ctx, p.k), f(ctx, p.f), b(ctx, p.b), A(ctx, p.A), bias(ctx, p.bias);
  Buffer g(ctx, p.T * p.H * p.K), beta(ctx, p.T * p.H);
  Buffer other_q(ctx, p.T * p.H * p.K), other_k(ctx, p.T * p.H * p.K);
  Buffer &to = in_place ? f : g, &to_beta = in_place ? b : beta, &to_q = in_place ? q : other_q,
         &to_k = in_place ? k : other_k;
  kda_prep(ctx, {.q = q.view(thk),
                 .k = k.view(thk),
                 .f = f.view(thk),
                 .b = b.view(th),
                 .A_log = A.view({p.H}),
                 .dt_bias = bias.view({p.H * p.K}),
                 .gate = p.gate,
                 .log_decay = to.view(thk),
                 .beta = to_beta.view(th),
                 .unit_q = in_place ? View{} : to_q.view(thk),
                 .unit_k = in_place ? View{} : to_k.view(thk)});
  EXPECT_TRUE(to_q.guards_intact() && to_k.guards_intact() && to.guards_intact() && to_beta.guards_intact());
  if (!in_place) {
    EXPECT_TRUE(q.fetch() == p.q && k.fetch() == p.k);
  }
  return {to_q.fetch(), to_k.fetch(), to.fetch(), to_beta.fetch()};
}

// Relative to each value's own size, in units of float32's epsilon; what is below 1e-37 counts as zero.
double worst_units(const std::vector<float>& got, const Doubles& want) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(got[i] - want[i]) / (1.19e-7 * (std::abs(want[i]) + 1e-37)));
  return worst;
}

TEST(KdaPrep, FollowsTheReference) {
  CpuContext ctx;
  const KdaGateParams gates[] = {
      {}, {.beta_scale = 2}, {.kind = KdaGate::bounded}, {.kind = KdaGate::bounded, .lower_bound = -0.5f}};
  for (const int64_t T : {0, 1, 5, 9})
    for (const int64_t K : {1, 12, 16, 33, 128})
      for (const auto& gate : gates)
        for (const float size : {1.0f, 1e-3f, 0.0f}) {
          const std::string what = cat("prep/T", T, "_K", K, "_gate", int(gate.kind), gate.lower_bound, "_size", size);
          const PrepProblem p(what, T, 3, K, gate, size);
          const auto got = run(ctx, p);
          const double root = std::sqrt(double(K)) + 4;
          EXPECT_TRUE(close(got.q, ref::unit_rows(doubles(p.q), K), 1.2e-7 * root, 1)) << what;
          EXPECT_TRUE(close(got.k, ref::unit_rows(doubles(p.k), K), 1.2e-7 * root, 1)) << what;
          const auto g = ref::log_decay(doubles(p.f), doubles(p.A), doubles(p.bias), 3, K,
                                        gate.kind == KdaGate::softplus ? 0 : double(gate.lower_bound));
          // z is rounded once; where e^z is all there is, that shows |z| times enlarged, |z| <= 44.
          if (gate.kind == KdaGate::softplus) EXPECT_LE(worst_units(got.log_decay, g), 30) << what;
          // Here the error is at most x e^-x units at an argument x, and a decay's exponent counts by its own size.
          else
            EXPECT_TRUE(close(got.log_decay, g, 4 * 1.2e-7, std::abs(gate.lower_bound))) << what;
          EXPECT_LE(worst_units(got.beta, ref::beta(doubles(p.b), gate.beta_scale)), 4) << what;
          EXPECT_EQ(run(ctx, p, true), got) << what;
        }
}

TEST(KdaPrep, IsTheSameForAnyNumberOfThreads) {
  const PrepProblem p("prep/threads", 21, 3, 20, {}, 1);
  CpuContext one(1), two(2), three(3);
  const auto want = run(one, p);
  EXPECT_EQ(run(two, p), want);
  EXPECT_EQ(run(three, p), want);
}

TEST(KdaPrep, ExtremeLogitsStayFiniteAndNaNStays) {
  CpuContext ctx;
  for (const KdaGate kind : {KdaGate::softplus, KdaGate::bounded}) {
    PrepProblem p("prep/extreme", 2, 1, 16, {.kind = kind}, 1);
    for (size_t i = 0; i < p.f.size(); ++i) p.f[i] = i % 2 ? 1e4f : -1e4f;
    p.b = {1e4f, -1e4f};
    auto got = run(ctx, p);
    for (float g : got.log_decay) EXPECT_TRUE(std::isfinite(g) && g <= 0);
    EXPECT_EQ(got.beta, (std::vector<float>{1, 0}));
    p.f[3] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(run(ctx, p).log_decay[3]));
  }
}

TEST(KdaPrep, SabotageIsNoticed) {
  CpuContext ctx;
  const PrepProblem p("prep/sabotage", 3, 2, 20, {}, 1);
  auto got = run(ctx, p);
  const auto g = ref::log_decay(doubles(p.f), doubles(p.A), doubles(p.bias), 2, 20, 0);
  got.log_decay[7] *= 1 + 1e-5f;
  got.q[5] += 1e-5f;
  EXPECT_GT(worst_units(got.log_decay, g), 30);
  EXPECT_FALSE(close(got.q, ref::unit_rows(doubles(p.q), 20), 1.2e-6, 1));
}

TEST(KdaPrep, TheDoorRefuses) {
  CpuContext ctx;
  Buffer x(ctx, 24), b(ctx, 4), A(ctx, 2), bias(ctx, 12);
  const auto refused = [&](auto change) {
    KdaPrep a{.q = x.view({2, 2, 6}),
              .k = x.view({2, 2, 6}),
              .f = x.view({2, 2, 6}),
              .b = b.view({2, 2}),
              .A_log = A.view({2}),
              .dt_bias = bias.view({12}),
              .gate = {},
              .log_decay = x.view({2, 2, 6}),
              .beta = b.view({2, 2})};
    change(a);
    try {
      kda_prep(ctx, a);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused([](auto&) {}), "accepted");
  EXPECT_EQ(refused([](auto& a) { a.dt_bias.shape = {6}; }), "kda_prep: dt_bias must be [12], got [6]");
  EXPECT_EQ(refused([](auto& a) { a.A_log.dtype = Dtype::bf16; }), "kda_prep: A_log must be f32, got bf16");
  EXPECT_EQ(refused([](auto& a) { a.gate = {.kind = KdaGate::bounded, .lower_bound = -6}; }),
            "kda_prep: lower_bound must be in [-5,0), got -6");
  EXPECT_EQ(refused([](auto& a) { a.gate.beta_scale = 3; }), "kda_prep: beta_scale must be in (0,2], got 3");
}

}  // namespace
