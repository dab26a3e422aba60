// The CUDA bodies of matvec, norm_matvec, norm_matvec_relu2 and matvec_add.
#include <cstring>
#include <tuple>

#include "kernels/matmul.h"
#include "tests/cuda.h"
#include "tests/ref/matmul.h"
#include "tests/ref/norm.h"

using namespace kda;
using namespace kda::test;

namespace {

double e4m3(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const double v = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return b & 0x80 ? -v : v;
}

// A stored matrix in device memory and its values, scales included.
struct Matrix {
  int64_t N, K;
  std::vector<double> values;
  DeviceArray<uint8_t> bytes;
  DeviceArray<float> scale;
  Dtype type;

  WeightView view() const {
    WeightView w{{bytes.data(), type, {N, K}}, {}};
    if (type != Dtype::bf16) w.scale = scale.view();
    return w;
  }
  static Matrix make(Context& ctx, const std::string& name, Dtype d, int64_t N, int64_t K) {
    const auto v = test::values(name, N * K);
    std::vector<uint8_t> bytes(v.size() * size_of(d));
    std::vector<float> scale;
    std::vector<double> out(v.size());
    for (int64_t n = 0; n < N; ++n) scale.push_back(0.001f * float(1 + n % 7));
    for (size_t i = 0; i < v.size(); ++i) {
      const double s = double(scale[i / size_t(K)]);
      if (d == Dtype::bf16) {
        const bf16 b(v[i]);
        std::memcpy(&bytes[2 * i], &b, 2);
        out[i] = double(float(b));
      } else if (d == Dtype::i8) {
        bytes[i] = uint8_t(int8_t(std::lround(v[i] * 127)));
        out[i] = s * double(int8_t(bytes[i]));
      } else {  // every code but the two NaNs, subnormals among them
        bytes[i] = uint8_t(int(v[i] * 128) + 128);
        if ((bytes[i] & 0x7f) == 0x7f) bytes[i] ^= 1;
        out[i] = s * e4m3(bytes[i]);
      }
    }
    return {N, K, std::move(out), {ctx, bytes}, {ctx, scale}, d};
  }
};

// |got - want| <= a rounding of the result, where that is bf16, and one of the running sum for each 8 products.
testing::AssertionResult follows(const std::vector<float>& got, const ref::Product& want, int64_t K, bool rounded) {
  if (got.size() != want.y.size()) return testing::AssertionFailure() << "sizes differ";
  const double sums = double(K / 8 + 8) * 0x1p-24;
  for (size_t i = 0; i < got.size(); ++i) {
    const double allowed = sums * want.terms[i] + (rounded ? kBf16Epsilon * std::abs(want.y[i]) : 0) + 1e-30;
    if (!(std::abs(double(got[i]) - want.y[i]) <= allowed))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << want.y[i]
                                         << ", allowed " << allowed;
  }
  return testing::AssertionSuccess();
}

std::vector<float> rows_of(const std::vector<float>& x, int64_t from, int64_t R, int64_t K) {
  return {x.begin() + from * K, x.begin() + (from + R) * K};
}

const Dtype kTypes[] = {Dtype::bf16, Dtype::i8, Dtype::f8_e4m3};
struct Size {
  std::vector<int64_t> N;
  int64_t K;
};
// Stacked segments; parts of K; more rows than a block adds up at once (the last); sizes one off each border; those of
// the path for any K.
const Size kSizes[] = {{{1}, 16},          {{15, 17, 1}, 32},     {{16}, 256},   {{40, 3}, 272},
                       {{300}, 528},       {{33, 128, 20}, 1040}, {{7, 9}, 13},  {{21}, 8 * 31},
                       {{333, 1001}, 520}, {{2048}, 2560},        {{700}, 6400}, {{2700, 65}, 5184},
                       {{48000, 70}, 64}};

TEST(CudaMatvec, FollowsTheReference) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : kTypes)
    for (const Size& size : kSizes)
      for (int64_t R : {1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 258}) {
        if (R * size.N[0] * size.K > 40'000'000) continue;
        const std::string what = cat("matvec/", name_of(d), "_N", size.N[0], "_K", size.K, "_R", R);
        const auto x = rounded(values(what + "/x", R * size.K));
        TypedBuffer xb(ctx, Dtype::bf16, x);
        std::vector<Matrix> w;
        std::vector<TypedBuffer> y;
        std::vector<MatmulSegment> segments;
        for (size_t i = 0; i < size.N.size(); ++i) {
          w.push_back(Matrix::make(ctx, cat(what, "/w", i), d, size.N[i], size.K));
          y.emplace_back(ctx, i % 2 ? Dtype::bf16 : Dtype::f32, R * size.N[i]);
        }
        for (size_t i = 0; i < w.size(); ++i) segments.push_back({w[i].view(), y[i].view({R, size.N[i]})});
        matvec(ctx, {.x = xb.view({R, size.K}), .segments = segments});
        for (size_t i = 0; i < w.size(); ++i) {
          const auto want = ref::matmul(wide(x), w[i].values, R, size.N[i], size.K);
          auto got = y[i].fetch();
          EXPECT_TRUE(follows(got, want, size.K, i % 2)) << what << " matrix " << i;
          EXPECT_TRUE(y[i].guards_intact()) << what;
          got[got.size() / 2] += float(0.02 * want.terms[got.size() / 2]);
          EXPECT_FALSE(follows(got, want, size.K, i % 2)) << "sabotage";
        }
      }
}

