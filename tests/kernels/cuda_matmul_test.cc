// matmul and matmul_relu2 on CUDA: bf16 operands, fp32 sums, results in bf16 or f32; weights in bf16, int8 and fp8.
#include <gtest/gtest.h>

#include "kernels/matmul.h"
#include "tests/cuda.h"
#include "tests/ref/matmul.h"
#include "tests/ref/pointwise.h"

namespace kda::test {
namespace {

constexpr Dtype kWeightTypes[] = {Dtype::bf16, Dtype::i8, Dtype::f8_e4m3};

// The number that a byte of f8_e4m3 stands for: 1 sign, 4 exponent (bias 7), 3 fraction bits; no infinities.
double e4m3(uint8_t b) {
  const int exponent = b >> 3 & 15, fraction = b & 7;
  const double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return b >> 7 ? -size : size;
}

struct Weight {
  std::vector<double> values;  // scale included
  Tensor w, scale;

  Weight(Context& ctx, const std::string& name, Dtype d, int64_t N, int64_t K) {
    const auto v = test::values(name, N * K);
    std::vector<char> bytes(v.size() * size_of(d));
    std::vector<float> scales;
    for (int64_t n = 0; n < N; ++n) scales.push_back(0.001f * float(1 + n % 7));
    for (size_t i = 0; i < v.size(); ++i) {
      const double s = double(scales[i / size_t(K)]);
      if (d == Dtype::bf16) {
        const bf16 b(v[i]);
        std::memcpy(bytes.data() + 2 * i, &b, 2);
        values.push_back(double(float(b)));
      } else if (d == Dtype::i8) {
        const auto q = int8_t(std::lround(v[i] * 127));
        std::memcpy(bytes.data() + i, &q, 1);
        values.push_back(q * s);
      } else {
        auto q = uint8_t(int(std::abs(v[i]) * 127) | (v[i] < 0 ? 128 : 0));
        if ((q & 127) == 127) --q;  // NaN
        std::memcpy(bytes.data() + i, &q, 1);
        values.push_back(e4m3(q) * s);
      }
    }
    w = ctx.backend->alloc(d, {N, K});
    if (!bytes.empty()) ctx.backend->copy(ctx, w.v.data, bytes.data(), bytes.size());
    if (d == Dtype::bf16) return;
    scale = ctx.backend->alloc(Dtype::f32, {N});
    ctx.backend->copy(ctx, scale.v.data, scales.data(), scales.size() * 4);
  }
  WeightView view() const { return {w, scale ? ConstView(scale) : ConstView{}}; }
};

// fp32 sums of K terms, whose roundings the tensor cores cut off (2^-23 each); 8-bit weights are rounded to bf16 with
// their scale (2^-8); a bf16 result is rounded once more.
testing::AssertionResult near(const std::vector<float>& got, const ref::Product& want, Dtype w, Dtype y, int64_t K) {
  const double terms = double(K + 4) * std::ldexp(1, -23) + (w == Dtype::bf16 ? 0 : std::ldexp(1, -8));
  for (size_t i = 0; i < want.y.size(); ++i) {
    const double allowed =
        terms * want.terms[i] + (y == Dtype::f32 ? 0 : kBf16Epsilon * 1.01 * std::abs(want.y[i])) + 1e-30;
    if (got.size() != want.y.size() || !(std::abs(double(got[i]) - want.y[i]) <= allowed))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << want.y[i]
                                         << ", allowed " << allowed;
  }
  return testing::AssertionSuccess();
}

// The same for max(y, 0)^2: the square doubles the relative error (of y rounded to bf16, where it was), and is rounded.
testing::AssertionResult near_square(const std::vector<float>& got, const ref::Product& want, Dtype w, int64_t K) {
  const auto square = ref::relu2(want.y);
  if (got.size() != square.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < square.size(); ++i) {
    const double off =
        (double(K + 4) * std::ldexp(1, -23) + (w == Dtype::bf16 ? 0 : std::ldexp(1, -8))) * want.terms[i] +
        kBf16Epsilon * std::abs(want.y[i]);
    const double allowed = (2 * std::abs(want.y[i]) + off) * off + kBf16Epsilon * 1.02 * square[i] + 1e-30;
    if (!(std::abs(double(got[i]) - square[i]) <= allowed))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << square[i];
  }
  return testing::AssertionSuccess();
}

void check(int64_t R, int64_t N, int64_t K, Dtype d, Dtype y_type) {
  SCOPED_TRACE(cat(R, "x", N, "x", K, " ", name_of(d), " to ", name_of(y_type)));
  CudaContext ctx(0);
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, R, K, N))});
  const auto xs = rounded(values("x", R * K));
  const Weight w(ctx, "w", d, N, K);
  TypedBuffer x(ctx, Dtype::bf16, xs), y(ctx, y_type, R * N), z(ctx, y_type, R * N);
  const MatmulSegment s{.w = w.view(), .y = y.view({R, N})};
  matmul(ctx, {.x = x.view({R, K}), .segments = {&s, 1}});
  const auto want = ref::matmul(wide(xs), w.values, R, N, K);
  EXPECT_TRUE(near(y.fetch(), want, d, y_type, K));
  EXPECT_TRUE(y.guards_intact());
  if (y_type != Dtype::bf16) return;
  const MatmulSegment t{.w = w.view(), .y = z.view({R, N})};
  matmul_relu2(ctx, {.x = x.view({R, K}), .segments = {&t, 1}});
  EXPECT_TRUE(near_square(z.fetch(), want, d, K));
  EXPECT_TRUE(z.guards_intact());
}

