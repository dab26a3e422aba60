#include "kernels/matmul.h"

#include <gtest/gtest.h>

#include <hwy/targets.h>
#include <cstring>

#include "kernels/cpu/matmul.h"
#include "tests/kernels/weight.h"

namespace kda::test {
namespace {

enum class Op { matmul, matvec };
constexpr Dtype kWeightTypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i8};

void call(Op op, Context& ctx, const Matmul& a) { op == Op::matmul ? matmul(ctx, a) : matvec(ctx, a); }

size_t workspace_bytes(Op op, const Context& ctx, int64_t R, int64_t K, int64_t N) {
  return op == Op::matmul ? matmul_workspace_bytes(ctx, R, K, N) : matvec_workspace_bytes(ctx, R, K, N);
}

struct OneContext : CpuContext {  // a workspace of exactly the size that was asked for
  OneContext(Op op, int threads, Precision p, int64_t R, int64_t K, int64_t N) : CpuContext(threads, p, 1) {
    workspace = host_tensor(Dtype::u8, {int64_t(workspace_bytes(op, *this, R, K, N))});
  }
};

// fp32: K roundings of at most 2^-24 each in whatever order, plus the scale's. bf16 operands: 8 significant bits, so
// each of the two is off by 2^-8 at most, and their products may meet the sum two at a time.
double tolerance(bool bf16_operands, int64_t K) {
  const double sums = double(K + 4) * std::ldexp(1, -24);
  return bf16_operands ? 2 * std::ldexp(1, -8) + std::ldexp(1, -16) + 2 * sums : sums;
}

void check_against_reference(Op op, Precision precision, int64_t R, int64_t N, int64_t K, Dtype d) {
  SCOPED_TRACE(cat(op == Op::matmul ? "matmul " : "matvec ", R, "x", N, "x", K, " ", name_of(d), " ",
                   precision == Precision::fast ? "fast" : "exact"));
  OneContext ctx(op, 2, precision, R, K, N);
  const auto xs = values(cat("x", R, K), R * K);
  const Weight w(cat("w", N, K), d, N, K);
  const Buffer x(ctx, xs);
  Buffer y(ctx, R * N);
  const MatmulSegment s{.w = w.view, .y = y.view({R, N})};
  call(op, ctx, {.x = x.view({R, K}), .segments = {&s, 1}});
  const bool rounded = op == Op::matmul && precision == Precision::fast && cpu::cpu_has_bf16();
  EXPECT_TRUE(near(y.fetch(), ref::matmul({xs.begin(), xs.end()}, w.values, R, N, K), tolerance(rounded, K)));
  EXPECT_TRUE(y.guards_intact());
}

TEST(Matmul, ComparisonCanFail) {
  ref::Product p = ref::matmul({1, 2}, {3, -4}, 1, 1, 2);
  EXPECT_EQ(p.y[0], -5);
  EXPECT_EQ(p.terms[0], 11);
  EXPECT_TRUE(near({-5.0f}, p, 1e-6));
  EXPECT_FALSE(near({-5.001f}, p, 1e-6));
  EXPECT_FALSE(near({std::nanf("")}, p, 1));
}

TEST(Matmul, EqualsTheReferenceAtSizesAroundEveryBlock) {
  for (Dtype d : kWeightTypes) {
    for (Op op : {Op::matmul, Op::matvec})
      for (Precision p : {Precision::fast, Precision::exact}) {
        if (op == Op::matvec && p == Precision::fast) continue;  // one and the same
        for (int64_t R : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130}) check_against_reference(op, p, R, 20, 65, d);
        for (int64_t K : {1, 3, 20, 31, 32, 33, 63, 64, 127, 128, 129, 300, 1000})
          check_against_reference(op, p, 3, 66, K, d);
        for (int64_t N : {1, 3, 63, 64, 65, 127, 128, 129, 300, 1000}) check_against_reference(op, p, 17, N, 33, d);
        for (int64_t N : {64, 1088}) check_against_reference(op, p, 1040, N, 32, d);
      }
  }
}

