#include "kernels/kda_backward.h"

#include "tests/kernels/kda_gradient.h"

using namespace kda;
using namespace kda::test;

namespace {

void expect_gradients(Context& ctx, const KdaProblem& p, const std::string& what) {
  const KdaCotangent c(what, p);
  const auto got = run_backward(ctx, p, c.d_o, c.d_state);
  EXPECT_EQ(got.forward, run_forward(ctx, p)) << what << ": keeping changed the forward pass";
  EXPECT_TRUE(gradients_follow(got.d, reference_backward(p, c.d_o, c.d_state))) << what;
}

// The reference itself: each derivative by the complex step through the forward reference.
TEST(KdaBackwardReference, IsTheComplexStep) {
  for (const auto& [T, K, V] : {std::tuple<int64_t, int64_t, int64_t>{5, 4, 3}, {1, 1, 1}, {0, 2, 2}, {3, 2, 5}}) {
    const KdaProblem p(cat("step", T), {T}, 1, K, V);
    const KdaCotangent c("step", p);
    const auto got = reference_backward(p, c.d_o, c.d_state);
    const Doubles d_o = doubles(c.d_o), d_state = doubles(c.d_state);
    std::vector<ref::Complexes> args;
    for (const auto* x : {&p.q, &p.k, &p.v, &p.g, &p.beta, &p.state}) args.push_back(ref::complexes(doubles(*x)));
    const auto derivative = [&](size_t which) {
      Doubles at;
      for (const auto& x : args[which]) at.push_back(x.real());
      return ref::complex_step(
          [&, K = K, V = V](const ref::Complexes& x) {
            auto a = args;
            a[which] = x;
            const auto o = ref::recurrence(a[0], a[1], a[2], a[3], a[4], a[5], K, V);
            return ref::weighted(d_o, o) + ref::weighted(d_state, a[5]);
          },
          at);
    };
    size_t which = 0;
    for (const auto* g : {&got.q, &got.k, &got.v, &got.g, &got.beta, &got.S})
      EXPECT_LE(relative_max(*g, derivative(which++)), 1e-13) << which;
  }
}

TEST(KdaBackward, FollowsTheRecurrenceAtEveryLengthAndWidth) {
  CpuContext ctx;
  const std::pair<int64_t, int64_t> widths[] = {{32, 64}, {64, 64}, {64, 20}, {20, 12}, {1, 1}, {17, 33}, {48, 16}};
  for (const int64_t T : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130})
    for (const auto& [K, V] : widths) {
      const std::string what = cat("back/T", T, "_K", K, "_V", V);
      expect_gradients(ctx, KdaProblem(what, {T}, 2, K, V), what);
    }
}

TEST(KdaBackward, FollowsTheRecurrenceAtEveryDecay) {
  CpuContext ctx;
  for (const Decay decay : {Decay::ordinary, Decay::strong, Decay::weak, Decay::mixed})
    for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {20, 12}}) {
      const std::string what = cat("back/decay", int(decay), "_K", K, "_V", V);
      expect_gradients(ctx, KdaProblem(what, {130, 7}, 2, K, V, decay), what);
    }
}

TEST(KdaBackward, TakesSaturatedBetaZeroKeysAndDecaysThatEndEverything) {
  CpuContext ctx;
  KdaProblem p("back/edges", {50}, 2, 32, 32);
  for (size_t i = 0; i < p.beta.size(); ++i) p.beta[i] = i % 3 == 0 ? 0.0f : i % 3 == 1 ? 1.0f : 1.9999f;
  for (size_t i = 0; i < p.k.size(); ++i)
    if (i / 64 % 5 == 0) p.k[i] = 0;
  for (size_t i = 0; i < p.g.size(); ++i)
    if (i % 7 == 0) p.g[i] = i % 2 ? -1e4f : 0.0f;
  expect_gradients(ctx, p, "back/edges");
}

