#include "base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "base/error.h"

namespace kda {
namespace {

TEST(ThreadPool, EveryTaskRunsOnce) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    for (int64_t tasks : {0, 1, 2, 3, 100}) {
      std::vector<std::atomic<int>> seen(size_t(tasks) + 1);
      for (int round = 0; round < 50; ++round)
        pool.run(tasks, [&](int64_t t, int worker) {
          ASSERT_LT(worker, threads);
          ++seen[size_t(t)];
        });
      for (int64_t t = 0; t < tasks; ++t) EXPECT_EQ(seen[size_t(t)], 50) << t;
    }
  }
}

TEST(ThreadPool, FirstErrorReachesTheCallerAndThePoolGoesOn) {
  ThreadPool pool(3);
  EXPECT_THROW(pool.run(100, [](int64_t t, int) { KDA_CHECK(t != 17, "task ", t); }), Error);
  std::atomic<int> n{0};
  pool.run(100, [&](int64_t, int) { ++n; });
  EXPECT_EQ(n, 100);
}

TEST(ThreadPool, RefusesNegativeThreads) { EXPECT_THROW(ThreadPool(-1), Error); }

}  // namespace
}  // namespace kda