// oneDNN is capped by DNNL_MAX_CPU_ISA, for a whole process: targets_test.cc runs these tests again under it.
TEST(Matmul, EqualsTheReferenceOnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    for (Dtype d : kWeightTypes)
      for (int64_t K : {1, 15, 33, 130}) {
        check_against_reference(Op::matvec, Precision::exact, 6, 21, K, d);
        check_against_reference(Op::matmul, Precision::exact, 6, 21, K, d);
        check_against_reference(Op::matmul, Precision::fast, 6, 85, K, d);
      }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

TEST(Matmul, SeveralMatricesShareTheirInput) {
  const int64_t R = 35, K = 96;
  const int64_t Ns[] = {128, 1, 20, 129, 64, 257, 3, 65};
  const auto xs = values("x", R * K);
  for (Op op : {Op::matmul, Op::matvec})
    for (Precision p : {Precision::fast, Precision::exact}) {
      OneContext ctx(op, 2, p, R, K, 257);
      const Buffer x(ctx, xs);
      std::vector<Weight> w;
      std::vector<Buffer> y;
      w.reserve(8);
      for (int i = 0; i < 8; ++i) {
        w.emplace_back(cat("w", i), kWeightTypes[i % 4], Ns[i], K);
        y.emplace_back(ctx, R * Ns[i]);
      }
      std::vector<MatmulSegment> s;
      for (size_t i = 0; i < 8; ++i) s.push_back({.w = w[i].view, .y = y[i].view({R, Ns[i]})});
      call(op, ctx, {.x = x.view({R, K}), .segments = s});
      const bool rounded = op == Op::matmul && p == Precision::fast && cpu::cpu_has_bf16();
      for (size_t i = 0; i < 8; ++i) {
        EXPECT_TRUE(
            near(y[i].fetch(), ref::matmul({xs.begin(), xs.end()}, w[i].values, R, Ns[i], K), tolerance(rounded, K)))
            << "matrix " << i;
        EXPECT_TRUE(y[i].guards_intact());
      }
    }
}

// Row by row, in ragged blocks, all at once; 1, 2 and 3 threads: the same bits.
TEST(Matmul, ARowDoesNotDependOnItsNeighboursNorOnThreads) {
  const int64_t R = 275;
  for (int64_t K : {65, 320, 4100, 18432}) {
    const int64_t N = K > 10000 ? 70 : 150;
    const auto xs = values("x", R * K);
    for (Dtype d : kWeightTypes) {
      if (K > 1000 && d != Dtype::bf16) continue;
      const Weight w("w", d, N, K);
      for (Op op : {Op::matmul, Op::matvec})
        for (Precision p : {Precision::fast, Precision::exact}) {
          if (K > 10000 && (op == Op::matvec || p == Precision::exact)) continue;  // AMX kernels cut a long K by rows
          const auto run = [&](int threads, int64_t from, int64_t rows) {
            OneContext ctx(op, threads, p, rows, K, N);
            const Buffer x(ctx, {xs.begin() + from * K, xs.begin() + (from + rows) * K});
            Buffer y(ctx, rows * N);
            const MatmulSegment s{.w = w.view, .y = y.view({rows, N})};
            call(op, ctx, {.x = x.view({rows, K}), .segments = {&s, 1}});
            return y.fetch();
          };
          const auto whole = run(1, 0, R);
          EXPECT_EQ(whole, run(2, 0, R));
          EXPECT_EQ(whole, run(3, 0, R));
          for (int64_t rows : {1, 2, 3, 5, 15, 16, 17, 31, 33, 48, 65, 80, 97, 112, 127, 128, 129, 200}) {
            const int64_t from = (rows * 37) % (R - rows);
            const auto part = run(1, from, rows);
            EXPECT_EQ(0, std::memcmp(part.data(), whole.data() + from * N, part.size() * sizeof(float)))
                << rows << " rows from " << from << ", K " << K << ", " << name_of(d);
          }
        }
    }
  }
}

// Small matrices are packed beforehand and multiplied by blocks of rows; beyond 4 MB of them, or with more columns than
// one call has, by panels: at sizes on both sides a row has the same bits alone and among many, on any threads.
TEST(Matmul, ARowDoesNotDependOnTheWayItIsCut) {
  const int64_t R = 1100, K = 256;
  const auto xs = values("x", R * K);
  for (int64_t N : {64, 1000, 1024, 1025, 9000})
    for (Dtype d : {Dtype::bf16, Dtype::i8}) {
      if (N > 5000 && d != Dtype::bf16) continue;
      const Weight w("w", d, N, K);
      for (Precision p : {Precision::fast, Precision::exact}) {
        const auto run = [&](int threads, int64_t from, int64_t rows) {
          OneContext ctx(Op::matmul, threads, p, rows, K, N);
          const Buffer x(ctx, {xs.begin() + from * K, xs.begin() + (from + rows) * K});
          Buffer y(ctx, rows * N);
          const MatmulSegment s{.w = w.view, .y = y.view({rows, N})};
          matmul(ctx, {.x = x.view({rows, K}), .segments = {&s, 1}});
          EXPECT_TRUE(y.guards_intact());
          return y.fetch();
        };
        const auto whole = run(1, 0, R);
        EXPECT_EQ(whole, run(3, 0, R));
        for (int64_t rows : {1, 17, 128, 1030}) {
          const int64_t from = (rows * 37) % (R - rows);
          const auto part = run(2, from, rows);
          EXPECT_EQ(0, std::memcmp(part.data(), whole.data() + from * N, part.size() * sizeof(float)))
              << rows << " rows from " << from << ", N " << N << ", " << name_of(d);
        }
      }
    }
}

TEST(Matmul, DoorsRefuseWhatDoesNotFit) {
  CpuContext ctx(1);
  const Buffer x(ctx, 6);
  Buffer y(ctx, 8);
  const Weight w("w", Dtype::f32, 4, 3), q("q", Dtype::i8, 4, 3);
  const auto refuse = [&](ConstView xv, std::vector<MatmulSegment> s, const std::string& part) {
    for (Op op : {Op::matmul, Op::matvec}) {
      try {
        call(op, ctx, {.x = xv, .segments = s});
        ADD_FAILURE() << "accepted: " << part;
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
      }
    }
  };
  const View xv = x.view({2, 3}), yv = y.view({2, 4});
  const MatmulSegment good{.w = w.view, .y = yv};
  refuse(xv, {}, "needs 1 to 8");
  refuse(xv, std::vector<MatmulSegment>(9, good), "needs 1 to 8");
  refuse(x.view({6}), {good}, "x must be f32 [R,K]");
  refuse(ConstView{x.data(), Dtype::bf16, {2, 3}}, {good}, "x must be f32 [R,K]");
  refuse(x.view({3, 2}), {good}, "must be [N,2], got [4,3]");
  refuse(xv, {good, {.w = w.view, .y = y.view({4, 2})}}, "y of matrix 1");
  MatmulSegment s = good;
  s.w.w.dtype = Dtype::i32;
  refuse(xv, {s}, "must be f32, bf16, f16 or i8");
  s = {.w = q.view, .y = yv};
  s.w.scale.shape = {3};
  refuse(xv, {s}, "needs f32 scales [4]");
  s.w.scale = {};
  refuse(xv, {s}, "needs f32 scales [4]");
  s = good;
  s.w.scale = q.view.scale;
  refuse(xv, {s}, "takes no scales");
  ctx.workspace = host_tensor(Dtype::u8, {64});
  EXPECT_THROW(matmul(ctx, {.x = xv, .segments = {&good, 1}}), Error);
}

}  // namespace
}  // namespace kda::test