TEST(CudaMatvec, MatricesOfSeveralTypesShareAnInput) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const std::vector<std::vector<std::pair<Dtype, int64_t>>> stacks{
      {{Dtype::f8_e4m3, 320}, {Dtype::f8_e4m3, 130}, {Dtype::bf16, 128}, {Dtype::bf16, 65}, {Dtype::bf16, 20}},
      {{Dtype::bf16, 20}, {Dtype::i8, 63}, {Dtype::f8_e4m3, 1}, {Dtype::bf16, 70}, {Dtype::i8, 200}},
      {{Dtype::i8, 8000}, {Dtype::bf16, 9000}, {Dtype::f8_e4m3, 3001}}};
  for (const auto& stack : stacks)
    for (int64_t K : {64, 272, 1304, 2560})
      for (int64_t R : {1, 3, 16, 17, 64, 65, 128, 129}) {
        if (stack[0].second * K * R > 10'000'000) continue;
        const std::string what = cat("mixed/N", stack[0].second, "_K", K, "_R", R);
        const auto x = rounded(values(what + "/x", R * K));
        TypedBuffer xb(ctx, Dtype::bf16, x);
        std::vector<Matrix> w;
        std::vector<TypedBuffer> y;
        std::vector<MatmulSegment> segments;
        for (const auto& [d, N] : stack) {
          w.push_back(Matrix::make(ctx, cat(what, "/w", w.size()), d, N, K));
          y.emplace_back(ctx, w.size() % 2 ? Dtype::bf16 : Dtype::f32, R * N);
        }
        for (size_t i = 0; i < w.size(); ++i) segments.push_back({w[i].view(), y[i].view({R, w[i].N})});
        for (int time = 0; time < 2; ++time) matvec(ctx, {.x = xb.view({R, K}), .segments = segments});
        for (size_t i = 0; i < w.size(); ++i) {
          EXPECT_TRUE(follows(y[i].fetch(), ref::matmul(wide(x), w[i].values, R, w[i].N, K), K, i % 2 == 0))
              << what << " matrix " << i;
          EXPECT_TRUE(y[i].guards_intact()) << what;
        }
      }
}

TEST(CudaMatvec, EachMatrixMayHaveItsOwnInput) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : kTypes)
    for (int64_t R : {1, 3, 8, 9, 64, 65, 129}) {
      const std::string what = cat("own/", name_of(d), "_R", R);
      const std::vector<std::pair<int64_t, int64_t>> shapes{{320, 128}, {320, 128}, {50, 128}, {50, 64}, {3, 64}};
      std::vector<Matrix> w;
      std::vector<TypedBuffer> x, y;
      std::vector<MatmulSegment> segments;
      for (const auto& [N, K] : shapes) {
        w.push_back(Matrix::make(ctx, cat(what, "/w", w.size()), d, N, K));
        x.emplace_back(ctx, Dtype::bf16, rounded(values(cat(what, "/x", x.size()), R * K)));
        y.emplace_back(ctx, Dtype::f32, R * N);
      }
      for (size_t i = 0; i < w.size(); ++i)
        segments.push_back({w[i].view(), y[i].view({R, w[i].N}), x[i].view({R, w[i].K})});
      matvec(ctx, {.x = x[0].view({R, 128}), .segments = segments});
      for (size_t i = 0; i < w.size(); ++i)
        EXPECT_TRUE(
            follows(y[i].fetch(), ref::matmul(wide(x[i].fetch()), w[i].values, R, w[i].N, w[i].K), w[i].K, false))
            << what << " matrix " << i;
    }
}