TEST(CudaMatmul, ComparisonCanFail) {
  const ref::Product p = ref::matmul({1, 2}, {3, -4}, 1, 1, 2);
  EXPECT_TRUE(near({-5.0f}, p, Dtype::bf16, Dtype::f32, 2));
  EXPECT_FALSE(near({-5.001f}, p, Dtype::bf16, Dtype::f32, 2));
  EXPECT_FALSE(near({std::nanf("")}, p, Dtype::bf16, Dtype::bf16, 2));
  EXPECT_EQ(e4m3(0x7e), 448);
  EXPECT_EQ(e4m3(0x81), -std::ldexp(1, -9));
  EXPECT_EQ(e4m3(0x38), 1);
}

TEST(CudaMatmul, EqualsTheReferenceAtManySizes) {
  KDA_NEEDS_CUDA();
  for (const Dtype d : kWeightTypes)
    for (const Dtype y : {Dtype::bf16, Dtype::f32}) {
      for (const int64_t R : {0, 1, 2, 15, 16, 17, 63, 64, 65, 130}) check(R, 24, 64, d, y);
      for (const int64_t K : {8, 16, 24, 136, 1000}) check(3, 72, K, d, y);
      for (const int64_t N : {1, 3, 8, 20, 64, 65, 129, 1000}) check(17, N, 40, d, y);
      check(5, 7, 13, d, y);  // no size that any kernel likes
    }
}

// Panels of 32 MB of bf16 weights: 8-bit matrices beyond that are multiplied piece by piece.
TEST(CudaMatmul, LargeMatricesInPanels) {
  KDA_NEEDS_CUDA();
  for (const Dtype d : kWeightTypes) check(2, 1400, 16384, d, Dtype::f32);
}

TEST(CudaMatmul, SeveralMatricesShareTheirInput) {
  KDA_NEEDS_CUDA();
  const int64_t R = 35, K = 96;
  const int64_t Ns[] = {128, 1, 20, 129, 64, 257, 3, 65};
  CudaContext ctx(0);
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, R, K, 257))});
  const auto xs = rounded(values("x", R * K));
  TypedBuffer x(ctx, Dtype::bf16, xs);
  std::vector<Weight> w;
  std::vector<TypedBuffer> y;
  std::vector<MatmulSegment> s;
  for (size_t i = 0; i < 8; ++i) {
    w.emplace_back(ctx, cat("w", i), kWeightTypes[i % 3], Ns[i], K);
    y.emplace_back(ctx, i % 2 ? Dtype::bf16 : Dtype::f32, R * Ns[i]);
  }
  for (size_t i = 0; i < 8; ++i) s.push_back({.w = w[i].view(), .y = y[i].view({R, Ns[i]})});
  matmul(ctx, {.x = x.view({R, K}), .segments = s});
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_TRUE(near(y[i].fetch(), ref::matmul(wide(xs), w[i].values, R, Ns[i], K), kWeightTypes[i % 3],
                     i % 2 ? Dtype::bf16 : Dtype::f32, K))
        << "matrix " << i;
    EXPECT_TRUE(y[i].guards_intact());
  }
}

// Same shape, other neighbours, another place among the rows: the same bits.
TEST(CudaMatmul, ARowOfAFixedShapeDependsOnThatRowAlone) {
  KDA_NEEDS_CUDA();
  for (const int64_t R : {48, 300})
    for (const int64_t K : {2560, 18432}) {
      const int64_t N = 264;
      CudaContext ctx(0);
      ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, R, K, N))});
      const Weight w(ctx, "w", Dtype::bf16, N, K);
      const auto run = [&](const std::vector<float>& xs) {
        TypedBuffer x(ctx, Dtype::bf16, xs), y(ctx, Dtype::f32, R * N);
        const MatmulSegment s{.w = w.view(), .y = y.view({R, N})};
        matmul(ctx, {.x = x.view({R, K}), .segments = {&s, 1}});
        return y.fetch();
      };
      const auto xs = values("x", R * K);
      const auto want = run(xs);
      EXPECT_EQ(run(xs), want);
      auto others = values("others", R * K);
      std::copy_n(xs.begin() + 5 * K, K, others.begin() + (R - 1) * K);
      const auto got = run(others);
      EXPECT_EQ(std::vector<float>(got.end() - N, got.end()),
                std::vector<float>(want.begin() + 5 * N, want.begin() + 6 * N));
    }
}

