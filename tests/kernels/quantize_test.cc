#include "kernels/quantize.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <utility>

#include "tests/check.h"

namespace kda::test {
namespace {

template <class T>
void check(int64_t N, int64_t K, float size) {
  SCOPED_TRACE(cat(N, "x", K, " ", name_of(dtype_of<T>)));
  const auto v = values(cat("q", N, K), N * K, size);
  std::vector<T> w;
  for (float x : v) w.emplace_back(T(x));
  ThreadPool pool(2);
  const QuantizedRows made = quantize_rows_i8(pool, view(std::as_const(w).data(), {N, K}));
  ASSERT_EQ(made.w.shape(), Shape({N, K}));
  ASSERT_EQ(made.scale.shape(), Shape{N});
  const int8_t* q = made.w.v.as<int8_t>();
  const float* scale = made.scale.v.as<float>();
  for (int64_t n = 0; n < N; ++n) {
    double most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::abs(double(float(w[size_t(n * K + k)]))));
    ASSERT_NEAR(scale[n], most / 127, most / 127 * std::ldexp(1, -23));
    int largest = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double exact = double(float(w[size_t(n * K + k)])) * 127 / most;
      const int got = q[n * K + k];
      ASSERT_LE(std::abs(got - exact), 0.5 + 127 * std::ldexp(1, -22)) << n << "," << k;
      largest = std::max(largest, std::abs(got));
    }
    ASSERT_EQ(largest, 127);
  }
}

TEST(Quantize, NearestMultipleOfTheScaleOnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    for (int64_t K : {1, 3, 15, 16, 17, 64, 300}) {
      check<float>(5, K, 3);
      check<bf16>(5, K, 0.02f);
      check<f16>(5, K, 100);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
  check<bf16>(3000, 100, 1);
}

std::vector<int> quantized(const QuantizedRows& q) { return {q.w.v.as<int8_t>(), q.w.v.as<int8_t>() + q.w.v.size()}; }

TEST(Quantize, RoundsHalfToEvenAndKeepsSigns) {
  const std::vector<float> w{127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -127, 126.5f, -2.5f};
  ThreadPool pool(1);
  const QuantizedRows q = quantize_rows_i8(pool, view(w.data(), {1, 9}));
  EXPECT_EQ(*q.scale.v.as<float>(), 1);
  EXPECT_EQ(quantized(q), (std::vector<int>{127, 0, 2, 2, 0, -2, -127, 126, -2}));
}

TEST(Quantize, RowsOfZerosAndTinyOnesGiveZeros) {
  const std::vector<float> w{0, -0.0f, 0, 0, 1e-40f, 0, 0, 0};
  ThreadPool pool(1);
  const QuantizedRows q = quantize_rows_i8(pool, view(w.data(), {2, 4}));
  EXPECT_EQ(quantized(q), std::vector<int>(8, 0));
  EXPECT_EQ(q.scale.v.as<float>()[0], 0);
  EXPECT_EQ(q.scale.v.as<float>()[1], 0);
}

TEST(Quantize, RefusesWhatIsNotFiniteAndWrongShapes) {
  ThreadPool pool(2);
  for (const float bad : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF})
    for (int64_t at : {0, 20, 36}) {
      std::vector<float> w(3 * 37, 1);
      w[size_t(37 + at)] = bad;
      try {
        quantize_rows_i8(pool, view(std::as_const(w).data(), {3, 37}));
        ADD_FAILURE() << "accepted " << bad << " at " << at;
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("row 1 "), std::string::npos) << e.what();
      }
    }
  const std::vector<float> w(12);
  EXPECT_THROW(quantize_rows_i8(pool, {w.data(), Dtype::i32, {4, 3}}), Error);
  EXPECT_THROW(quantize_rows_i8(pool, {w.data(), Dtype::f32, {12}}), Error);
}

}  // namespace
}  // namespace kda::test
