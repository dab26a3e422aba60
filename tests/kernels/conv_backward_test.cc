#include "kernels/conv_backward.h"

#include "kernels/conv.h"
#include "tests/kernels/kda_problem.h"
#include "tests/ref/kda_backward.h"

using namespace kda;
using namespace kda::test;

namespace {

struct ConvProblem {
  int64_t C;
  Pack pack;
  std::vector<float> x, w, dy, dw;  // dw: what is there before

  ConvProblem(const std::string& name, const std::vector<int64_t>& lengths, int64_t C_) : C(C_), pack(lengths) {
    x = values(name + "/x", pack.T() * C, 3);
    w = values(name + "/w", C * 4);
    dy = values(name + "/dy", pack.T() * C);
    dw = values(name + "/dw", C * 4);
  }
};

struct ConvGradients {
  std::vector<float> dx, dw;
  bool operator==(const ConvGradients&) const = default;
};

ConvGradients run(Context& ctx, const ConvProblem& p, bool want_dw = true) {
  const int64_t T = p.pack.T();
  Buffer x(ctx, p.x), w(ctx, p.w), dy(ctx, p.dy), dx(ctx, T * p.C), dw(ctx, p.dw);
  conv_silu_backward(ctx, {.x = x.view({T, p.C}),
                           .w = w.view({p.C, 4}),
                           .packing = p.pack.packing(),
                           .dy = dy.view({T, p.C}),
                           .dx = dx.view({T, p.C}),
                           .dw = want_dw ? dw.view({p.C, 4}) : View()});
  EXPECT_TRUE(dx.guards_intact() && dw.guards_intact());
  return {dx.fetch(), dw.fetch()};
}

// By the complex step, a channel of a sequence at a time.
std::pair<Doubles, Doubles> reference_gradients(const ConvProblem& p) {
  Doubles dx(p.x.size()), dw = doubles(p.dw);
  for (int64_t n = 0; n < p.pack.N(); ++n)
    for (int64_t c = 0; c < p.C; ++c) {
      const int64_t a = p.pack.start[size_t(n)], T = p.pack.start[size_t(n) + 1] - a;
      Doubles all(p.w.begin() + 4 * c, p.w.begin() + 4 * c + 4), dy;
      for (int64_t t = a; t < a + T; ++t) {
        all.push_back(p.x[size_t(t * p.C + c)]);
        dy.push_back(p.dy[size_t(t * p.C + c)]);
      }
      const auto g = ref::complex_step(
          [&](const ref::Complexes& wx) {
            const ref::Complexes w(wx.begin(), wx.begin() + 4), x(wx.begin() + 4, wx.end());
            return ref::weighted(dy, ref::conv_silu(x, w, ref::Complexes(3), T, 1).y);
          },
          all);
      for (int64_t j = 0; j < 4; ++j) dw[size_t(4 * c + j)] += g[size_t(j)];
      for (int64_t t = 0; t < T; ++t) dx[size_t((a + t) * p.C + c)] = g[size_t(4 + t)];
    }
  return {dx, dw};
}

// silu' is at most 1.1 and |dy| < 1: dx has four terms below 1.1, dw T terms below 3.3; a dozen roundings each. s is up
// to 12 with an error of 1e-6, which silu' passes on at less than a half.
testing::AssertionResult follows(const ConvProblem& p, const ConvGradients& got) {
  const auto [dx, dw] = reference_gradients(p);
  const auto result = close(got.dx, dx, 12 * 6e-8, 4.4);
  return result ? close(got.dw, dw, 12 * 6e-8, 3.3 * double(8 + p.pack.T() / 4)) : result;
}

TEST(ConvBackward, FollowsTheComplexStepAtEveryLengthAndWidth) {
  CpuContext ctx;
  for (const int64_t T : {0, 1, 2, 3, 4, 5, 63, 64, 65, 66, 67, 68, 130})
    for (const int64_t C : {1, 16, 20, 129}) {
      const std::string what = cat("conv_back/T", T, "_C", C);
      const ConvProblem p(what, {T}, C);
      EXPECT_TRUE(follows(p, run(ctx, p))) << what;
    }
}

TEST(ConvBackward, NothingCrossesFromOneSequenceToTheNext) {
  const ConvProblem p("conv_back/ragged", {61, 0, 1, 2, 3, 0, 0, 70, 4, 0}, 20);
  CpuContext one(1), two(2), three(3);
  const auto got = run(two, p);
  EXPECT_TRUE(follows(p, got));
  EXPECT_EQ(run(one, p), got);
  EXPECT_EQ(run(three, p), got);
  auto without = run(two, p, false);
  EXPECT_EQ(without.dx, got.dx);
  EXPECT_EQ(without.dw, p.dw);
}

TEST(ConvBackward, HugeInputsGiveFiniteGradientsAndNaNStays) {
  CpuContext ctx;
  ConvProblem p("conv_back/huge", {5}, 20);
  for (size_t i = 0; i < p.x.size(); ++i) p.x[i] *= i % 2 ? 1e3f : 1e30f;
  for (float y : run(ctx, p).dx) EXPECT_TRUE(std::isfinite(y));
  p.x[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run(ctx, p).dx[0]));
}

