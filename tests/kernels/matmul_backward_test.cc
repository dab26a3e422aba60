#include "kernels/matmul_backward.h"

#include <gtest/gtest.h>

#include "kernels/cpu/matmul.h"
#include "tests/kernels/weight.h"
#include "tests/ref/matmul_backward.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// A workspace of exactly the size that was asked for.
struct DxContext : CpuContext {
  DxContext(int threads, Precision p, int64_t R, int64_t K, int64_t N) : CpuContext(threads, p, 1) {
    workspace = host_tensor(Dtype::u8, {int64_t(matmul_dx_workspace_bytes(*this, R, K, N))});
  }
};
struct DwContext : CpuContext {
  DwContext(int threads, Precision p, int64_t R, int64_t K, int64_t N) : CpuContext(threads, p, 1) {
    workspace = host_tensor(Dtype::u8, {int64_t(matmul_dw_workspace_bytes(*this, R, K, N))});
  }
};

// fp32: `terms` roundings of at most 2^-24 each in whatever order; every operand rounded to bf16 is off by 2^-8 at
// most, and their products may meet the sum two at a time.
double tolerance(int rounded_operands, int64_t terms) {
  const double sums = double(terms + 8) * std::ldexp(1, -24);
  return rounded_operands ? rounded_operands * std::ldexp(1, -8) + std::ldexp(1, -16) + 2 * sums : sums;
}

void check_dx(Precision precision, int64_t R, int64_t N, int64_t K, Dtype d) {
  SCOPED_TRACE(cat("dx ", R, "x", N, "x", K, " ", name_of(d), precision == Precision::fast ? " fast" : " exact"));
  DxContext ctx(2, precision, R, K, N);
  const auto dys = values(cat("dy", R, N), R * N);
  const Weight w(cat("w", N, K), d, N, K);
  const Buffer dy(ctx, dys);
  Buffer dx(ctx, R * K);
  const MatmulDxSegment s{.w = w.view, .dy = dy.view({R, N})};
  matmul_dx(ctx, {.segments = {&s, 1}, .dx = dx.view({R, K})});
  const bool rounded = precision == Precision::fast && d == Dtype::bf16 && cpu::cpu_has_bf16();
  EXPECT_TRUE(near(dx.fetch(), ref::matmul_dx(wide(dys), w.values, R, N, K), tolerance(rounded ? 1 : 0, N)));
  EXPECT_TRUE(dx.guards_intact());
}

void check_dw(Precision precision, int64_t R, int64_t N, int64_t K) {
  SCOPED_TRACE(cat("dw ", R, "x", N, "x", K, precision == Precision::fast ? " fast" : " exact"));
  DwContext ctx(2, precision, R, K, N);
  const auto dys = values(cat("dy", R, N), R * N), xs = values(cat("x", R, K), R * K), before = values("dw", N * K);
  const Buffer dy(ctx, dys), x(ctx, xs);
  Buffer dw(ctx, before);
  const MatmulDwSegment s{.dy = dy.view({R, N}), .dw = dw.view({N, K})};
  matmul_dw(ctx, {.x = x.view({R, K}), .segments = {&s, 1}});
  auto want = ref::matmul_dw(wide(dys), wide(xs), R, N, K);
  for (size_t i = 0; i < before.size(); ++i) {
    want.y[i] += double(before[i]);
    want.terms[i] += std::abs(double(before[i]));
  }
  const bool rounded = precision == Precision::fast && cpu::cpu_has_bf16();
  EXPECT_TRUE(near(dw.fetch(), want, tolerance(rounded ? 2 : 0, R)));
  EXPECT_TRUE(dw.guards_intact());
}

constexpr Precision kPrecisions[] = {Precision::fast, Precision::exact};

TEST(MatmulDx, EqualsTheReferenceAtSizesAroundEveryBlock) {
  for (Precision p : kPrecisions)
    for (Dtype d : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (int64_t R : {0, 1, 2, 15, 16, 17, 127, 128, 129, 257}) check_dx(p, R, 33, 64, d);
      for (int64_t N : {0, 1, 31, 32, 33, 65, 1000}) check_dx(p, 18, N, 65, d);
      for (int64_t K : {1, 2, 20, 63, 64, 65, 128, 511, 512, 513, 576}) check_dx(p, 17, 34, K, d);
    }
}