// One token in the middle of mild ones forgets nearly everything: its own gradient is the tiny number it is, not the
// rounding of the others'.
TEST(KdaBackward, AStrongDecayAmongMildOnesHasATinyGradient) {
  CpuContext ctx;
  for (const float strong : {-20.0f, -60.0f, -500.0f}) {
    KdaProblem p("back/wall", {48}, 1, 32, 32, Decay::weak);
    for (int64_t d = 0; d < 32; ++d) p.g[size_t(23 * 32 + d)] = strong;
    const KdaCotangent c("wall", p);
    const auto got = run_backward(ctx, p, c.d_o, c.d_state);
    const auto want = reference_backward(p, c.d_o, c.d_state);
    EXPECT_TRUE(gradients_follow(got.d, want)) << strong;
    const std::vector<float> wall(got.d.g.begin() + 23 * 32, got.d.g.begin() + 24 * 32);
    const Doubles wanted(want.g.begin() + 23 * 32, want.g.begin() + 24 * 32);
    if (strong > -80)
      EXPECT_LE(relative_l2(wall, wanted), 2e-5) << strong;
    else
      EXPECT_EQ(wall, std::vector<float>(32)) << "below what float32 can hold";
  }
}

TEST(KdaBackward, TakesRaggedPacksAndAnySlots) {
  CpuContext ctx;
  KdaProblem p("back/ragged", {17, 0, 1, 140, 0, 64, 16}, 2, 20, 12, Decay::ordinary, 9);
  p.pack.in = {3, -1, -1, 0, 5, 8, -1};
  p.pack.out = {3, 1, 2, 4, 6, -1, -1};
  expect_gradients(ctx, p, "back/ragged");
}

TEST(KdaBackward, TheStatesGradientsMayBeLeftOut) {
  CpuContext ctx;
  const KdaProblem p("back/optional", {40, 0, 3}, 2, 20, 36);
  const KdaCotangent c("optional", p);
  const auto got = run_backward(ctx, p, c.d_o, {});
  EXPECT_TRUE(gradients_follow(got.d, reference_backward(p, c.d_o, {})));
  auto none = run_backward(ctx, p, c.d_o, {}, false).d;
  none.state = got.d.state;
  EXPECT_EQ(none, got.d);
  // An empty sequence hands its state's gradient through.
  const auto with = run_backward(ctx, p, c.d_o, c.d_state).d;
  const auto of = [&](const std::vector<float>& x) {
    return std::vector<float>(x.begin() + 2 * 20 * 36, x.begin() + 4 * 20 * 36);
  };
  EXPECT_EQ(of(with.state), of(c.d_state));
}

TEST(KdaBackward, IsTheSameForAnyNumberOfThreads) {
  const KdaProblem p("back/threads", {70, 3, 0, 133}, 3, 32, 64);
  const KdaCotangent c("threads", p);
  CpuContext one(1), two(2), three(3);
  const auto want = run_backward(one, p, c.d_o, c.d_state).d;
  EXPECT_EQ(run_backward(two, p, c.d_o, c.d_state).d, want);
  EXPECT_EQ(run_backward(three, p, c.d_o, c.d_state).d, want);
}

TEST(KdaBackward, KeepsNaN) {
  CpuContext ctx;
  KdaProblem p("back/nan", {20}, 1, 32, 32);
  const KdaCotangent c("nan", p);
  p.v[40] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run_backward(ctx, p, c.d_o, c.d_state).d.beta[1]));
}

// Each comparison above must notice one wrong number in any gradient, and one wrong order of things.
TEST(KdaBackward, SabotageIsNoticed) {
  CpuContext ctx;
  const KdaProblem p("back/sabotage", {40}, 2, 32, 64);
  const KdaCotangent c("sabotage", p);
  const auto want = reference_backward(p, c.d_o, c.d_state);
  const auto got = run_backward(ctx, p, c.d_o, c.d_state).d;
  ASSERT_TRUE(gradients_follow(got, want));
  for (auto member : {&KdaGradients::q, &KdaGradients::k, &KdaGradients::v, &KdaGradients::g, &KdaGradients::beta,
                      &KdaGradients::state}) {
    auto bad = got;
    (bad.*member)[33] += 2e-3f;
    EXPECT_FALSE(gradients_follow(bad, want));
  }
  KdaProblem late = p;  // the decay of the token before
  std::rotate(late.g.begin(), late.g.end() - 64, late.g.end());
  EXPECT_FALSE(gradients_follow(run_backward(ctx, late, c.d_o, c.d_state).d, want));
}