TEST(ConvBackward, SabotageIsNoticed) {
  CpuContext ctx;
  ConvProblem p("conv_back/sabotage", {9, 7}, 20);
  const auto got = run(ctx, p);
  ASSERT_TRUE(follows(p, got));
  auto bad = got;
  bad.dx[50] += 2e-5f;
  EXPECT_FALSE(follows(p, bad));
  bad = got;
  bad.dw[7] += 1e-4f;
  EXPECT_FALSE(follows(p, bad));
  ConvProblem joined = p;  // as if the second sequence went on from the first
  joined.pack = Pack({16});
  EXPECT_FALSE(follows(p, run(ctx, joined)));
}

TEST(ConvBackward, TheDoorRefuses) {
  CpuContext ctx;
  const ConvProblem p("conv_back/door", {4}, 8);
  const auto refused = [&](auto change) {
    ConvProblem q = p;
    Buffer x(ctx, p.x), w(ctx, p.w), dy(ctx, p.dy), dx(ctx, 4 * 8), dw(ctx, p.dw);
    ConvBackward a{.x = x.view({4, 8}),
                   .w = w.view({8, 4}),
                   .packing = q.pack.packing(),
                   .dy = dy.view({4, 8}),
                   .dx = dx.view({4, 8}),
                   .dw = dw.view({8, 4})};
    change(a, q.pack);
    try {
      conv_silu_backward(ctx, a);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused([](auto&, auto&) {}), "accepted");
  EXPECT_EQ(refused([](auto& a, auto&) { a.w.shape = {8, 3}; }), "conv_silu_backward: w must be [8,4], got [8,3]");
  EXPECT_EQ(refused([](auto& a, auto&) { a.dw.shape = {4, 8}; }), "conv_silu_backward: dw must be [8,4], got [4,8]");
  EXPECT_EQ(refused([](auto& a, auto&) { a.dx.data = const_cast<void*>(a.x.data); }),
            "conv_silu_backward: dx may not be x's memory");
  EXPECT_EQ(refused([](auto& a, auto&) { a.dx.data = const_cast<void*>(a.dy.data); }),
            "conv_silu_backward: dx may not be dy's memory");
  EXPECT_EQ(refused([](auto& a, auto&) { a.dy.dtype = Dtype::bf16; }), "conv_silu_backward: dy must be f32, got bf16");
  EXPECT_EQ(refused([](auto&, auto& k) { k.start[1] = 3; }),
            "conv_silu_backward: the packing ends at token 3, the tensors have 4");
  CpuContext small(1, Precision::exact, 16);
  EXPECT_THROW(run(small, p), Error);
}

}  // namespace
