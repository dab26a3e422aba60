#include "kernels/kda.h"

#include "kernels/kda_prep.h"
#include "tests/golden.h"
#include "tests/kernels/kda_problem.h"

using namespace kda;
using namespace kda::test;

namespace {

// States are stored [B,H,K,V].
template <class A>
A transposed(const A& s, int64_t K, int64_t V) {
  A y(s.size());
  for (size_t m = 0; m < s.size(); m += size_t(K * V))
    for (int64_t d = 0; d < K; ++d)
      for (int64_t r = 0; r < V; ++r) y[m + size_t(r * K + d)] = s[m + size_t(d * V + r)];
  return y;
}

struct GoldenCase {
  int64_t B, T, H, K, V;
  double lower, beta_scale;
  std::string name;

  explicit GoldenCase(const nlohmann::json& c)
      : B(c["B"]),
        T(c["T"]),
        H(c["H"]),
        K(c["K"]),
        V(c["V"]),
        lower(c.value("lower", 0.0)),
        beta_scale(c.value("neg", false) ? 2 : 1),
        name(std::to_string(c["index"].get<int>()) + ".") {}
};

TEST(KdaReference, GivesTheGoldenValues) {
  KDA_NEED(path, "kda_op.safetensors");
  const GoldenFile file(path);
  for (const auto& c : file.cases()) {
    const GoldenCase s(c);
    const auto get = [&](const char* what) { return file[s.name + what].values(); };
    const auto q = ref::unit_rows(get("q"), s.K), k = ref::unit_rows(get("k"), s.K), v = get("v");
    const auto g = ref::log_decay(get("g_raw"), get("A_log"), get("dt_bias"), s.H, s.K, s.lower);
    const auto beta = ref::beta(get("beta_raw"), s.beta_scale);
    // The file holds float32, so half a unit of it is what can be asked for.
    EXPECT_LE(relative_max(g, get("g")), 1.2e-7) << s.name;
    EXPECT_LE(relative_max(beta, get("beta")), 1.2e-7) << s.name;
    Doubles o(size_t(s.B * s.T * s.H * s.V)), hT = transposed(get("h0"), s.K, s.V);
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t h = 0; h < s.H; ++h) {
        const auto cut = [&](const Doubles& x, int64_t D) { return ref::head(x, b * s.T, (b + 1) * s.T, s.H, h, D); };
        const auto S0 = hT.begin() + (b * s.H + h) * s.V * s.K;
        Doubles S(S0, S0 + s.V * s.K);
        const auto y = ref::recurrence(cut(q, s.K), cut(k, s.K), cut(v, s.V), cut(g, s.K), cut(beta, 1), S, s.K, s.V);
        for (int64_t t = 0; t < s.T; ++t)
          std::copy_n(y.begin() + t * s.V, s.V, o.begin() + ((b * s.T + t) * s.H + h) * s.V);
        std::copy(S.begin(), S.end(), S0);
      }
    EXPECT_LE(relative_max(o, get("o")), 1.2e-7) << s.name;
    EXPECT_LE(relative_max(hT, transposed(get("hT"), s.K, s.V)), 1.2e-7) << s.name;
  }
}

