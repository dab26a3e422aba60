#include "kernels/quantize.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/check.h"

namespace kda::test {
namespace {

template <class T>
void expect_quantized(int64_t N, int64_t K) {
  auto v = values(cat("quantize/", N, "/", K), N * K);
  for (int64_t k = 0; k < K; ++k) v[size_t((N - 1) * K + k)] = 0;  // a row of zeros
  std::vector<T> w;
  for (float x : v) w.push_back(T(x));
  ThreadPool pool(2);
  const QuantizedRows q = quantize_rows_i8(pool, view(std::as_const(w).data(), {N, K}));
  for (int64_t n = 0; n < N; ++n) {
    double most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::abs(double(float(w[size_t(n * K + k)]))));
    const double scale = q.scale.v.as<float>()[n];
    EXPECT_NEAR(scale, most / 127, 1e-6 * most);
    for (int64_t k = 0; k < K; ++k) {
      const double x = float(w[size_t(n * K + k)]), got = q.w.v.as<int8_t>()[n * K + k];
      // Half a step, and the rounding of the quotient.
      EXPECT_LE(std::abs(got * scale - x), scale * (0.5 + 1e-4)) << n << " " << k;
      EXPECT_LE(std::abs(got), 127);
    }
  }
}

TEST(Quantize, WithinHalfAStep) {
  for (int64_t N : {1, 2, 17, 33})
    for (int64_t K : {1, 3, 64, 257}) {
      expect_quantized<float>(N, K);
      expect_quantized<bf16>(N, K);
      expect_quantized<f16>(N, K);
    }
}

TEST(Quantize, RoundsHalfToEvenAndKeepsSigns) {
  const std::vector<float> w{127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -127, 126.5f};
  ThreadPool pool(1);
  const QuantizedRows q = quantize_rows_i8(pool, view(w.data(), {1, 8}));
  const std::vector<int> want{127, 0, 2, 2, 0, -2, -127, 126};
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(q.w.v.as<int8_t>()[i], want[i]) << i;
}

TEST(Quantize, RefusesWhatIsNotFinite) {
  ThreadPool pool(1);
  for (float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    const std::vector<float> w{1, bad, 2, 3};
    EXPECT_THROW(quantize_rows_i8(pool, view(w.data(), {2, 2})), Error);
  }
}

}  // namespace
}  // namespace kda::test
