#include "kernels/top_k.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "tests/check.h"
#include "tests/ref/loss.h"

namespace kda::test {
namespace {

struct Result {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
};

Result run(const std::vector<float>& x, int64_t R, int64_t k, int threads = 2) {
  CpuContext ctx(threads);
  Buffer in(ctx, x), out(ctx, R * k);
  Result r{.ids = std::vector<int32_t>(static_cast<size_t>(R * k), -7), .logprobs = {}};
  top_k(
      ctx,
      {.logits = in.view({R, int64_t(x.size()) / R}), .ids = view(r.ids.data(), {R, k}), .logprobs = out.view({R, k})});
  EXPECT_TRUE(in.guards_intact() && out.guards_intact());
  r.logprobs = out.fetch();
  return r;
}

TEST(TopK, EqualsASortedRow) {
  for (int64_t V : {1, 2, 17, 300, 5000})
    for (int64_t k : {1, 2, 16, 128, 300}) {
      if (k > V) continue;
      const int64_t R = 5;
      auto x = values("x", R * V, 5);
      for (float& v : x) v = std::round(v * 8) / 8;  // ties
      if (V >= 300)
        for (int64_t i = 0; i < V; ++i) x[size_t(i)] = float(i);  // rising: every value beats the ones before
      const Result got = run(x, R, k);
      for (int64_t r = 0; r < R; ++r) {
        const std::vector<double> row(x.begin() + r * V, x.begin() + (r + 1) * V);
        std::vector<int32_t> order(static_cast<size_t>(V));
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return row[size_t(a)] > row[size_t(b)]; });
        const auto l = ref::log_softmax(row);
        for (int64_t j = 0; j < k; ++j) {
          ASSERT_EQ(got.ids[size_t(r * k + j)], order[size_t(j)]) << V << " " << k << " " << r;
          EXPECT_NEAR(got.logprobs[size_t(r * k + j)], l[size_t(order[size_t(j)])],
                      2e-6 * std::max(1.0, double(V) / 16));
        }
      }
      EXPECT_EQ(run(x, R, k, 1).logprobs, got.logprobs);
    }
}

TEST(TopK, NaNShows) {
  auto x = values("x", 40);
  x[7] = std::numeric_limits<float>::quiet_NaN();
  const Result got = run(x, 2, 3);
  for (int j = 0; j < 3; ++j) {
    EXPECT_TRUE(std::isnan(got.logprobs[size_t(j)]));
    EXPECT_TRUE(got.ids[size_t(j)] >= 0 && got.ids[size_t(j)] < 20);
    EXPECT_FALSE(std::isnan(got.logprobs[size_t(3 + j)]));
  }
}

TEST(TopK, RefusesWrongShapes) {
  CpuContext ctx(1);
  std::vector<float> m(32);
  std::vector<int32_t> ids(32);
  EXPECT_THROW(top_k(ctx, {view(m.data(), {2, 4}), view(ids.data(), {2, 5}), view(m.data(), {2, 5})}), Error);
  EXPECT_THROW(top_k(ctx, {view(m.data(), {2, 4}), view(ids.data(), {2, 3}), view(m.data(), {2, 2})}), Error);
  EXPECT_THROW(top_k(ctx, {view(m.data(), {2, 4}), view(m.data(), {2, 3}), view(m.data(), {2, 3})}), Error);
}

}  // namespace
}  // namespace kda::test
