// Known answers published with Random123 (kat_vectors, philox4x32 of 10 rounds).
#include "base/rng.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace kda