TEST(KdaForward, GivesTheGoldenValues) {
  KDA_NEED(path, "kda_op.safetensors");
  const GoldenFile file(path);
  CpuContext ctx;
  for (const auto& c : file.cases()) {
    const GoldenCase s(c);
    const auto get = [&](const char* what) { return file[s.name + what].floats(); };
    const int64_t T = s.B * s.T, H = s.H, K = s.K, V = s.V;
    Buffer q(ctx, get("q")), k(ctx, get("k")), v(ctx, get("v")), f(ctx, get("g_raw")), b(ctx, get("beta_raw"));
    Buffer A(ctx, get("A_log")), bias(ctx, get("dt_bias")), state(ctx, transposed(get("h0"), K, V)), o(ctx, T * H * V);
    kda_prep(ctx, {.q = q.view({T, H, K}),
                   .k = k.view({T, H, K}),
                   .f = f.view({T, H, K}),
                   .b = b.view({T, H}),
                   .A_log = A.view({H}),
                   .dt_bias = bias.view({H * K}),
                   .gate = {.kind = s.lower == 0 ? KdaGate::softplus : KdaGate::bounded,
                            .lower_bound = float(s.lower),
                            .beta_scale = float(s.beta_scale)},
                   .log_decay = f.view({T, H, K}),
                   .beta = b.view({T, H})});
    EXPECT_LE(relative_max(f.fetch(), get("g")), 1e-6) << s.name;
    EXPECT_LE(relative_max(b.fetch(), get("beta")), 1e-6) << s.name;
    const Pack pack(std::vector<int64_t>(size_t(s.B), s.T));
    kda_forward(ctx, {.q = q.view({T, H, K}),
                      .k = k.view({T, H, K}),
                      .v = v.view({T, H, V}),
                      .log_decay = f.view({T, H, K}),
                      .beta = b.view({T, H}),
                      .state = state.view({s.B, H, V, K}),
                      .slots = pack.slots(),
                      .packing = pack.packing(),
                      .o = o.view({T, H, V})});
    EXPECT_LE(relative_l2(o.fetch(), get("o")), kKdaTolerance) << s.name;
    EXPECT_LE(relative_max(o.fetch(), get("o")), 5e-6) << s.name;
    EXPECT_LE(relative_l2(state.fetch(), transposed(get("hT"), K, V)), kKdaTolerance) << s.name;
  }
}

TEST(KdaForward, FollowsTheRecurrenceAtEveryLengthAndWidth) {
  CpuContext ctx;
  const std::pair<int64_t, int64_t> widths[] = {{32, 64}, {64, 128}, {128, 32}, {20, 12}, {1, 1}, {17, 33}};
  for (const int64_t T : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130})
    for (const auto& [K, V] : widths) {
      const std::string what = cat("T", T, "_K", K, "_V", V);
      const KdaProblem p("length/" + what, {T}, 2, K, V);
      expect_reference(p, run_forward(ctx, p), what);
    }
}

TEST(KdaForward, FollowsTheRecurrenceAtEveryDecay) {
  CpuContext ctx;
  for (const Decay decay : {Decay::ordinary, Decay::strong, Decay::weak, Decay::mixed})
    for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {20, 12}}) {
      const std::string what = cat("decay", int(decay), "_K", K, "_V", V);
      const KdaProblem p("decay/" + what, {130, 7}, 2, K, V, decay);
      expect_reference(p, run_forward(ctx, p), what);
    }
}

TEST(KdaForward, TakesSaturatedBetaZeroKeysAndDecaysThatEndEverything) {
  CpuContext ctx;
  KdaProblem p("edges", {50}, 2, 32, 32);
  for (size_t i = 0; i < p.beta.size(); ++i) p.beta[i] = i % 3 == 0 ? 0.0f : i % 3 == 1 ? 1.0f : 1.9999f;
  for (size_t i = 0; i < p.k.size(); ++i)
    if (i / 64 % 5 == 0) p.k[i] = 0;
  for (size_t i = 0; i < p.g.size(); ++i)
    if (i % 7 == 0) p.g[i] = i % 2 ? -1e4f : 0.0f;
  expect_reference(p, run_forward(ctx, p), "edges");
}

TEST(KdaForward, TakesRaggedPacksAndAnySlots) {
  CpuContext ctx;
  KdaProblem p("ragged", {17, 0, 1, 40, 0, 16}, 2, 20, 12, Decay::ordinary, 9);
  p.pack.in = {3, -1, -1, 0, 5, 8};
  p.pack.out = {3, 1, 2, 4, 6, -1};  // in place, zeros written, zeros to start, moved, copied unread, dropped
  expect_reference(p, run_forward(ctx, p), "ragged");
}

TEST(KdaForward, IsTheSameForAnyNumberOfThreads) {
  const KdaProblem p("threads", {70, 3, 0, 33}, 3, 32, 64);
  CpuContext one(1), two(2), three(3);
  const auto want = run_forward(one, p);
  EXPECT_EQ(run_forward(two, p), want);
  EXPECT_EQ(run_forward(three, p), want);
}

