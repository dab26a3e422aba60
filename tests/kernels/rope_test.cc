#include "kernels/rope.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/ref/rope.h"

namespace kda::test {
namespace {

std::vector<float> run(int threads, const std::vector<float>& x, const std::vector<int32_t>& position,
                       const std::vector<float>& inv_freq, int64_t H, float factor = 1) {
  CpuContext ctx(threads, Precision::exact, 64);
  const int64_t T = int64_t(position.size()), half = int64_t(inv_freq.size());
  Buffer m(ctx, x);
  rope(ctx, {.x = m.view({T, H, 2 * half}),
             .position = view(position.data(), {T}),
             .inv_freq = view(inv_freq.data(), {half}),
             .factor = factor});
  EXPECT_TRUE(m.guards_intact());
  return m.fetch();
}

std::vector<float> frequencies(int64_t half) {
  std::vector<float> f;
  for (int64_t i = 0; i < half; ++i) f.push_back(float(std::pow(10000.0, -double(i) / double(half))));
  return f;
}

TEST(Rope, EqualsReferenceUpToFarPositions) {
  for (int64_t half : {1, 3, 16, 64, 65, 130}) {
    const std::vector<int32_t> position{0, 1, 2, 63, 1000, 65535, 131071, 1048575};
    const int64_t H = 3, T = int64_t(position.size());
    const auto x = values("x", T * H * 2 * half), f = frequencies(half);
    const auto want = ref::rope(std::vector<double>(x.begin(), x.end()), position, f, size_t(H), 1.25);
    // Sine, factor, product and sum each round once: 2^-24 of at most 1.25 * (1 + 1).
    EXPECT_TRUE(close(run(2, x, position, f, H, 1.25f), want, 4 * 6e-8, 2.5)) << half;
  }
}

TEST(Rope, AnglesAreRoundedToSingle) {
  // With the angle in double the cosine at 65535 would be off by far more than a rounding.
  const std::vector<float> f{0.7071067f};
  const auto got = run(1, {1, 0}, {65535}, f, 1);
  EXPECT_NEAR(got[0], std::cos(double(65535.0f * 0.7071067f)), 1e-7);
  EXPECT_GT(std::abs(got[0] - std::cos(65535.0 * double(0.7071067f))), 1e-5);
}

TEST(Rope, GoldenYarn) {
  KDA_NEED(path, "yarn_afm.safetensors");
  const GoldenFile file(path);
  const auto position = file["positions"].ids();
  const auto f = file["inv_freq"].floats();
  const auto cos = file["cos"].floats(), sin = file["sin"].floats();
  const float factor = file["attention_factor"].floats()[0];
  const int64_t T = int64_t(position.size()), half = int64_t(f.size()), d = 2 * half;
  // (1,0) turns into (cos, sin), (0,1) into (-sin, cos): two heads show both halves of the file's arrays.
  std::vector<float> x(size_t(T * 2 * d)), want(x.size());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < half; ++i) {
      float *x0 = &x[size_t(t * 2 * d)], *w0 = &want[size_t(t * 2 * d)];
      x0[i] = 1, x0[d + half + i] = 1;
      w0[i] = cos[size_t(t * d + i)], w0[half + i] = sin[size_t(t * d + half + i)];
      w0[d + i] = -sin[size_t(t * d + i)], w0[d + half + i] = cos[size_t(t * d + half + i)];
    }
  EXPECT_TRUE(close(run(2, x, position, f, 2, factor), want, 1e-6, 1));
  want[5] += 1e-5f;
  EXPECT_FALSE(close(run(2, x, position, f, 2, factor), want, 1e-6, 1));
}

TEST(Rope, ARowIsTheSameAloneAndAnyThreads) {
  const int64_t H = 5, half = 32, T = 300;
  std::vector<int32_t> position;
  for (int64_t t = 0; t < T; ++t) position.push_back(int32_t(t * 31));
  const auto x = values("x", T * H * 2 * half), f = frequencies(half);
  const auto all = run(1, x, position, f, H);
  EXPECT_EQ(run(2, x, position, f, H), all);
  EXPECT_EQ(run(3, x, position, f, H), all);
  const int64_t row = H * 2 * half;
  for (int64_t t : {0, 150, 299})
    EXPECT_EQ(run(1, {x.begin() + t * row, x.begin() + (t + 1) * row}, {position[size_t(t)]}, f, H),
              std::vector<float>(all.begin() + t * row, all.begin() + (t + 1) * row));
}

TEST(Rope, RefusesWrongShapes) {
  CpuContext ctx(1, Precision::exact, 64);
  std::vector<float> x(12), f(2);
  std::vector<int32_t> p(1);
  EXPECT_THROW(
      rope(ctx, {.x = view(x.data(), {1, 4, 3}), .position = view(p.data(), {1}), .inv_freq = view(f.data(), {1})}),
      Error);
  EXPECT_THROW(
      rope(ctx, {.x = view(x.data(), {1, 3, 4}), .position = view(p.data(), {1}), .inv_freq = view(f.data(), {1})}),
      Error);
  EXPECT_THROW(
      rope(ctx, {.x = view(x.data(), {2, 3, 2}), .position = view(p.data(), {1}), .inv_freq = view(f.data(), {1})}),
      Error);
}

}  // namespace
}  // namespace kda::test