TEST(MatmulDx, LongSumsTakeTurns) {
  check_dx(Precision::fast, 3, 4097, 65, Dtype::bf16);
  check_dx(Precision::exact, 3, 4097, 65, Dtype::bf16);
  check_dx(Precision::fast, 2, 8225, 20, Dtype::bf16);
}

TEST(MatmulDx, AddsUpSeveralMatricesOfAnyType) {
  const int64_t R = 35, K = 96, Ns[] = {128, 1, 20, 129, 4000, 257, 3, 65};
  const Dtype types[] = {Dtype::bf16, Dtype::f32, Dtype::f16};
  for (Precision p : kPrecisions) {
    DxContext ctx(2, p, R, K, 4000);
    std::vector<Weight> w;
    std::vector<Buffer> dy;
    w.reserve(8);
    ref::Product want;
    want.y.resize(size_t(R * K)), want.terms.resize(size_t(R * K));
    for (int i = 0; i < 8; ++i) {
      const auto v = values(cat("dy", i), R * Ns[i]);
      w.emplace_back(cat("w", i), types[i % 3], Ns[i], K);
      dy.emplace_back(ctx, v);
      const auto part = ref::matmul_dx(wide(v), w.back().values, R, Ns[i], K);
      for (size_t j = 0; j < part.y.size(); ++j) want.y[j] += part.y[j], want.terms[j] += part.terms[j];
    }
    std::vector<MatmulDxSegment> s;
    for (size_t i = 0; i < 8; ++i) s.push_back({.w = w[i].view, .dy = dy[i].view({R, Ns[i]})});
    Buffer dx(ctx, R * K);
    matmul_dx(ctx, {.segments = s, .dx = dx.view({R, K})});
    const bool rounded = p == Precision::fast && cpu::cpu_has_bf16();
    EXPECT_TRUE(near(dx.fetch(), want, tolerance(rounded ? 1 : 0, 4603)));
    EXPECT_TRUE(dx.guards_intact());
    // One weight more or less would be seen.
    want.y[7] += 0.02 * want.terms[7];
    EXPECT_FALSE(near(dx.fetch(), want, tolerance(rounded ? 1 : 0, 4603)));
  }
}

TEST(MatmulDw, EqualsTheReferenceAtSizesAroundEveryBlock) {
  for (Precision p : kPrecisions) {
    for (int64_t R : {0, 1, 2, 15, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 2100}) check_dw(p, R, 20, 33);
    for (int64_t N : {0, 1, 15, 16, 17, 127, 128, 129, 300}) check_dw(p, 70, N, 65);
    for (int64_t K : {1, 2, 20, 63, 64, 65, 128, 511, 512, 513, 576}) check_dw(p, 40, 18, K);
  }
}

TEST(MatmulDw, SeveralMatricesShareTheirInput) {
  const int64_t R = 150, K = 96, Ns[] = {128, 1, 20, 129, 64, 257, 3, 65};
  const auto xs = values("x", R * K);
  for (Precision p : kPrecisions) {
    DwContext ctx(2, p, R, K, 257);
    const Buffer x(ctx, xs);
    std::vector<std::vector<float>> dys;
    std::vector<Buffer> dy, dw;
    for (int i = 0; i < 8; ++i) {
      dys.push_back(values(cat("dy", i), R * Ns[i]));
      dy.emplace_back(ctx, dys.back());
      dw.emplace_back(ctx, std::vector<float>(size_t(Ns[i] * K)));
    }
    std::vector<MatmulDwSegment> s;
    for (size_t i = 0; i < 8; ++i) s.push_back({.dy = dy[i].view({R, Ns[i]}), .dw = dw[i].view({Ns[i], K})});
    matmul_dw(ctx, {.x = x.view({R, K}), .segments = s});
    const bool rounded = p == Precision::fast && cpu::cpu_has_bf16();
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_TRUE(
          near(dw[i].fetch(), ref::matmul_dw(wide(dys[i]), wide(xs), R, Ns[i], K), tolerance(rounded ? 2 : 0, R)))
          << "matrix " << i;
      EXPECT_TRUE(dw[i].guards_intact());
    }
  }
}

