// The gradients of kda_prep and kda_output, against the complex step.
#include "kernels/kda_backward.h"

#include "tests/kernels/kda_problem.h"
#include "tests/ref/kda_backward.h"

using namespace kda;
using namespace kda::test;

namespace {

struct PrepProblem {
  int64_t T, H, K;
  KdaGateParams gate;
  std::vector<float> q, k, f, b, A, bias, dq, dk, dg, dbeta, dA, d_bias;  // dA, d_bias: what is there before

  PrepProblem(const std::string& name, int64_t T_, int64_t H_, int64_t K_, KdaGateParams gate_ = {}, float size = 1)
      : T(T_), H(H_), K(K_), gate(gate_) {
    const int64_t n = T * H * K;
    q = values(name + "/q", n, size), k = values(name + "/k", n);
    f = values(name + "/f", n, 20 * size), b = values(name + "/b", T * H, 30 * size);
    A = values(name + "/A", H, 2), bias = values(name + "/bias", H * K, 4);
    dq = values(name + "/dq", n), dk = values(name + "/dk", n), dg = values(name + "/dg", n);
    dbeta = values(name + "/dbeta", T * H), dA = values(name + "/dA", H), d_bias = values(name + "/d_bias", H * K);
  }
};

struct PrepGradients {
  std::vector<float> q, k, f, b, A, bias;
  bool operator==(const PrepGradients&) const = default;
};

PrepGradients run(Context& ctx, const PrepProblem& p, bool want_sums = true) {
  const Shape thk{p.T, p.H, p.K}, th{p.T, p.H};
  Buffer q(ctx, p.q), k(ctx, p.k), f(ctx, p.f), b(ctx, p.b), A(ctx, p.A), bias(ctx, p.bias);
  Buffer dq(ctx, p.dq), dk(ctx, p.dk), df(ctx, p.dg), db(ctx, p.dbeta), dA(ctx, p.dA), d_bias(ctx, p.d_bias);
  kda_prep_backward(ctx, {.q = q.view(thk),
                          .k = k.view(thk),
                          .f = f.view(thk),
                          .b = b.view(th),
                          .A_log = A.view({p.H}),
                          .dt_bias = bias.view({p.H * p.K}),
                          .gate = p.gate,
                          .dq = dq.view(thk),
                          .dk = dk.view(thk),
                          .df = df.view(thk),
                          .db = db.view(th),
                          .dA_log = want_sums ? dA.view({p.H}) : View(),
                          .d_dt_bias = want_sums ? d_bias.view({p.H * p.K}) : View()});
  for (Buffer* x : {&dq, &dk, &df, &db, &dA, &d_bias}) EXPECT_TRUE(x->guards_intact());
  return {dq.fetch(), dk.fetch(), df.fetch(), db.fetch(), dA.fetch(), d_bias.fetch()};
}

struct PrepReference {
  Doubles q, k, f, b, A, bias;
};

PrepReference reference_prep(const PrepProblem& p) {
  PrepReference r;
  const double lower = p.gate.kind == KdaGate::softplus ? 0 : double(p.gate.lower_bound);
  r.A = doubles(p.dA), r.bias = doubles(p.d_bias);
  const auto row = [&](const std::vector<float>& x, size_t i) {
    return Doubles(x.begin() + int64_t(i), x.begin() + int64_t(i) + p.K);
  };
  for (size_t i = 0; i < p.q.size(); i += size_t(p.K)) {  // a row at a time
    const auto unit = [&](const std::vector<float>& x, const std::vector<float>& dy, Doubles& to) {
      const Doubles weight = row(dy, i);
      const auto g = ref::complex_step(
          [&](const ref::Complexes& c) { return ref::weighted(weight, ref::unit_rows(c, p.K)); }, row(x, i));
      to.insert(to.end(), g.begin(), g.end());
    };
    unit(p.q, p.dq, r.q), unit(p.k, p.dk, r.k);
    const size_t h = i / size_t(p.K) % size_t(p.H);
    Doubles all = row(p.f, i);
    for (double x : row(p.bias, h * size_t(p.K))) all.push_back(x);
    all.push_back(p.A[h]);
    const Doubles weight = row(p.dg, i);
    const auto g = ref::complex_step(
        [&](const ref::Complexes& c) {
          const ref::Complexes f(c.begin(), c.begin() + p.K), bias(c.begin() + p.K, c.end() - 1), A{c.back()};
          return ref::weighted(weight, ref::log_decay(f, A, bias, 1, p.K, lower));
        },
        all);
    r.f.insert(r.f.end(), g.begin(), g.begin() + p.K);
    for (size_t d = 0; d < size_t(p.K); ++d) r.bias[h * size_t(p.K) + d] += g[size_t(p.K) + d];
    r.A[h] += g.back();
  }
  for (size_t i = 0; i < p.b.size(); ++i)
    r.b.push_back(ref::complex_step(
        [&](const ref::Complexes& c) { return double(p.dbeta[i]) * ref::beta(c, p.gate.beta_scale)[0]; }, {p.b[i]})[0]);
  return r;
}

// Each gradient of a token within a few roundings of its row, the sums within those of the terms in them.
testing::AssertionResult follows(const PrepProblem& p, const PrepGradients& got) {
  const auto want = reference_prep(p);
  const std::pair<const char*, double> errors[] = {
      {"q", relative_l2(got.q, want.q)},     {"k", relative_l2(got.k, want.k)},
      {"f", relative_l2(got.f, want.f)},     {"b", relative_l2(got.b, want.b)},
      {"A_log", relative_l2(got.A, want.A)}, {"dt_bias", relative_l2(got.bias, want.bias)}};
  for (const auto& [name, error] : errors)
    if (!(error <= 2e-6)) return testing::AssertionFailure() << "d " << name << " is off by " << error;
  return testing::AssertionSuccess();
}

TEST(KdaPrepBackward, FollowsTheComplexStep) {
  CpuContext ctx;
  const KdaGateParams gates[] = {
      {}, {.beta_scale = 2}, {.kind = KdaGate::bounded}, {.kind = KdaGate::bounded, .lower_bound = -0.5f}};
  for (const int64_t T : {0, 1, 9})
    for (const int64_t K : {3, 12, 16, 33})  // of one channel alone, the gradient through unit length cancels
      for (const auto& gate : gates)
        for (const float size : {1.0f, 1e-3f, 0.0f}) {
          const std::string what = cat("prep_back/T", T, "_K", K, "_gate", int(gate.kind), gate.lower_bound, "_", size);
          const PrepProblem p(what, T, 3, K, gate, size);
          EXPECT_TRUE(follows(p, run(ctx, p))) << what;
        }
}

TEST(KdaPrepBackward, SumsOverManyTokensAndAnyThreads) {
  const PrepProblem p("prep_back/long", 200, 2, 20);
  CpuContext one(1), two(2), three(3);
  const auto want = run(one, p);
  EXPECT_TRUE(follows(p, want));
  EXPECT_EQ(run(two, p), want);
  EXPECT_EQ(run(three, p), want);
  auto without = run(one, p, false);
  EXPECT_EQ(without.A, p.dA);
  EXPECT_EQ(without.bias, p.d_bias);
  EXPECT_EQ(without.f, want.f);
}

TEST(KdaPrepBackward, ExtremeLogitsStayFiniteAndNaNStays) {
  CpuContext ctx;
  for (const KdaGate kind : {KdaGate::softplus, KdaGate::bounded}) {
    PrepProblem p("prep_back/extreme", 2, 1, 16, {.kind = kind});
    for (size_t i = 0; i < p.f.size(); ++i) p.f[i] = i % 2 ? 1e4f : -1e4f;
    p.b = {1e4f, -1e4f};
    const auto got = run(ctx, p);
    for (const auto* x : {&got.f, &got.b, &got.A, &got.bias})
      for (float y : *x) EXPECT_TRUE(std::isfinite(y));
    p.f[3] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(run(ctx, p).f[3]));
  }
}