// y_i for each matrix and R rows of a residual stream from row `from` on.
std::vector<std::vector<float>> normed(Context& ctx, const std::vector<Matrix>& w, const std::vector<float>& x,
                                       const std::vector<float>& norm, int64_t from, int64_t R, bool relu2,
                                       Dtype type) {
  const int64_t K = w[0].K;
  Buffer xb(ctx, rows_of(x, from, R, K)), nb(ctx, norm);
  TypedBuffer h(ctx, Dtype::bf16, R * K);
  std::vector<TypedBuffer> y;
  std::vector<MatmulSegment> segments;
  for (const Matrix& m : w) y.emplace_back(ctx, type, R * m.N);
  for (size_t i = 0; i < w.size(); ++i) segments.push_back({w[i].view(), y[i].view({R, w[i].N})});
  const NormMatvec a{xb.view({R, K}), nb.view({K}), 1e-5f, segments, h.view({R, K})};
  relu2 ? norm_matvec_relu2(ctx, a) : norm_matvec(ctx, a);
  std::vector<std::vector<float>> out;
  for (TypedBuffer& b : y) {
    EXPECT_TRUE(b.guards_intact() && h.guards_intact() && xb.guards_intact());
    out.push_back(b.fetch());
  }
  return out;
}

TEST(CudaMatvec, NormedRowsFollowTheReference) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : kTypes)
    for (int64_t K : {16, 272, 1040, 13})
      for (int64_t R : {1, 2, 3, 5, 8, 9, 64, 127}) {
        const std::string what = cat("normed/", name_of(d), "_K", K, "_R", R);
        std::vector<Matrix> w;
        for (int64_t N : {37, 20}) w.push_back(Matrix::make(ctx, cat(what, "/w", N), d, N, K));
        const auto x = values(what + "/x", R * K, 3), norm = values(what + "/norm", K, 2);
        // The normed rows are rounded to bf16 before the products: half a unit of 2^-7 each, of every term.
        const auto h = ref::rms_norm(wide(x), wide(norm), double(1e-5f));
        for (bool relu2 : {false, true}) {
          const auto got = normed(ctx, w, x, norm, 0, R, relu2, Dtype::f32);
          for (size_t i = 0; i < w.size(); ++i) {
            const auto want = ref::matmul(h, w[i].values, R, w[i].N, K);
            for (size_t j = 0; j < got[i].size(); ++j) {
              const double z = std::max(want.y[j], 0.0), off = kBf16Epsilon * want.terms[j] * 1.01 + 1e-9;
              const double y = relu2 ? z * z : want.y[j], allowed = relu2 ? off * (2 * z + off) : off;
              ASSERT_LE(std::abs(double(got[i][j]) - y), allowed) << what << " matrix " << i << " element " << j;
            }
          }
        }
      }
}

// The rows of a chunk are not as many in each type, and not all as many as the last of a matrix.
TEST(CudaMatvec, TypesMayDifferBetweenMatrices) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (int64_t K : {320, 2560, 5120})
    for (int64_t R : {1, 2, 3}) {
      const std::string what = cat("types/K", K, "_R", R);
      std::vector<Matrix> w;
      for (const auto& [d, N] : {std::pair<Dtype, int64_t>{Dtype::f8_e4m3, 203},
                                 {Dtype::bf16, 130},
                                 {Dtype::i8, 21},
                                 {Dtype::bf16, 1},
                                 {Dtype::f8_e4m3, 1}})
        w.push_back(Matrix::make(ctx, cat(what, "/w", w.size()), d, N, K));
      const auto x = values(what + "/x", R * K, 3), norm = values(what + "/norm", K, 2);
      const auto h = ref::rms_norm(wide(x), wide(norm), double(1e-5f));
      const auto got = normed(ctx, w, x, norm, 0, R, false, Dtype::f32);
      for (size_t i = 0; i < w.size(); ++i) {
        const auto want = ref::matmul(h, w[i].values, R, w[i].N, K);
        for (size_t j = 0; j < got[i].size(); ++j)
          ASSERT_LE(std::abs(double(got[i][j]) - want.y[j]), kBf16Epsilon * want.terms[j] * 1.01 + 1e-9)
              << what << " matrix " << i << " element " << j;
      }
    }
}