TEST(KdaBackward, TheDoorsRefuse) {
  CpuContext ctx;
  const KdaProblem p("back/door", {4, 3}, 2, 8, 8);
  const int64_t size = kda_kept_floats(ctx, p.pack.packing(), 2, 8, 8);
  Buffer x(ctx, p.q), beta(ctx, p.beta), state(ctx, p.state), kept(ctx, size);
  const auto thk = x.view({7, 2, 8}), th = beta.view({7, 2}), S = state.view({2, 2, 8, 8});
  const auto text = [](auto call) {
    try {
      call();
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const auto forward = [&](View k) {
    return text([&] {
      kda_forward_keep(ctx, {{thk, thk, thk, thk, th, S, p.pack.slots(), p.pack.packing(), x.view({7, 2, 8})}, k});
    });
  };
  EXPECT_EQ(forward(kept.view({size})), "accepted");
  EXPECT_EQ(forward(kept.view({size - 1})), cat("kda_forward_keep: kept must be [", size, "], got [", size - 1, "]"));
  EXPECT_EQ(forward({}), cat("kda_forward_keep: kept must be [", size, "], got []"));
  const auto refused = [&](auto change) {
    Pack pack = p.pack;
    Buffer dk(ctx, 7 * 2 * 8), dv(ctx, 7 * 2 * 8), dg(ctx, 7 * 2 * 8), dq(ctx, 7 * 2 * 8), db(ctx, 14),
        dS(ctx, 2 * 2 * 64);
    KdaBackward a{.q = thk,
                  .k = thk,
                  .v = thk,
                  .log_decay = thk,
                  .beta = th,
                  .kept = kept.view({size}),
                  .packing = pack.packing(),
                  .d_o = thk,
                  .d_state_out = S,
                  .dq = dq.view({7, 2, 8}),
                  .dk = dk.view({7, 2, 8}),
                  .dv = dv.view({7, 2, 8}),
                  .d_log_decay = dg.view({7, 2, 8}),
                  .d_beta = db.view({7, 2}),
                  .d_state_in = dS.view({2, 2, 8, 8})};
    change(a, pack);
    return text([&] { kda_backward(ctx, a); });
  };
  EXPECT_EQ(refused([](auto&, auto&) {}), "accepted");
  EXPECT_EQ(refused([](auto& a, auto&) { a.d_o.shape = {7, 2, 4}; }), "kda_backward: d_o must be [7,2,8], got [7,2,4]");
  EXPECT_EQ(refused([](auto& a, auto&) { a.dk.data = nullptr; }), "kda_backward: dk [7,2,8] has no memory");
  EXPECT_EQ(refused([](auto& a, auto&) { a.d_beta.dtype = Dtype::bf16; }),
            "kda_backward: d_beta must be f32, got bf16");
  EXPECT_EQ(refused([](auto& a, auto&) {
              a.d_state_out.shape = {2, 2, 8, 4};
            }),
            "kda_backward: d_state_out must be [2,2,8,8], got [2,2,8,4]");
  EXPECT_EQ(refused([](auto& a, auto&) {
              a.d_state_in.shape = {1, 2, 8, 8};
            }),
            "kda_backward: d_state_in must be [2,2,8,8], got [1,2,8,8]");
  EXPECT_EQ(refused([](auto&, auto& k) { k.start[2] = 6; }),
            "kda_backward: the packing ends at token 6, the tensors have 7");
  CpuContext small(2, Precision::exact, 64);
  EXPECT_GT(kda_backward_workspace_bytes(small, 7, 2, 8, 8), 64u);
  EXPECT_GT(kda_forward_keep_workspace_bytes(small, 7, 2, 8, 8), 64u);
  const KdaCotangent c("door", p);
  EXPECT_THROW(run_backward(small, p, c.d_o, c.d_state), Error);
}

}  // namespace
