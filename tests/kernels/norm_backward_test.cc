#include "kernels/norm_backward.h"

#include <gtest/gtest.h>

#include <hwy/targets.h>

#include "tests/check.h"
#include "tests/ref/gradient.h"
#include "tests/ref/norm.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

struct Gradients {
  std::vector<float> dx, dw;
  bool operator==(const Gradients&) const = default;
};

constexpr float kEps = 1e-5f;

// Starts from dx = 0.5 and dw = 0.25: both are added to.
Gradients run(int threads, int64_t R, int64_t D, bool want_dw = true) {
  CpuContext ctx(threads, Precision::exact, 1);
  ctx.workspace = host_tensor(Dtype::u8, {int64_t(rms_norm_backward_workspace_bytes(ctx, R, D))});
  const Buffer x(ctx, values("x", R * D, 3)), w(ctx, values("w", D)), dy(ctx, values("dy", R * D));
  Buffer dx(ctx, std::vector<float>(size_t(R * D), 0.5f)), dw(ctx, std::vector<float>(size_t(D), 0.25f));
  rms_norm_backward(ctx, {.x = x.view({R, D}),
                          .w = w.view({D}),
                          .dy = dy.view({R, D}),
                          .dx = dx.view({R, D}),
                          .dw = want_dw ? dw.view({D}) : View{},
                          .eps = kEps});
  EXPECT_TRUE(dx.guards_intact() && dw.guards_intact());
  return {dx.fetch(), dw.fetch()};
}

struct Wanted {
  std::vector<double> dx, dw;
};
Wanted wanted(int64_t R, int64_t D) {
  const auto x = wide(values("x", R * D, 3)), w = wide(values("w", D)), dy = wide(values("dy", R * D));
  Wanted all{{}, std::vector<double>(size_t(D), 0.25)};
  const auto cw = ref::complex_of(w);
  for (int64_t r = 0; r < R; ++r) {  // a row's dx is its own matter, and dw is a sum over rows
    const std::vector<double> row(x.begin() + r * D, x.begin() + (r + 1) * D);
    const std::vector<double> cotangent(dy.begin() + r * D, dy.begin() + (r + 1) * D);
    const auto cx = ref::complex_of(row);
    const auto dx = ref::gradient([&](const auto& z) { return ref::rms_norm(z, cw, double(kEps)); }, row, cotangent);
    const auto dw = ref::gradient([&](const auto& z) { return ref::rms_norm(cx, z, double(kEps)); }, w, cotangent);
    for (size_t d = 0; d < size_t(D); ++d) {
      all.dx.push_back(0.5 + dx[d]);
      all.dw[d] += dw[d];
    }
  }
  return all;
}

// With x drawn from (-3,3) r is about 0.6, and 316 where a row is nearly zero, which these sizes do not draw. The sums
// over D add in at least 8 lanes; |dy x r| <= sqrt(D), so dw adds up R of them, in pieces.
void check(int64_t R, int64_t D) {
  SCOPED_TRACE(cat(R, "x", D));
  const Gradients got = run(2, R, D);
  const Wanted want = wanted(R, D);
  double scale = 1;
  for (double x : want.dx) scale = std::max(scale, std::abs(x));
  EXPECT_TRUE(close(got.dx, want.dx, (12 + double(D) / 8) * 6e-8, scale));
  EXPECT_TRUE(close(got.dw, want.dw, (12 + double(D) / 8 + double(R)) * 6e-8, std::sqrt(double(D)) + double(R)));
}

TEST(RmsNormBackward, EqualsTheComplexStepAtSizesAroundEachBlock) {
  for (int64_t D : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 129, 256})
    for (int64_t R : {0, 1, 2, 5}) check(R, D);
  check(1, 1000);
  check(600, 33);  // two pieces of rows
}

TEST(RmsNormBackward, OnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    check(3, 37);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

TEST(RmsNormBackward, ComparisonCanFail) {
  const Gradients got = run(1, 3, 17);
  Wanted want = wanted(3, 17);
  EXPECT_TRUE(close(got.dw, want.dw, 1e-6, 4));
  want.dw[16] += 1e-4;
  EXPECT_FALSE(close(got.dw, want.dw, 1e-6, 4));
  want.dx[50] -= 1e-4;
  EXPECT_FALSE(close(got.dx, want.dx, 1e-6, 4));
}

TEST(RmsNormBackward, DoesNotDependOnThreadsNorOnDw) {
  const Gradients one = run(1, 1003, 130);
  EXPECT_EQ(one, run(2, 1003, 130));
  EXPECT_EQ(one, run(3, 1003, 130));
  const Gradients without = run(2, 1003, 130, false);
  EXPECT_EQ(without.dx, one.dx);
  EXPECT_EQ(without.dw, std::vector<float>(130, 0.25f));
}

TEST(RmsNormBackward, RefusesWrongShapes) {
  CpuContext ctx(1);
  std::vector<float> m(8), to(8), w(4);
  const RmsNormBackward good{.x = view(m.data(), {2, 4}),
                             .w = view(w.data(), {4}),
                             .dy = view(m.data(), {2, 4}),
                             .dx = view(to.data(), {2, 4}),
                             .dw = View{},
                             .eps = 1e-5f};
  EXPECT_NO_THROW(rms_norm_backward(ctx, good));
  auto bad = good;
  bad.w.shape = {3};
  EXPECT_THROW(rms_norm_backward(ctx, bad), Error);
  bad = good;
  bad.dx = view(m.data(), {2, 4});
  EXPECT_THROW(rms_norm_backward(ctx, bad), Error);
  bad = good;
  bad.dw = view(w.data(), {2});
  EXPECT_THROW(rms_norm_backward(ctx, bad), Error);
  bad = good;
  bad.eps = -1;
  EXPECT_THROW(rms_norm_backward(ctx, bad), Error);
}

}  // namespace
}  // namespace kda::test
