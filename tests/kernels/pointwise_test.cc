#include "kernels/pointwise.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/ref/pointwise.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

struct Result {
  std::vector<float> add, bias, relu2, swiglu;
  bool operator==(const Result&) const = default;
};

Result run(int threads, const std::vector<float>& x, const std::vector<float>& y, int64_t R, int64_t D) {
  CpuContext ctx(threads, Precision::exact, 64);
  const std::vector<float> row(x.begin(), x.begin() + (R ? D : 0));
  Buffer in(ctx, x), add(ctx, y), biased(ctx, y), squared(ctx, R * D), gated(ctx, R * D);
  Buffer bias(ctx, R ? row : std::vector<float>(size_t(D)));
  const Shape s{R, D};
  add_rows(ctx, {.x = in.view(s), .y = add.view(s)});
  add_bias(ctx, {.bias = bias.view({D}), .y = biased.view(s)});
  relu2(ctx, {.x = in.view(s), .y = squared.view(s)});
  swiglu(ctx, {.gate = in.view(s), .up = add.view(s), .y = gated.view(s)});
  for (Buffer* b : {&in, &add, &biased, &squared, &gated, &bias}) EXPECT_TRUE(b->guards_intact());
  return {add.fetch(), biased.fetch(), squared.fetch(), gated.fetch()};
}

TEST(Pointwise, EqualsReferenceAtSizesAroundEachBlock) {
  for (int64_t D : {1, 3, 8, 15, 16, 17, 31, 32, 33, 1000})
    for (int64_t R : {0, 1, 3, 40}) {
      const auto x = values("x", R * D, 4), y = values("y", R * D, 4);
      const Result got = run(2, x, y, R, D);
      for (size_t i = 0; i < x.size(); ++i) {
        EXPECT_EQ(got.add[i], x[i] + y[i]);
        EXPECT_EQ(got.bias[i], y[i] + x[i % size_t(D)]);
      }
      EXPECT_TRUE(close(got.relu2, ref::relu2(wide(x)), 6e-8, 16));
      // A few roundings of 2^-24 each on a product of at most 4 * 8.
      EXPECT_TRUE(close(got.swiglu, ref::swiglu(wide(x), wide(got.add)), 4e-7, 32));
    }
}

TEST(Pointwise, SwigluIsRightFarOut) {
  const std::vector<float> gate{-1e30f, -200, -104.5f, -88,    -20, -1e-20f, 0,
                                1e-20f, 20,   88.5f,   104.5f, 200, 1e30f,   -0.0f};
  const std::vector<float> one(gate.size(), 1);
  CpuContext ctx(1, Precision::exact, 64);
  Buffer g(ctx, gate), u(ctx, one), y(ctx, int64_t(gate.size()));
  const Shape s{1, int64_t(gate.size())};
  swiglu(ctx, {.gate = g.view(s), .up = u.view(s), .y = y.view(s)});
  const auto got = y.fetch();
  for (size_t i = 0; i < gate.size(); ++i) {
    const double want = double(gate[i]) / (1 + std::exp(-double(gate[i])));
    EXPECT_NEAR(got[i], want, 4e-7 * std::abs(want) + 1e-40) << gate[i];
  }
}

TEST(Pointwise, NansStay) {
  const float nan = std::nanf("");
  const std::vector<float> x{1, nan, 2}, y{nan, 1, 1};
  const Result got = run(1, x, y, 1, 3);
  EXPECT_TRUE(std::isnan(got.relu2[1]) && std::isnan(got.swiglu[1]) && std::isnan(got.add[0]));
  EXPECT_EQ(got.relu2[2], 4);
}

TEST(Pointwise, InPlaceAndAnyThreads) {
  const int64_t R = 9, D = 5003;
  const auto x = values("x", R * D), y = values("y", R * D);
  const Result one = run(1, x, y, R, D);
  EXPECT_TRUE(run(2, x, y, R, D) == one);
  EXPECT_TRUE(run(3, x, y, R, D) == one);
  CpuContext ctx(2, Precision::exact, 64);
  Buffer a(ctx, x), b(ctx, x), u(ctx, one.add), v(ctx, one.add), g(ctx, x);
  const Shape s{R, D};
  relu2(ctx, {.x = a.view(s), .y = a.view(s)});
  swiglu(ctx, {.gate = b.view(s), .up = u.view(s), .y = b.view(s)});
  swiglu(ctx, {.gate = g.view(s), .up = v.view(s), .y = v.view(s)});
  EXPECT_EQ(a.fetch(), one.relu2);
  EXPECT_EQ(b.fetch(), one.swiglu);
  EXPECT_EQ(v.fetch(), one.swiglu);
}

TEST(Pointwise, RefusesWrongShapes) {
  CpuContext ctx(1, Precision::exact, 64);
  std::vector<float> m(8);
  const View a = view(m.data(), {2, 4}), b = view(m.data(), {4, 2}), c = view(m.data(), {4});
  EXPECT_THROW(add_rows(ctx, {.x = a, .y = b}), Error);
  EXPECT_THROW(add_bias(ctx, {.bias = c, .y = b}), Error);
  EXPECT_THROW(relu2(ctx, {.x = a, .y = b}), Error);
  EXPECT_THROW(relu2(ctx, {.x = c, .y = c}), Error);
  EXPECT_THROW(swiglu(ctx, {.gate = a, .up = b, .y = a}), Error);
}

}  // namespace
}  // namespace kda::test