// Another number of rows, another kernel or plan: the same bits, measured, not promised by the library.
TEST(CudaMatmul, ARowHasTheSameBitsAmongAnyNumberOfRows) {
  KDA_NEEDS_CUDA();
  const int64_t most = 1100;
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{2560, 640}, {136, 2560}, {128, 5120}}) {
    CudaContext ctx(0);
    ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, most, K, N))});
    const Weight w(ctx, "w", Dtype::bf16, N, K);
    const auto xs = values("x", most * K);
    const auto run = [&](int64_t from, int64_t rows, bool squared) {
      TypedBuffer x(ctx, Dtype::bf16, {xs.begin() + from * K, xs.begin() + (from + rows) * K}),
          y(ctx, Dtype::bf16, rows * N);
      const MatmulSegment s{.w = w.view(), .y = y.view({rows, N})};
      squared ? matmul_relu2(ctx, {.x = x.view({rows, K}), .segments = {&s, 1}})
              : matmul(ctx, {.x = x.view({rows, K}), .segments = {&s, 1}});
      EXPECT_TRUE(y.guards_intact());
      return y.fetch();
    };
    const auto whole = run(0, most, false), square = run(0, most, true);
    for (const int64_t rows : {1, 2, 7, 16, 17, 64, 65, 128, 129, 256, 300, 512, 777, 1024}) {
      const int64_t from = (rows * 37) % (most - rows);
      const auto part = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + from * N, all.begin() + (from + rows) * N);
      };
      EXPECT_TRUE(run(from, rows, false) == part(whole)) << rows << " rows of " << N << "x" << K;
      EXPECT_TRUE(run(from, rows, true) == part(square)) << rows << " rows of " << N << "x" << K << ", squared";
    }
  }
}

// Sizes beyond which one launch does all (gemm90), on both sides of its tiles, with matrices it cannot take among them.
TEST(CudaMatmul, ManyRowsAndSeveralMatrices) {
  KDA_NEEDS_CUDA();
  const int64_t K = 72;
  for (const int64_t R : {1025, 2048, 2049, 2300}) {
    const int64_t Ns[] = {520, 1, 20, 130, 264, 257, 264, 8};
    CudaContext ctx(0);
    ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, R, K, 520))});
    const auto xs = rounded(values("x", R * K));
    TypedBuffer x(ctx, Dtype::bf16, xs);
    std::vector<Weight> w;
    std::vector<TypedBuffer> y, z;
    std::vector<MatmulSegment> s, t;
    for (size_t i = 0; i < 8; ++i) {
      w.emplace_back(ctx, cat("w", i), kWeightTypes[i == 6 ? 1 : 0], Ns[i], K);
      y.emplace_back(ctx, i == 4 ? Dtype::f32 : Dtype::bf16, R * Ns[i]);
      z.emplace_back(ctx, Dtype::bf16, R * Ns[i]);
    }
    for (size_t i = 0; i < 8; ++i) {
      s.push_back({.w = w[i].view(), .y = y[i].view({R, Ns[i]})});
      t.push_back({.w = w[i].view(), .y = z[i].view({R, Ns[i]})});
    }
    matmul(ctx, {.x = x.view({R, K}), .segments = s});
    matmul_relu2(ctx, {.x = x.view({R, K}), .segments = t});
    for (size_t i = 0; i < 8; ++i) {
      const Dtype d = kWeightTypes[i == 6 ? 1 : 0];
      const auto want = ref::matmul(wide(xs), w[i].values, R, Ns[i], K);
      EXPECT_TRUE(near(y[i].fetch(), want, d, i == 4 ? Dtype::f32 : Dtype::bf16, K)) << "matrix " << i << ", " << R;
      EXPECT_TRUE(near_square(z[i].fetch(), want, d, K)) << "matrix " << i << ", " << R;
      EXPECT_TRUE(y[i].guards_intact() && z[i].guards_intact());
    }
  }
}

TEST(CudaMatmul, AWorkspaceTooSmallIsRefused) {
  KDA_NEEDS_CUDA();
  CudaContext ctx(1024);
  const Weight w(ctx, "w", Dtype::bf16, 8, 8);
  TypedBuffer x(ctx, Dtype::bf16, 16), y(ctx, Dtype::f32, 16);
  const MatmulSegment s{.w = w.view(), .y = y.view({2, 8})};
  EXPECT_THROW(matmul(ctx, {.x = x.view({2, 8}), .segments = {&s, 1}}), Error);
}

}  // namespace
}  // namespace kda::test