TEST(KdaPrepBackward, SabotageIsNoticed) {
  CpuContext ctx;
  const PrepProblem p("prep_back/sabotage", 3, 2, 20);
  const auto got = run(ctx, p);
  ASSERT_TRUE(follows(p, got));
  for (auto member : {&PrepGradients::q, &PrepGradients::k, &PrepGradients::f, &PrepGradients::b, &PrepGradients::A,
                      &PrepGradients::bias}) {
    auto bad = got;
    (bad.*member)[1] += 2e-3f;
    EXPECT_FALSE(follows(p, bad));
  }
}

struct OutputProblem {
  int64_t T, H, V;
  std::vector<float> o, g, bias, w, dy, d_bias, dw;

  OutputProblem(const std::string& name, int64_t T_, int64_t H_, int64_t V_) : T(T_), H(H_), V(V_) {
    const int64_t n = T * H * V;
    o = values(name + "/o", n), g = values(name + "/g", n, 8), dy = values(name + "/dy", n);
    bias = values(name + "/bias", H * V), w = values(name + "/w", V);
    d_bias = values(name + "/d_bias", H * V), dw = values(name + "/dw", V);
    if (T > 1) std::fill_n(o.begin(), V, 0.0f);  // a head without output: only eps under the root
  }
};

struct OutputGradients {
  std::vector<float> o, g, bias, w;
  bool operator==(const OutputGradients&) const = default;
};

