// The CUDA body of quantize_rows.
#include <cstring>
#include <set>

#include "kernels/quantize.h"
#include "tests/cuda.h"

using namespace kda;
using namespace kda::test;

namespace {

double e4m3(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const double v = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return b & 0x80 ? -v : v;
}

struct Rows {
  std::vector<uint8_t> q;
  std::vector<float> scale;
};

Rows quantize(Context& ctx, Dtype d, const std::vector<float>& w, int64_t N, int64_t K) {
  TypedBuffer wb(ctx, Dtype::bf16, w);
  DeviceArray<uint8_t> q(ctx, std::vector<uint8_t>(size_t(N * K), 0xee));
  Buffer scale(ctx, N);
  quantize_rows(ctx, {wb.view({N, K}), {q.data(), d, {N, K}}, scale.view({N})});
  EXPECT_TRUE(scale.guards_intact());
  return {q.fetch(), scale.fetch()};
}

// Every value lies within half a step of its own, the step that its neighbours among the codes leave.
void expect_nearest(const Rows& got, Dtype d, const std::vector<float>& w, int64_t N, int64_t K,
                    const std::string& what) {
  std::set<double> codes;
  for (int b = 0; b < 256; ++b)
    if (d == Dtype::i8 ? b != 128 : (b & 0x7f) != 0x7f)
      codes.insert(d == Dtype::i8 ? double(int8_t(b)) : e4m3(uint8_t(b)));
  for (int64_t n = 0; n < N; ++n) {
    double most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::abs(double(w[size_t(n * K + k)])));
    const double scale = double(got.scale[size_t(n)]), top = d == Dtype::i8 ? 127 : 448;
    ASSERT_NEAR(scale, most / top, most / top * 2e-7) << what;
    for (int64_t k = 0; k < K && most > 0; ++k) {
      const uint8_t b = got.q[size_t(n * K + k)];
      const double v = double(w[size_t(n * K + k)]) / scale, q = d == Dtype::i8 ? double(int8_t(b)) : e4m3(b);
      const auto above = codes.lower_bound(v);
      double nearest = INFINITY;
      if (above != codes.end()) nearest = std::abs(*above - v);
      if (above != codes.begin()) nearest = std::min(nearest, std::abs(*std::prev(above) - v));
      ASSERT_LE(std::abs(q - v), nearest + 1e-6 * std::abs(v)) << what << " row " << n << " element " << k;
    }
  }
}

TEST(CudaQuantize, EveryValueTakesTheNearestCode) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : {Dtype::i8, Dtype::f8_e4m3})
    for (const auto& [N, K] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {5, 256}, {4, 257}, {9, 2560}}) {
      const std::string what = cat("quantize/", name_of(d), "_", N, "x", K);
      auto w = values(what, N * K, 0.1f);
      for (float& x : w) x = x * x * x;  // many small ones
      w = rounded(w);
      const Rows got = quantize(ctx, d, w, N, K);
      expect_nearest(got, d, w, N, K, what);
      EXPECT_EQ(quantize(ctx, d, w, N, K).q, got.q);
    }
}

TEST(CudaQuantize, Int8IsTheCpusBitForBit) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t N = 9, K = 1000;
  const auto w = values("quantize/both", N * K);
  std::vector<bf16> stored;
  for (float x : w) stored.emplace_back(x);
  ThreadPool pool(1);
  const QuantizedRows want = quantize_rows_i8(pool, view(stored.data(), {N, K}));
  const Rows got = quantize(ctx, Dtype::i8, w, N, K);
  EXPECT_EQ(std::memcmp(got.q.data(), want.w.v.data, got.q.size()), 0);
  EXPECT_EQ(std::memcmp(got.scale.data(), want.scale.v.data, got.scale.size() * 4), 0);
}

TEST(CudaQuantize, ZeroRowsAndThoseThatAreNotFinite) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : {Dtype::i8, Dtype::f8_e4m3}) {
    std::vector<float> w(4 * 40, 0.0f);
    for (size_t i = 40; i < w.size(); ++i) w[i] = 0.5f;
    w[2 * 40 + 11] = NAN;
    w[3 * 40 + 39] = -INFINITY;
    const Rows got = quantize(ctx, d, w, 4, 40);
    EXPECT_EQ(got.scale[0], 0);
    for (size_t i = 0; i < 40; ++i) EXPECT_EQ(got.q[i], 0);
    EXPECT_GT(got.scale[1], 0);
    EXPECT_TRUE(std::isnan(got.scale[2]) && std::isnan(got.scale[3]));
  }
}

}  // namespace
