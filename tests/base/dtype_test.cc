// 16-bit floats against their definition: the nearest representable value, ties to the even one.
#include "base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kda {
namespace {

// The value of a bit pattern, from the format's definition.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t sign = bits >> (exponent_bits + mantissa_bits), mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = int(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  double v;
  if (exponent == (1 << exponent_bits) - 1)
    v = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    v = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  else
    v = std::ldexp(mantissa + double(1u << mantissa_bits), exponent - bias - mantissa_bits);
  return sign ? -v : v;
}

template <class T>
struct Format;
template <>
struct Format<bf16> {
  static constexpr int exponent = 8, mantissa = 7;
};
template <>
struct Format<f16> {
  static constexpr int exponent = 5, mantissa = 10;
};

template <class T>
double value_of(uint16_t bits) {
  return value_of(bits, Format<T>::exponent, Format<T>::mantissa);
}

// Positive bit pattern nearest to x >= 0, by search: patterns rise with their values.
template <class T>
uint16_t nearest(double x) {
  const uint16_t inf = ((1 << Format<T>::exponent) - 1) << Format<T>::mantissa;
  uint16_t low = 0, high = inf;  // value(low) <= x < value(high), infinity standing for the next power of two
  const auto value = [&](uint16_t b) {
    return b == inf
               ? 2 * value_of<T>(uint16_t(1 << Format<T>::mantissa)) * std::ldexp(1.0, (1 << Format<T>::exponent) - 3)
               : value_of<T>(b);
  };
  if (x >= value(inf)) return inf;
  while (high - low > 1) {
    const uint16_t mid = uint16_t((low + high) / 2);
    (value(mid) <= x ? low : high) = mid;
  }
  const double below = x - value(low), above = value(high) - x;
  return below < above || (below == above && low % 2 == 0) ? low : high;
}

template <class T>
void every_pattern_survives() {
  for (uint32_t b = 0; b < 65536; ++b) {
    T t;
    t.bits = uint16_t(b);
    const double want = value_of<T>(uint16_t(b));
    const float got = float(t);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << b;
      EXPECT_TRUE(std::isnan(float(T(got)))) << b;
    } else {
      ASSERT_EQ(double(got), want) << b;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << b;
      ASSERT_EQ(T(got).bits, b);
    }
  }
}

template <class T>
void rounds_to_nearest() {
  std::vector<float> values = {0.0f,     1e-45f,    1e-8f,    2.9e-8f,  3e-8f, 5.96e-8f,      6.1e-5f,  1.0f,
                               65504.0f, 65519.99f, 65520.0f, 65536.0f, 1e30f, 3.3895314e38f, 3.39e38f, 3.4028235e38f};
  for (uint32_t b = 0; b < 0x7f80; b += 7) {  // halfway between neighbours, and one float to either side
    const double lower = value_of<T>(uint16_t(b)), upper = value_of<T>(uint16_t(b + 1));
    const float middle = float((lower + upper) / 2);
    if (!std::isfinite(middle)) continue;
    values.insert(values.end(), {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)});
  }
  std::mt19937 random(3);
  for (int i = 0; i < 20'000; ++i) {
    const float x = std::bit_cast<float>(uint32_t(random()) & 0x7fffffffu);
    if (std::isfinite(x)) values.push_back(x);
  }
  for (float x : values) {
    if (!std::isfinite(x)) continue;
    const uint16_t want = nearest<T>(double(x));
    ASSERT_EQ(T(x).bits, want) << x;
    ASSERT_EQ(T(-x).bits, want | 0x8000u) << x;
  }
}

TEST(Dtype, Bf16) {
  every_pattern_survives<bf16>();
  rounds_to_nearest<bf16>();
  EXPECT_TRUE(std::isinf(float(bf16(INFINITY))));
  EXPECT_TRUE(std::isnan(float(bf16(std::bit_cast<float>(0x7f800001u)))));  // a NaN whose upper half alone is infinity
}

TEST(Dtype, F16) {
  every_pattern_survives<f16>();
  rounds_to_nearest<f16>();
  EXPECT_TRUE(std::isinf(float(f16(INFINITY))));
  EXPECT_TRUE(std::isnan(float(f16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Dtype, SizesAndNames) {
  EXPECT_EQ(size_of(Dtype::bf16), sizeof(bf16));
  EXPECT_EQ(size_of(Dtype::f64), 8u);
  EXPECT_EQ(size_of(Dtype::boolean), 1u);
  EXPECT_EQ(name_of(Dtype::i64), "i64");
}

}  // namespace
}  // namespace kda