TEST(CudaMatvec, AddsToTheResidualStream) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : kTypes)
    for (const auto& [N, K] : {std::pair<int64_t, int64_t>{40, 272}, {2048, 2560}, {700, 6400}, {5, 7}})
      for (int64_t R : {1, 2, 4, 12, 17, 65, 130}) {
        if (R * N * K > 100'000'000) continue;
        const std::string what = cat("add/", name_of(d), "_N", N, "_K", K, "_R", R);
        const Matrix w = Matrix::make(ctx, what + "/w", d, N, K);
        const auto x = rounded(values(what + "/x", R * K)), before = values(what + "/y", R * N);
        TypedBuffer xb(ctx, Dtype::bf16, x), h(ctx, Dtype::bf16, R * N);
        Buffer y(ctx, before);
        for (int time = 0; time < 2; ++time)  // the second finds the parts' counters as the first left them
          matvec_add(ctx, {xb.view({R, K}), w.view(), y.view({R, N}), h.view({R, N})});
        auto want = ref::matmul(wide(x), w.values, R, N, K);
        for (size_t i = 0; i < want.y.size(); ++i)
          want.y[i] = double(before[i]) + 2 * want.y[i],
          want.terms[i] = 2 * want.terms[i] + std::abs(double(before[i]));
        EXPECT_TRUE(follows(y.fetch(), want, K, false)) << what;
        EXPECT_TRUE(y.guards_intact()) << what;
      }
}

// In 8 bits among up to 2 and from 3 on; in bf16 among up to 2 and among 3 to 16, whichever kernels the device has.
TEST(CudaMatvec, ARowIsTheSameInAnyBatch) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [d, least, R] : {std::tuple<Dtype, int64_t, int64_t>{Dtype::bf16, 1, 2},
                                    {Dtype::bf16, 3, 16},
                                    {Dtype::i8, 1, 2},
                                    {Dtype::f8_e4m3, 1, 2},
                                    {Dtype::i8, 3, 200},
                                    {Dtype::f8_e4m3, 3, 200}}) {
    const int64_t K = 2560;
    std::vector<Matrix> w;
    w.push_back(Matrix::make(ctx, "same/w", d, 2048, K));
    const auto x = values("same/x", R * K, 3), norm = values("same/norm", K, 2);
    TypedBuffer xb(ctx, Dtype::bf16, x), h(ctx, Dtype::bf16, R * w[0].N);
    const auto add = [&](int64_t from, int64_t n) {
      Buffer y(ctx, std::vector<float>(size_t(n * w[0].N), 0.5f));
      const ConstView rows{static_cast<const bf16*>(xb.view({R, K}).data) + from * K, Dtype::bf16, {n, K}};
      matvec_add(ctx, {rows, w[0].view(), y.view({n, w[0].N}), h.view({n, w[0].N})});
      return y.fetch();
    };
    const auto all = normed(ctx, w, x, norm, 0, R, false, Dtype::f32)[0], sums = add(0, R);
    for (int64_t n : {1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 131})
      for (int64_t from : n >= least && n <= R ? std::vector<int64_t>{0, (R - n) / 2, R - n} : std::vector<int64_t>{}) {
        EXPECT_EQ(normed(ctx, w, x, norm, from, n, false, Dtype::f32)[0], rows_of(all, from, n, w[0].N))
            << n << " rows";
        EXPECT_EQ(add(from, n), rows_of(sums, from, n, w[0].N)) << n << " rows";
      }
  }
}

TEST(CudaMatvec, OfManyRowsOneDependsOnNoOther) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t K = 2560, row = 5;
  const auto norm = values("many/norm", K, 2);
  for (Dtype d : kTypes) {
    std::vector<Matrix> w;
    for (int64_t N : {2048, 20}) w.push_back(Matrix::make(ctx, cat("many/w", N), N == 20 ? Dtype::bf16 : d, N, K));
    for (int64_t R : {17, 33, 64, 65, 128}) {
      auto x = values("many/x", R * K, 3);
      const auto before = normed(ctx, w, x, norm, 0, R, false, Dtype::bf16);
      for (int64_t i = 0; i < R * K; ++i)
        if (i / K != row) x[size_t(i)] = -2 * x[size_t(i)] + 1;
      const auto after = normed(ctx, w, x, norm, 0, R, false, Dtype::bf16);
      for (size_t m = 0; m < w.size(); ++m) {
        EXPECT_EQ(rows_of(before[m], row, 1, w[m].N), rows_of(after[m], row, 1, w[m].N)) << R;
        EXPECT_NE(rows_of(before[m], row + 1, 1, w[m].N), rows_of(after[m], row + 1, 1, w[m].N)) << R;
      }
    }
  }
}

