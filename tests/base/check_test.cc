// The comparisons of tests/check.h must be able to fail.
#include "tests/check.h"

#include <gtest/gtest.h>

namespace kda::test {
namespace {

TEST(Check, ComparisonsCanFail) {
  const std::vector<double> want{1, -2, 3};
  std::vector<float> got{1, -2, 3};
  EXPECT_TRUE(close(got, want, 1e-6, 3));
  EXPECT_EQ(relative_l2(got, want), 0);
  EXPECT_EQ(relative_max(got, want), 0);
  got[1] += 1e-3f;
  EXPECT_FALSE(close(got, want, 1e-6, 3));
  EXPECT_GT(relative_l2(got, want), 1e-4);
  EXPECT_GT(relative_max(got, want), 1e-4);
  got[1] = std::nanf("");
  EXPECT_FALSE(close(got, want, 1e9, 1e9));
  EXPECT_TRUE(std::isinf(relative_l2(got, want)));
  EXPECT_TRUE(std::isinf(relative_max(got, want)));
  got.pop_back();
  EXPECT_FALSE(close(got, want, 1e9, 1e9));
}

TEST(Check, BuffersSeeWritesOutside) {
  CpuContext ctx(1);
  Buffer b(ctx, 3);
  EXPECT_TRUE(std::isnan(b.fetch()[0]));
  EXPECT_TRUE(b.guards_intact());
  b.data()[3] = 0;
  EXPECT_FALSE(b.guards_intact());
}

}  // namespace
}  // namespace kda::test
