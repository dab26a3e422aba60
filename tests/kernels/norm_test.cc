#include "kernels/norm.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/ref/norm.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

std::vector<float> run(int threads, const std::vector<float>& x, const std::vector<float>& w, int64_t R, float eps,
                       bool in_place = false) {
  CpuContext ctx(threads, Precision::exact, 64);
  const int64_t D = int64_t(w.size());
  Buffer in(ctx, x), weight(ctx, w), out(ctx, R * D);
  rms_norm(ctx, {.x = in.view({R, D}), .w = weight.view({D}), .y = (in_place ? in : out).view({R, D}), .eps = eps});
  EXPECT_TRUE(in.guards_intact() && out.guards_intact());
  return (in_place ? in : out).fetch();
}

TEST(RmsNorm, EqualsReferenceAtSizesAroundEachBlock) {
  for (int64_t D : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 129, 256, 2560})
    for (int64_t R : {0, 1, 2, 5}) {
      const auto x = values("x", R * D, 3), w = values("w", D);
      const auto want = ref::rms_norm(wide(x), wide(w), 1e-5);
      // |y| <= sqrt(D) * |w|, reached when one element is the whole row; the sum adds at most D/4 roundings.
      const double tolerance = (4 + double(D) / 16) * 6e-8;
      EXPECT_TRUE(close(run(2, x, w, R, 1e-5f), want, tolerance, std::sqrt(double(D)))) << R << "x" << D;
      EXPECT_EQ(run(2, x, w, R, 1e-5f, true), run(2, x, w, R, 1e-5f)) << "in place";
    }
}

TEST(RmsNorm, EpsilonIsUnderTheRoot) {
  const std::vector<float> x{0, 0, 0, 0}, w{1, 1, 1, 1};
  EXPECT_EQ(run(1, x, w, 1, 1e-5f), x);
  const std::vector<float> tiny(4, 1e-3f);
  EXPECT_NEAR(run(1, tiny, w, 1, 1e-5f)[0], 1e-3 / std::sqrt(1e-6 + 1e-5), 1e-6);
}

TEST(RmsNorm, ARowIsTheSameAloneAndAnyThreads) {
  const int64_t R = 37, D = 1003;
  const auto x = values("rows", R * D), w = values("w", D);
  const auto all = run(1, x, w, R, 1e-6f);
  EXPECT_EQ(run(2, x, w, R, 1e-6f), all);
  EXPECT_EQ(run(3, x, w, R, 1e-6f), all);
  for (int64_t r : {0, 1, 17, 36}) {
    const std::vector<float> row(x.begin() + r * D, x.begin() + (r + 1) * D);
    EXPECT_EQ(run(1, row, w, 1, 1e-6f), std::vector<float>(all.begin() + r * D, all.begin() + (r + 1) * D));
  }
}

TEST(RmsNorm, RefusesWrongShapes) {
  CpuContext ctx(1, Precision::exact, 64);
  std::vector<float> m(8);
  const RmsNorm good{.x = view(m.data(), {2, 4}), .w = view(m.data(), {4}), .y = view(m.data(), {2, 4}), .eps = 1e-5f};
  auto bad = good;
  bad.w.shape = {3};
  EXPECT_THROW(rms_norm(ctx, bad), Error);
  bad = good;
  bad.y.shape = {4, 2};
  EXPECT_THROW(rms_norm(ctx, bad), Error);
  bad = good;
  bad.x.dtype = bad.y.dtype = Dtype::bf16;
  EXPECT_THROW(rms_norm(ctx, bad), Error);
  bad = good;
  bad.eps = -1;
  EXPECT_THROW(rms_norm(ctx, bad), Error);
}

}  // namespace
}  // namespace kda::test