TEST(KdaForward, ASequenceIsTheSameAloneAndInAPack) {
  CpuContext ctx;
  const KdaProblem all("pack", {5, 37, 16}, 2, 32, 64);
  const auto packed = run_forward(ctx, all);
  KdaProblem alone = all;
  const auto cut = [&](const std::vector<float>& x, int64_t D) {
    return std::vector<float>(x.begin() + 5 * 2 * D, x.begin() + 42 * 2 * D);
  };
  alone.pack = Pack({37});
  alone.slots = 1;
  alone.q = cut(all.q, 32), alone.k = cut(all.k, 32), alone.v = cut(all.v, 64), alone.g = cut(all.g, 32);
  alone.beta = cut(all.beta, 1);
  const int64_t S = 2 * 64 * 32;
  const auto slot = [&](const std::vector<float>& x) { return std::vector<float>(x.begin() + S, x.begin() + 2 * S); };
  alone.state = slot(all.state);
  const auto got = run_forward(ctx, alone);
  EXPECT_EQ(got.o, cut(packed.o, 64));
  EXPECT_EQ(got.state, slot(packed.state));
}

TEST(KdaForward, AnySplitIntoBlocksAgrees) {
  CpuContext ctx;
  for (const Decay decay : {Decay::ordinary, Decay::weak, Decay::mixed}) {
    const KdaProblem whole(cat("split", int(decay)), {130}, 2, 64, 32, decay);
    const auto want = run_forward(ctx, whole);
    for (const int64_t block : {1, 2, 3, 15, 16, 17, 64}) {
      std::vector<float> o;
      KdaProblem part = whole;
      for (int64_t from = 0; from < 130; from += block) {
        const int64_t to = std::min<int64_t>(130, from + block);
        const auto cut = [&](const std::vector<float>& x, int64_t D) {
          return std::vector<float>(x.begin() + from * 2 * D, x.begin() + to * 2 * D);
        };
        part.pack = Pack({to - from});
        part.q = cut(whole.q, 64), part.k = cut(whole.k, 64), part.g = cut(whole.g, 64), part.v = cut(whole.v, 32);
        part.beta = cut(whole.beta, 1);
        const auto got = run_forward(ctx, part);
        part.state = got.state;
        o.insert(o.end(), got.o.begin(), got.o.end());
      }
      EXPECT_LE(relative_l2(o, want.o), 1e-6) << block;
      EXPECT_LE(relative_l2(part.state, want.state), 1e-6) << block;
    }
  }
}

TEST(KdaForward, DoesNotReadWhatItMustNot) {
  CpuContext ctx;
  KdaProblem p("unread", {20}, 1, 32, 32);
  p.pack.in = {-1};
  p.state.assign(p.state.size(), std::numeric_limits<float>::quiet_NaN());
  expect_reference(p, run_forward(ctx, p), "zeros, not the slot");
  p.k[40] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run_forward(ctx, p).o.back())) << "a NaN must not be swallowed";
  p.k[40] = 0;
  p.g[40] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run_forward(ctx, p).o.back())) << "a NaN must not be swallowed";
}

// Each comparison above must notice one wrong number and one wrong order of things.
TEST(KdaForward, SabotageIsNoticed) {
  CpuContext ctx;
  const KdaProblem p("sabotage", {40}, 2, 32, 64);
  const auto [o, state] = reference(p);
  auto got = run_forward(ctx, p);
  got.o[77] += 1e-3f, got.state[99] += 1e-3f;
  EXPECT_GT(relative_l2(got.o, o), kKdaTolerance);
  EXPECT_GT(relative_l2(got.state, state), kKdaTolerance);
  EXPECT_GT(relative_max(got.state, state), 2e-6);
  KdaProblem late = p;  // the decay of the token before
  std::rotate(late.g.begin(), late.g.end() - 64, late.g.end());
  EXPECT_GT(relative_l2(run_forward(ctx, late).o, o), 1e-3);
}

