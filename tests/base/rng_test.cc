// Known answers published with Random123 (kat_vectors, philox4x32 of 10 rounds).
#include "base/rng.h"

#include <gtest/gtest.h>

#include "base/normal.h"

namespace kda {
namespace {

TEST(Philox, KnownAnswers) {
  using Block = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox::block(0, {0, 0, 0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox::block(~0ull, {~0u, ~0u, ~0u, ~0u}), (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // digits of pi: counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0
  EXPECT_EQ(Philox::block(0x299f31d0a4093822ull, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UniformsStayInsideTheirRange) {
  EXPECT_EQ(uniform24(0), 0.0f);
  EXPECT_LT(uniform24(~0u), 1.0f);
  EXPECT_EQ(uniform24(0x80000000u), 0.5f);
  EXPECT_EQ(uniform53(0, 0), 0.0);
  EXPECT_LT(uniform53(~0u, ~0u), 1.0);
  EXPECT_EQ(uniform53(0x40000000u, 0), 0.25);
}

TEST(Philox, NormalsAreNormal) {
  EXPECT_EQ(normals({0, 0, 0, 0}), (std::array<double, 2>{0, 0}));
  constexpr int kBlocks = 50'000;
  double sum = 0, squares = 0, fourths = 0, products = 0, within = 0;
  for (uint32_t i = 0; i < kBlocks; ++i) {
    const auto x = normals(Philox::block(1, {i, 0, 0, 0}));
    products += x[0] * x[1];
    for (const double v : x) sum += v, squares += v * v, fourths += v * v * v * v, within += std::abs(v) < 1;
  }
  constexpr double n = 2 * kBlocks;  // four standard errors each: 1, sqrt 2, sqrt 96, 1 and 0.465 over root n
  EXPECT_NEAR(sum / n, 0, 0.013);
  EXPECT_NEAR(squares / n, 1, 0.018);
  EXPECT_NEAR(fourths / n, 3, 0.124);
  EXPECT_NEAR(products / kBlocks, 0, 0.018);
  EXPECT_NEAR(within / n, 0.682689, 0.006);
}

}  // namespace
}  // namespace kda