// Widths that take tiles of three groups of rows, tiles in turn, and parts of K, each on an H100.
TEST(CudaMatvec, WideAndDeepMatricesOfManyRows) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [N, K, R] : {std::array<int64_t, 3>{18432, 136, 64},
                                {18400, 264, 17},
                                {17411, 72, 33},
                                {40003, 64, 64},
                                {18432, 64, 128},
                                {320, 18432, 64},
                                {200, 5000, 65},
                                {18432, 272, 9},
                                {17411, 80, 33},
                                {18432, 144, 128},
                                {200, 5008, 65}})
    for (Dtype stored : kTypes) {
      if (stored != Dtype::bf16 && K % 16) continue;
      const std::string what = cat("wide/", name_of(stored), "_N", N, "_K", K, "_R", R);
      const Matrix w = Matrix::make(ctx, what + "/w", stored, N, K);
      const auto x = rounded(values(what + "/x", R * K));
      TypedBuffer xb(ctx, Dtype::bf16, x);
      const auto want = ref::matmul(wide(x), w.values, R, N, K);
      for (Dtype d : {Dtype::bf16, Dtype::f32}) {
        TypedBuffer y(ctx, d, R * N);
        const MatmulSegment segment{w.view(), y.view({R, N})};
        for (int time = 0; time < 2; ++time) matvec(ctx, {.x = xb.view({R, K}), .segments = {&segment, 1}});
        EXPECT_TRUE(follows(y.fetch(), want, K, d == Dtype::bf16)) << what;
        EXPECT_TRUE(y.guards_intact()) << what;
      }
    }
}

TEST(CudaMatvec, ANaNStaysInItsRow) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t K = 272, R = 9, N = 40;
  for (Dtype d : kTypes) {
    std::vector<Matrix> w;
    w.push_back(Matrix::make(ctx, "nan/w", d, N, K));
    auto x = values("nan/x", R * K);
    x[size_t(4 * K + 17)] = NAN;
    const auto norm = values("nan/norm", K);
    for (bool relu2 : {false, true}) {
      const auto y = normed(ctx, w, x, norm, 0, R, relu2, Dtype::bf16)[0];
      for (int64_t i = 0; i < R * N; ++i) EXPECT_EQ(std::isnan(y[size_t(i)]), i / N == 4) << i;
    }
  }
}

// What a row of weights that held an infinity is quantised to.
TEST(CudaMatvec, AScaleOfNaNMakesItsColumnNaN) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t K = 272, N = 140;
  for (Dtype d : {Dtype::i8, Dtype::f8_e4m3})
    for (int64_t R : {1, 9, 70}) {
      std::vector<Matrix> w;
      w.push_back(Matrix::make(ctx, "scale/w", d, N, K));
      const float nan = NAN;
      ctx.backend->copy(ctx, w[0].scale.data() + 77, &nan, sizeof nan);
      const auto x = values("scale/x", R * K), norm = values("scale/norm", K);
      for (bool relu2 : {false, true}) {
        const auto y = normed(ctx, w, x, norm, 0, R, relu2, Dtype::bf16)[0];
        for (int64_t i = 0; i < R * N; ++i) EXPECT_EQ(std::isnan(y[size_t(i)]), i % N == 77) << i;
      }
    }
}

TEST(CudaMatvec, NoRowsAreNoWork) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const Matrix w = Matrix::make(ctx, "none/w", Dtype::bf16, 8, 16);
  TypedBuffer x(ctx, Dtype::bf16, 0), y(ctx, Dtype::bf16, 0);
  const MatmulSegment segment{w.view(), y.view({0, 8})};
  EXPECT_NO_THROW(matvec(ctx, {.x = x.view({0, 16}), .segments = {&segment, 1}}));
  EXPECT_TRUE(y.guards_intact());
}

}  // namespace
