#include "kernels/optimizer.h"

#include <gtest/gtest.h>

#include <hwy/targets.h>

#include "tests/check.h"
#include "tests/ref/optimizer.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

struct State {
  std::vector<float> p, m, v;
  std::vector<bf16> working;
};

constexpr float kLr = 0.01f, kBeta1 = 0.9f, kBeta2 = 0.95f, kEps = 1e-8f, kDecay = 0.1f, kScale = 0.7f;

std::vector<float> gradient(int step, int64_t n) { return values(cat("g", step), n); }

State run(int threads, int64_t n, int steps) {
  CpuContext ctx(threads, Precision::exact, 1);
  Buffer p(ctx, values("p", n)), m(ctx, std::vector<float>(size_t(n))), v(ctx, std::vector<float>(size_t(n)));
  std::vector<bf16> working(size_t(n) + 1, bf16(7.0f));
  for (int step = 1; step <= steps; ++step) {
    const Buffer g(ctx, gradient(step, n));
    adamw(ctx, {.p = p.view({n}),
                .g = g.view({n}),
                .m = m.view({n}),
                .v = v.view({n}),
                .working = view(working.data(), {n}),
                .lr = kLr,
                .beta1 = kBeta1,
                .beta2 = kBeta2,
                .eps = kEps,
                .decay = kDecay,
                .step = step,
                .grad_scale = kScale});
  }
  EXPECT_TRUE(p.guards_intact() && m.guards_intact() && v.guards_intact());
  EXPECT_EQ(float(working.back()), 7.0f);
  working.pop_back();
  return {p.fetch(), m.fetch(), v.fetch(), working};
}

ref::AdamWState wanted(int64_t n, int steps) {
  ref::AdamWState s{wide(values("p", n)), std::vector<double>(size_t(n)), std::vector<double>(size_t(n))};
  for (int step = 1; step <= steps; ++step)
    ref::adamw(s, wide(gradient(step, n)), double(kLr), double(kBeta1), double(kBeta2), double(kEps), double(kDecay),
               step, double(kScale));
  return s;
}

void check(int64_t n, int steps) {
  SCOPED_TRACE(cat(n, " elements, ", steps, " steps"));
  const State got = run(2, n, steps);
  const ref::AdamWState want = wanted(n, steps);
  // Each step rounds a few times; m and v forget geometrically; a step moves p by lr times m / sqrt(v), which is at
  // most 1 / sqrt(1 - beta2) and off by at most that times a few roundings.
  const double e = std::ldexp(1, -24);
  EXPECT_TRUE(close(got.m, want.m, 20 * e, 1));
  EXPECT_TRUE(close(got.v, want.v, 40 * e, 1));
  EXPECT_TRUE(close(got.p, want.p, steps * e * (4 + 200 * double(kLr)), 1.1));
  for (size_t i = 0; i < size_t(n); ++i) EXPECT_EQ(got.working[i].bits, bf16(got.p[i]).bits) << i;
}

TEST(AdamW, EqualsTheReference) {
  for (int64_t n : {0, 1, 3, 15, 16, 17, 33, 4095, 4096, 4097, 10000}) check(n, 3);
  check(50, 100);
}

TEST(AdamW, OnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    check(37, 2);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

// One step by hand: m = 0.1, v = 0.01 from g = 1 are unbiased to 1 and 1, so p moves by lr after the decay.
TEST(AdamW, FirstStepByHand) {
  CpuContext ctx(1);
  std::vector<float> p{2}, g{4}, m{0}, v{0};
  const AdamW a{.p = view(p.data(), {1}),
                .g = view(std::as_const(g).data(), {1}),
                .m = view(m.data(), {1}),
                .v = view(v.data(), {1}),
                .working = {},
                .lr = 0.5f,
                .beta1 = 0.9f,
                .beta2 = 0.99f,
                .eps = 0,
                .decay = 0.2f,
                .step = 1,
                .grad_scale = 0.25f};
  adamw(ctx, a);
  EXPECT_FLOAT_EQ(m[0], 0.1f);
  EXPECT_NEAR(v[0], 0.01f, 2e-8);  // 1 - 0.99 in single
  EXPECT_FLOAT_EQ(p[0], 2 * 0.9f - 0.5f);
}

TEST(AdamW, DoesNotDependOnThreads) {
  const State one = run(1, 50001, 2), three = run(3, 50001, 2);
  EXPECT_EQ(one.p, three.p);
  EXPECT_EQ(one.m, three.m);
  EXPECT_EQ(one.v, three.v);
}

TEST(AdamW, ComparisonCanFail) {
  const State got = run(1, 40, 2);
  ref::AdamWState want = wanted(40, 2);
  EXPECT_TRUE(close(got.p, want.p, 1e-6, 1.1));
  want.p[39] += double(kLr) * 1e-3;
  EXPECT_FALSE(close(got.p, want.p, 1e-6, 1.1));
}

float squares(int threads, const std::vector<float>& x, float before) {
  CpuContext ctx(threads, Precision::exact, 1);
  const int64_t n = int64_t(x.size());
  ctx.workspace = host_tensor(Dtype::u8, {int64_t(sum_squares_workspace_bytes(ctx, n))});
  const Buffer in(ctx, x);
  Buffer sum(ctx, std::vector<float>{before});
  sum_squares(ctx, {.x = in.view({n}), .sum = sum.view({1})});
  EXPECT_TRUE(sum.guards_intact());
  return sum.fetch()[0];
}

TEST(SumSquares, EqualsTheReferenceOnAnyThreads) {
  for (int64_t n : {0, 1, 7, 16, 17, 65535, 65536, 65537, 200001}) {
    const auto x = values("x", n, 3);
    double want = 2.5;
    for (float v : x) want += double(v) * double(v);
    const float got = squares(1, x, 2.5f);
    EXPECT_NEAR(double(got), want, 1.3e-7 * want) << n;  // rounded to f32 twice
    EXPECT_EQ(got, squares(2, x, 2.5f));
    EXPECT_EQ(got, squares(3, x, 2.5f));
  }
  EXPECT_TRUE(std::isnan(squares(1, {1, std::nanf("")}, 0)));
}

TEST(Optimizer, RefusesWrongShapes) {
  CpuContext ctx(1);
  std::vector<float> x(8);
  std::vector<bf16> b(8);
  const View all = view(x.data(), {8}), part = view(x.data(), {7});
  AdamW good{.p = all,
             .g = all,
             .m = all,
             .v = all,
             .working = view(b.data(), {2, 4}),
             .lr = 1,
             .beta1 = 0.9f,
             .beta2 = 0.9f,
             .eps = 1,
             .decay = 0,
             .step = 1,
             .grad_scale = 1};
  EXPECT_NO_THROW(adamw(ctx, good));
  auto bad = good;
  bad.m = part;
  EXPECT_THROW(adamw(ctx, bad), Error);
  bad = good;
  bad.working = all;
  EXPECT_THROW(adamw(ctx, bad), Error);
  bad = good;
  bad.step = 0;
  EXPECT_THROW(adamw(ctx, bad), Error);
  bad = good;
  bad.beta2 = 1;
  EXPECT_THROW(adamw(ctx, bad), Error);
  EXPECT_THROW(sum_squares(ctx, {.x = all, .sum = part}), Error);
}

}  // namespace
}  // namespace kda::test