OutputGradients run(Context& ctx, const OutputProblem& p, bool in_place = false, bool want_sums = true) {
  const Shape thv{p.T, p.H, p.V};
  Buffer o(ctx, p.o), g(ctx, p.g), bias(ctx, p.bias), w(ctx, p.w), dy(ctx, p.dy), d_o(ctx, p.T * p.H * p.V),
      dg(ctx, p.T * p.H * p.V), d_bias(ctx, p.d_bias), dw(ctx, p.dw);
  Buffer& to = in_place ? dy : d_o;
  kda_output_backward(ctx, {.o = o.view(thv),
                            .g = g.view(thv),
                            .g_bias = bias.view({p.H * p.V}),
                            .w = w.view({p.V}),
                            .dy = dy.view(thv),
                            .eps = 1e-5f,
                            .d_o = to.view(thv),
                            .dg = dg.view(thv),
                            .d_g_bias = want_sums ? d_bias.view({p.H * p.V}) : View(),
                            .dw = want_sums ? dw.view({p.V}) : View()});
  for (Buffer* x : {&to, &dg, &d_bias, &dw}) EXPECT_TRUE(x->guards_intact());
  return {to.fetch(), dg.fetch(), d_bias.fetch(), dw.fetch()};
}

testing::AssertionResult follows(const OutputProblem& p, const OutputGradients& got) {
  Doubles o, g, bias = doubles(p.d_bias), w = doubles(p.dw);
  for (int64_t i = 0; i < p.T * p.H * p.V; i += p.V) {
    Doubles all;
    const auto add = [&](const std::vector<float>& x, int64_t from) {
      all.insert(all.end(), x.begin() + from, x.begin() + from + p.V);
    };
    const int64_t h = i / p.V % p.H;
    add(p.o, i), add(p.g, i), add(p.bias, h * p.V), add(p.w, 0);
    const Doubles dy(p.dy.begin() + i, p.dy.begin() + i + p.V);
    const auto d = ref::complex_step(
        [&](const ref::Complexes& c) {
          const auto part = [&](int64_t j) { return ref::Complexes(c.begin() + j * p.V, c.begin() + (j + 1) * p.V); };
          return ref::weighted(dy, ref::gated_norm(part(0), part(1), part(2), part(3), double(1e-5f), 1, p.V));
        },
        all);
    o.insert(o.end(), d.begin(), d.begin() + p.V);
    g.insert(g.end(), d.begin() + p.V, d.begin() + 2 * p.V);
    for (int64_t v = 0; v < p.V; ++v) {
      bias[size_t(h * p.V + v)] += d[size_t(2 * p.V + v)];
      w[size_t(v)] += d[size_t(3 * p.V + v)];
    }
  }
  // The zero rows' gradient is 1/sqrt(eps) larger than the others': those are compared on their own.
  const int64_t zeros = p.T > 1 ? p.V : 0;
  const auto tail = [&](const auto& x) { return Doubles(x.begin() + zeros, x.end()); };
  const std::pair<const char*, double> errors[] = {{"o", relative_l2(got.o, o)},
                                                   {"o but for zero rows", relative_l2(tail(got.o), tail(o))},
                                                   {"g", relative_l2(got.g, g)},
                                                   {"g_bias", relative_l2(got.bias, bias)},
                                                   {"w", relative_l2(got.w, w)}};
  for (const auto& [name, error] : errors)
    if (!(error <= 2e-6)) return testing::AssertionFailure() << "d " << name << " is off by " << error;
  return testing::AssertionSuccess();
}

