#include "kernels/logits.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/ref/logits.h"

namespace kda::test {
namespace {

std::vector<float> run(int threads, const std::vector<float>& logits, const std::vector<int32_t>& target) {
  CpuContext ctx(threads, Precision::exact, 64);
  const int64_t R = int64_t(target.size()), V = R ? int64_t(logits.size()) / R : 1;
  Buffer in(ctx, logits), loss(ctx, R);
  token_loss(ctx, {.logits = in.view({R, V}), .target = view(target.data(), {R}), .loss = loss.view({R})});
  EXPECT_TRUE(loss.guards_intact());
  return loss.fetch();
}

TEST(TokenLoss, EqualsReference) {
  for (int64_t V : {1, 2, 7, 15, 16, 17, 260, 4096, 128004})
    for (float size : {1.0f, 30.0f, 3000.0f}) {
      const auto logits = values("logits", 3 * V, size);
      const std::vector<int32_t> target{int32_t(V - 1), -1, int32_t(V / 2)};
      const auto want = ref::token_loss(std::vector<double>(logits.begin(), logits.end()), target);
      // Terms within an ulp or two, added mostly in double; the difference is rounded once to single.
      EXPECT_TRUE(close(run(2, logits, target), want, 2.5e-7, std::max(1.0, want[0] + want[2]))) << V << " " << size;
    }
}

TEST(TokenLoss, WhatIsNotFiniteShows) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  std::vector<float> logits(40, 0.5f);
  logits[3] = -inf;
  EXPECT_NEAR(run(1, logits, {0})[0], std::log(39.0), 1e-6);
  EXPECT_EQ(run(1, logits, {3})[0], inf);
  logits[33] = nan;
  EXPECT_TRUE(std::isnan(run(1, logits, {0})[0]));
  logits[33] = 0, logits[5] = nan;
  EXPECT_TRUE(std::isnan(run(1, logits, {0})[0]));
  EXPECT_TRUE(std::isnan(run(1, std::vector<float>(40, -inf), {0})[0]));
}

TEST(TokenLoss, ARowIsTheSameAloneAndAnyThreads) {
  const int64_t R = 9, V = 1001;
  const auto logits = values("rows", R * V, 10);
  std::vector<int32_t> target;
  for (int64_t r = 0; r < R; ++r) target.push_back(int32_t(r * 100));
  const auto all = run(1, logits, target);
  EXPECT_EQ(run(2, logits, target), all);
  EXPECT_EQ(run(3, logits, target), all);
  for (int64_t r = 0; r < R; ++r)
    EXPECT_EQ(run(1, {logits.begin() + r * V, logits.begin() + (r + 1) * V}, {target[size_t(r)]})[0], all[size_t(r)]);
}

TEST(TokenLoss, RefusesTargetsOutside) {
  EXPECT_THROW(run(1, values("l", 10), {10}), Error);
  EXPECT_THROW(run(1, values("l", 10), {-2}), Error);
}

}  // namespace
}  // namespace kda::test