TEST(MatmulBackward, DoesNotDependOnThreads) {
  const int64_t R = 1300, K = 150, N = 300;
  const auto dys = values("dy", R * N), xs = values("x", R * K);
  const Weight w("w", Dtype::bf16, N, K);
  for (Precision p : kPrecisions) {
    const auto run = [&](int threads) {
      DxContext ctx(threads, p, R, K, N);
      const Buffer dy(ctx, dys), x(ctx, xs);
      Buffer dx(ctx, R * K), dw(ctx, std::vector<float>(size_t(N * K), 0.5f));
      const MatmulDxSegment s{.w = w.view, .dy = dy.view({R, N})};
      matmul_dx(ctx, {.segments = {&s, 1}, .dx = dx.view({R, K})});
      DwContext other(threads, p, R, K, N);
      const MatmulDwSegment t{.dy = dy.view({R, N}), .dw = dw.view({N, K})};
      matmul_dw(other, {.x = x.view({R, K}), .segments = {&t, 1}});
      return std::pair(dx.fetch(), dw.fetch());
    };
    const auto one = run(1);
    EXPECT_EQ(one, run(2));
    EXPECT_EQ(one, run(3));
  }
}

TEST(MatmulBackward, NotANumberStaysOne) {
  CpuContext ctx(1, Precision::fast);
  std::vector<float> v(64, 1.0f);
  v[5] = std::nanf("");
  const Buffer dy(ctx, v);
  const Weight w("w", Dtype::bf16, 8, 3);
  Buffer dx(ctx, 24), dw(ctx, std::vector<float>(24));
  const MatmulDxSegment s{.w = w.view, .dy = dy.view({8, 8})};
  matmul_dx(ctx, {.segments = {&s, 1}, .dx = dx.view({8, 3})});
  EXPECT_TRUE(std::isnan(dx.fetch()[0]) && !std::isnan(dx.fetch()[3]));
  const Buffer x(ctx, std::vector<float>(24, 1.0f));
  const MatmulDwSegment t{.dy = dy.view({8, 8}), .dw = dw.view({8, 3})};
  matmul_dw(ctx, {.x = x.view({8, 3}), .segments = {&t, 1}});
  EXPECT_TRUE(std::isnan(dw.fetch()[15]) && !std::isnan(dw.fetch()[0]));
}

template <class F>
void refuse(const F& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "accepted: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(MatmulBackward, DoorsRefuseWhatDoesNotFit) {
  CpuContext ctx(1);
  const Buffer x(ctx, 6);
  Buffer y(ctx, 8), z(ctx, 12);
  const Weight w("w", Dtype::f32, 4, 3), q("q", Dtype::i8, 4, 3);
  const MatmulDxSegment good{.w = w.view, .dy = y.view({2, 4})};
  const auto dx = [&](std::vector<MatmulDxSegment> s, View to) {
    return [&ctx, s, to] { matmul_dx(ctx, {.segments = s, .dx = to}); };
  };
  refuse(dx({}, x.view({2, 3})), "needs 1 to 8");
  refuse(dx(std::vector<MatmulDxSegment>(9, good), x.view({2, 3})), "needs 1 to 8");
  refuse(dx({good}, x.view({3, 2})), "must be [N,2]");
  refuse(dx({good}, x.view({1, 3})), "dy of matrix 0");
  refuse(dx({{.w = q.view, .dy = y.view({2, 4})}}, x.view({2, 3})), "without scales");
  const MatmulDwSegment fine{.dy = y.view({2, 4}), .dw = z.view({4, 3})};
  const auto dw = [&](std::vector<MatmulDwSegment> s, View from) {
    return [&ctx, s, from] { matmul_dw(ctx, {.x = from, .segments = s}); };
  };
  refuse(dw({}, x.view({2, 3})), "needs 1 to 8");
  refuse(dw({fine}, x.view({1, 3})), "dy of matrix 0");
  refuse(dw({{.dy = y.view({2, 4}), .dw = z.view({3, 4})}}, x.view({2, 3})), "dw of matrix 0");
  ctx.workspace = host_tensor(Dtype::u8, {64});
  refuse(dx({good}, x.view({2, 3})), "needs a workspace");
  refuse(dw({fine}, x.view({2, 3})), "needs a workspace");
}

}  // namespace
}  // namespace kda::test