TEST(KdaForward, TheDoorRefuses) {
  CpuContext ctx;
  const KdaProblem p("door", {4, 3}, 2, 8, 8);
  Buffer q(ctx, p.q), v(ctx, p.v), beta(ctx, p.beta), state(ctx, p.state), o(ctx, 7 * 2 * 8);
  const auto call = [&](auto change) {
    Pack pack = p.pack;
    KdaForward a{.q = q.view({7, 2, 8}),
                 .k = q.view({7, 2, 8}),
                 .v = v.view({7, 2, 8}),
                 .log_decay = q.view({7, 2, 8}),
                 .beta = beta.view({7, 2}),
                 .state = state.view({2, 2, 8, 8}),
                 .slots = pack.slots(),
                 .packing = pack.packing(),
                 .o = o.view({7, 2, 8})};
    change(a, pack);
    try {
      kda_forward(ctx, a);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(call([](auto&, auto&) {}), "accepted");
  EXPECT_EQ(call([](auto& a, auto&) { a.k.shape = {7, 2, 4}; }), "kda_forward: k must be [7,2,8], got [7,2,4]");
  EXPECT_EQ(call([](auto& a, auto&) { a.q.shape = {7, 16}; }), "kda_forward: q must be [T,H,K], got [7,16]");
  EXPECT_EQ(call([](auto& a, auto&) { a.v.dtype = Dtype::bf16; }), "kda_forward: v must be f32, got bf16");
  EXPECT_EQ(call([](auto& a, auto&) {
              a.state.shape = {2, 2, 8, 4};
            }),
            "kda_forward: state must be [2,2,8,8], got [2,2,8,4]");
  EXPECT_EQ(call([](auto& a, auto&) { a.o.data = nullptr; }), "kda_forward: o [7,2,8] has no memory");
  EXPECT_EQ(call([](auto&, auto& k) { k.start[2] = 6; }),
            "kda_forward: the packing ends at token 6, the tensors have 7");
  EXPECT_EQ(call([](auto&, auto& k) { k.start[1] = 9; }),
            "kda_forward: start must not fall, got start[1] = 9 and start[2] = 7");
  EXPECT_EQ(call([](auto&, auto& k) { k.start[0] = 1; }), "kda_forward: start[0] must be 0, got 1");
  EXPECT_EQ(call([](auto&, auto& k) { k.in[1] = 2; }), "kda_forward: slots.in[1] = 2, the pool has 2");
  EXPECT_EQ(call([](auto&, auto& k) { k.out[0] = -2; }), "kda_forward: slots.out[0] = -2, the pool has 2");
  EXPECT_EQ(call([](auto&, auto& k) { k.out[0] = 1; }),
            "kda_forward: slot 1 is written by sequence 0 and used by sequence 1");
  EXPECT_EQ(call([](auto& a, auto&) { a.slots.in = nullptr; }), "kda_forward: slots are missing");
  CpuContext small(2, Precision::exact, 64);
  EXPECT_GT(kda_forward_workspace_bytes(small, 7, 2, 8, 8), 64u);
  EXPECT_THROW(run_forward(small, p), Error);
}

// y against the plain form, at widths beside every vector's
TEST(KdaOutput, FollowsTheReference) {
  CpuContext ctx;
  for (const int64_t T : {0, 1, 9})
    for (const int64_t V : {1, 12, 16, 33, 128}) {
      const int64_t H = 3;
      const std::string name = cat("output/T", T, "_V", V);
      auto os = values(name + "/o", T * H * V), gs = values(name + "/g", T * H * V, 100);
      const auto bs = values(name + "/bias", H * V), ws = values(name + "/w", V);
      if (T > 1) std::fill_n(os.begin(), V, 0.0f);  // a head without output: only eps under the root
      const auto want = ref::gated_norm(doubles(os), doubles(gs), doubles(bs), doubles(ws), 1e-5f, H, V);
      for (const int alias : {0, 1, 2}) {
        Buffer o(ctx, os), g(ctx, gs), b(ctx, bs), w(ctx, ws), y(ctx, T * H * V);
        Buffer& to = alias == 0 ? y : alias == 1 ? o : g;
        kda_output(ctx, {.o = o.view({T, H, V}),
                         .g = g.view({T, H, V}),
                         .g_bias = b.view({H * V}),
                         .w = w.view({V}),
                         .y = to.view({T, H, V}),
                         .eps = 1e-5f});
        // A normalised value is at most sqrt(V); eight roundings on the way, sqrt(V) in the sum of squares.
        EXPECT_TRUE(close(to.fetch(), want, 1.2e-7 * (8 + std::sqrt(double(V))), std::sqrt(double(V)))) << name;
        EXPECT_TRUE(to.guards_intact());
      }
    }
  Buffer x(ctx, 6);
  EXPECT_THROW(kda_output(ctx, {.o = x.view({1, 2, 3}),
                                .g = x.view({1, 2, 3}),
                                .g_bias = x.view({3}),
                                .w = x.view({3}),
                                .y = x.view({1, 2, 3}),
                                .eps = 1e-5f}),
               Error);
}

}  // namespace
