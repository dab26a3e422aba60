#include "kernels/embedding.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"

namespace kda::test {
namespace {

template <class E>
void check_rows(int64_t vocabulary, int64_t D, int64_t T) {
  CpuContext ctx(2, Precision::exact, 64);
  const auto source = values("embedding", vocabulary * D);
  std::vector<E> table;
  for (float x : source) table.push_back(E(x));
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < T; ++t) ids.push_back(int32_t((t * 7 + 3) % vocabulary));
  Buffer y(ctx, T * D);
  embedding(ctx, {.table = view(static_cast<const E*>(table.data()), {vocabulary, D}),
                  .ids = view(static_cast<const int32_t*>(ids.data()), {T}),
                  .y = y.view({T, D})});
  const auto got = y.fetch();
  for (int64_t t = 0; t < T; ++t)
    for (int64_t d = 0; d < D; ++d)
      ASSERT_EQ(got[size_t(t * D + d)], float(table[size_t(ids[size_t(t)] * D + d)])) << t << " " << d;
  EXPECT_TRUE(y.guards_intact());
}

TEST(Embedding, RowsByIdInEveryDtype) {
  for (int64_t T : {0, 1, 3, 1000}) {
    check_rows<float>(13, 37, T);
    check_rows<bf16>(13, 37, T);
    check_rows<f16>(13, 37, T);
  }
}

TEST(Embedding, RefusesWrongShapes) {
  CpuContext ctx(1, Precision::exact, 64);
  std::vector<float> table(8), y(8);
  std::vector<int32_t> ids(2);
  const Embedding good{.table = view(table.data(), {2, 4}), .ids = view(ids.data(), {2}), .y = view(y.data(), {2, 4})};
  EXPECT_NO_THROW(embedding(ctx, good));
  auto bad = good;
  bad.y.shape = {2, 3};
  EXPECT_THROW(embedding(ctx, bad), Error);
  bad = good;
  bad.ids.dtype = Dtype::i64;
  EXPECT_THROW(embedding(ctx, bad), Error);
  bad = good;
  bad.table.dtype = Dtype::i8;
  EXPECT_THROW(embedding(ctx, bad), Error);
}

}  // namespace
}  // namespace kda::test