TEST(KdaOutputBackward, FollowsTheComplexStep) {
  CpuContext ctx;
  for (const int64_t T : {0, 1, 9})
    for (const int64_t V : {2, 12, 16, 33}) {
      const std::string what = cat("output_back/T", T, "_V", V);
      const OutputProblem p(what, T, 3, V);
      const auto got = run(ctx, p);
      EXPECT_TRUE(follows(p, got)) << what;
      EXPECT_EQ(run(ctx, p, true), got) << what << " in place";
    }
}

TEST(KdaOutputBackward, SumsOverManyTokensAndAnyThreads) {
  const OutputProblem p("output_back/long", 200, 2, 20);
  CpuContext one(1), two(2), three(3);
  const auto want = run(one, p);
  EXPECT_TRUE(follows(p, want));
  EXPECT_EQ(run(two, p), want);
  EXPECT_EQ(run(three, p), want);
  const auto without = run(one, p, false, false);
  EXPECT_EQ(without.w, p.dw);
  EXPECT_EQ(without.bias, p.d_bias);
  EXPECT_EQ(without.o, want.o);
}

TEST(KdaOutputBackward, ClosedAndOpenGatesStayFinite) {
  CpuContext ctx;
  OutputProblem p("output_back/extreme", 2, 1, 16);
  for (size_t i = 0; i < p.g.size(); ++i) p.g[i] = i % 2 ? 1e4f : -1e4f;
  const auto got = run(ctx, p);
  for (const auto* x : {&got.o, &got.g, &got.bias, &got.w})
    for (float y : *x) EXPECT_TRUE(std::isfinite(y));
}

TEST(KdaOutputBackward, SabotageIsNoticed) {
  CpuContext ctx;
  const OutputProblem p("output_back/sabotage", 3, 2, 20);
  const auto got = run(ctx, p);
  ASSERT_TRUE(follows(p, got));
  for (auto member : {&OutputGradients::o, &OutputGradients::g, &OutputGradients::bias, &OutputGradients::w}) {
    auto bad = got;
    (bad.*member)[19] += 2e-1f;
    EXPECT_FALSE(follows(p, bad));
  }
  auto bad = got;
  bad.o[25] += 2e-4f;
  EXPECT_FALSE(follows(p, bad)) << "the zero row hides it";
}

TEST(KdaPrepBackward, TheDoorsRefuse) {
  CpuContext ctx;
  Buffer x(ctx, 24), b(ctx, 4), A(ctx, 2), bias(ctx, 12), w(ctx, 6);
  const View thk = x.view({2, 2, 6}), th = b.view({2, 2});
  const auto text = [](auto call) {
    try {
      call();
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const auto prep = [&](auto change) {
    KdaPrepBackward a{thk, thk, thk, th, A.view({2}), bias.view({12}), {}, thk, thk, thk, th, A.view({2}), {}};
    change(a);
    return text([&] { kda_prep_backward(ctx, a); });
  };
  EXPECT_EQ(prep([](auto&) {}), "accepted");
  EXPECT_EQ(prep([](auto& a) { a.df.shape = {2, 12}; }), "kda_prep_backward: df must be [2,2,6], got [2,12]");
  EXPECT_EQ(prep([](auto& a) { a.dA_log.shape = {1}; }), "kda_prep_backward: dA_log must be [2], got [1]");
  EXPECT_EQ(prep([](auto& a) { a.gate.beta_scale = 3; }), "kda_prep_backward: beta_scale must be in (0,2], got 3");
  const auto output = [&](auto change) {
    KdaOutputBackward a{thk, thk, bias.view({12}), w.view({6}), thk, 1e-5f, thk, thk, {}, w.view({6})};
    change(a);
    return text([&] { kda_output_backward(ctx, a); });
  };
  EXPECT_EQ(output([](auto&) {}), "accepted");
  EXPECT_EQ(output([](auto& a) { a.dw.shape = {12}; }), "kda_output_backward: dw must be [6], got [12]");
  EXPECT_EQ(output([](auto& a) { a.d_o.data = nullptr; }), "kda_output_backward: d_o [2,2,6] has no memory");
  EXPECT_EQ(output([](auto& a) { a.eps = -1; }), "kda_output_backward: eps must be >= 0, got -1");
}

}  // namespace
