#include "kernels/attention_train.h"

#include <gtest/gtest.h>

#include <hwy/targets.h>

#include "tests/check.h"
#include "tests/ref/attention.h"
#include "tests/ref/gradient.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

struct Problem {
  int64_t H, G, d;
  std::vector<int32_t> start;
  float size = 1;  // of q: how sharp the softmax is
  int64_t T() const { return start.back(); }
};

struct Results {
  std::vector<float> o, lse, dq, dk, dv;
  bool operator==(const Results&) const = default;
};

std::vector<float> drawn(const char* name, const Problem& p, int64_t heads, float size = 1) {
  return values(name, p.T() * heads * p.d, size);
}

Results run(const Problem& p, int threads) {
  CpuContext ctx(threads, Precision::exact, 1);
  const int64_t T = p.T();
  ctx.workspace =
      host_tensor(Dtype::u8, {int64_t(std::max(attention_train_workspace_bytes(ctx, T, p.H, p.d),
                                               attention_backward_workspace_bytes(ctx, T, p.H, p.G, p.d)))});
  const Buffer q(ctx, drawn("q", p, p.H, p.size)), k(ctx, drawn("k", p, p.G)), v(ctx, drawn("v", p, p.G));
  const Buffer d_o(ctx, drawn("do", p, p.H));
  Buffer o(ctx, T * p.H * p.d), lse(ctx, T * p.H), dq(ctx, T * p.H * p.d), dk(ctx, T * p.G * p.d);
  Buffer dv(ctx, T * p.G * p.d);
  const Shape queries{T, p.H, p.d}, keys{T, p.G, p.d};
  const Packing packing{.host_start = p.start, .start = p.start.data()};
  attention_train(ctx, {.q = q.view(queries),
                        .k = k.view(keys),
                        .v = v.view(keys),
                        .packing = packing,
                        .o = o.view(queries),
                        .lse = lse.view({T, p.H})});
  attention_backward(ctx, {.q = q.view(queries),
                           .k = k.view(keys),
                           .v = v.view(keys),
                           .o = o.view(queries),
                           .d_o = d_o.view(queries),
                           .lse = lse.view({T, p.H}),
                           .packing = packing,
                           .dq = dq.view(queries),
                           .dk = dk.view(keys),
                           .dv = dv.view(keys)});
  EXPECT_TRUE(o.guards_intact() && lse.guards_intact() && dq.guards_intact() && dk.guards_intact() &&
              dv.guards_intact());
  return {o.fetch(), lse.fetch(), dq.fetch(), dk.fetch(), dv.fetch()};
}

struct Wanted {
  std::vector<double> o, lse, dq, dk, dv;
};

Wanted wanted(const Problem& p) {
  Wanted all;
  const auto q = wide(drawn("q", p, p.H, p.size)), k = wide(drawn("k", p, p.G)), v = wide(drawn("v", p, p.G));
  const auto d_o = wide(drawn("do", p, p.H));
  const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (size_t n = 0; n + 1 < p.start.size(); ++n) {
    const auto part = [&](const std::vector<double>& x, int64_t heads) {
      return std::vector<double>(x.begin() + p.start[n] * heads * p.d, x.begin() + p.start[n + 1] * heads * p.d);
    };
    const auto sq = part(q, p.H), sk = part(k, p.G), sv = part(v, p.G);
    const auto g = ref::attention_backward(sq, sk, sv, part(d_o, p.H), size_t(p.H), size_t(p.G), size_t(p.d));
    add(all.o, ref::attention(sq, sk, sv, size_t(p.H), size_t(p.G), size_t(p.d)));
    add(all.lse, g.lse), add(all.dq, g.dq), add(all.dk, g.dk), add(all.dv, g.dv);
  }
  return all;
}

double largest(const std::vector<double>& v) {
  double most = 1e-30;
  for (double x : v) most = std::max(most, std::abs(x));
  return most;
}

// A score adds up d products of at most `size` each, times d^-1/2, and its error passes through exp unchanged in
// relative size: about (d + 4) 2^-24 sqrt(d) size / 4. Everything after adds up at most `longest` terms.
void check(const Problem& p) {
  SCOPED_TRACE(cat("H ", p.H, " G ", p.G, " d ", p.d, " sequences ", p.start.size() - 1, " T ", p.T()));
  const Results got = run(p, 2);
  const Wanted want = wanted(p);
  const double e = std::ldexp(1, -24), scores = double(p.d + 4) * std::sqrt(double(p.d)) * double(p.size) / 4;
  const double tolerance = e * (16 + scores + double(p.T()) / 8);
  EXPECT_TRUE(close(got.o, want.o, tolerance, 1));
  EXPECT_TRUE(close(got.lse, want.lse, tolerance, 1 + largest(want.lse)));
  // ds = p (dp - D) cancels: dp and D are at most d; then up to a whole sequence of such terms is added up.
  EXPECT_TRUE(close(got.dq, want.dq, 4 * tolerance, std::sqrt(double(p.d))));
  EXPECT_TRUE(close(got.dk, want.dk, 4 * tolerance, std::sqrt(double(p.d)) * double(p.size) + largest(want.dk)));
  EXPECT_TRUE(close(got.dv, want.dv, 4 * tolerance, 1 + largest(want.dv)));
}

TEST(AttentionTrain, ReferenceGradientIsTheComplexStep) {
  const size_t H = 4, G = 2, d = 3, L = 5;
  const auto q = wide(values("q", L * H * d, 2)), k = wide(values("k", L * G * d)), v = wide(values("v", L * G * d));
  const auto d_o = wide(values("do", L * H * d));
  const auto got = ref::attention_backward(q, k, v, d_o, H, G, d);
  const auto cq = ref::complex_of(q), ck = ref::complex_of(k), cv = ref::complex_of(v);
  const auto by = [&](const auto& f, const std::vector<double>& x) { return ref::gradient(f, x, d_o); };
  const auto dq = by([&](const auto& z) { return ref::attention(z, ck, cv, H, G, d); }, q);
  const auto dk = by([&](const auto& z) { return ref::attention(cq, z, cv, H, G, d); }, k);
  const auto dv = by([&](const auto& z) { return ref::attention(cq, ck, z, H, G, d); }, v);
  EXPECT_TRUE(close(got.dq, dq, 1e-14, 1));
  EXPECT_TRUE(close(got.dk, dk, 1e-14, 1));
  EXPECT_TRUE(close(got.dv, dv, 1e-14, 1));
  auto wrong = dk;
  wrong[4] += 1e-12;
  EXPECT_FALSE(close(got.dk, wrong, 1e-14, 1));
}

TEST(AttentionTrain, EqualsTheReferenceAtSizesAroundEveryTile) {
  for (int32_t L : {0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 200}) check({2, 1, 16, {0, L}});
  for (int64_t d : {1, 3, 8, 15, 16, 17, 64, 65, 128, 130}) check({2, 2, d, {0, 70}});
  for (int64_t G : {1, 2, 3, 6}) check({6, G, 20, {0, 70}});
}

TEST(AttentionTrain, SequencesDoNotMix) {
  check({4, 2, 64, {0, 0, 1, 66, 66, 66, 200, 264, 264}});
  check({4, 2, 64, {0, 0}});
  check({4, 2, 64, {0}});
}

TEST(AttentionTrain, SharpSoftmax) { check({2, 1, 32, {0, 150}, 40}); }

TEST(AttentionTrain, OnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    check({4, 2, 33, {0, 3, 90}});
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

TEST(AttentionTrain, ComparisonCanFail) {
  const Problem p{2, 1, 16, {0, 70}};
  const Results got = run(p, 1);
  auto want = wanted(p);
  EXPECT_TRUE(close(got.dk, want.dk, 1e-5, 1));
  want.dk[33] += 1e-3;
  EXPECT_FALSE(close(got.dk, want.dk, 1e-5, 1));
}

TEST(AttentionTrain, DoesNotDependOnThreadsNorOnOtherSequences) {
  const Problem p{4, 2, 24, {0, 130, 131, 300}};
  const Results one = run(p, 1);
  EXPECT_EQ(one, run(p, 2));
  EXPECT_EQ(one, run(p, 3));
  const Results first = run({4, 2, 24, {0, 130}}, 2);
  EXPECT_TRUE(std::equal(first.dq.begin(), first.dq.end(), one.dq.begin()));
  EXPECT_TRUE(std::equal(first.dk.begin(), first.dk.end(), one.dk.begin()));
}

TEST(AttentionTrain, RefusesWrongShapes) {
  CpuContext ctx(1);
  std::vector<float> m(64);
  const std::vector<int32_t> start{0, 2};
  const View q = view(m.data(), {2, 4, 2}), k = view(m.data(), {2, 2, 2}), lse = view(m.data(), {2, 4});
  const Packing packing{.host_start = start, .start = start.data()};
  const AttentionTrain good{.q = q, .k = k, .v = k, .packing = packing, .o = q, .lse = lse};
  auto bad = good;
  bad.k = bad.v = view(m.data(), {2, 3, 2});
  EXPECT_THROW(attention_train(ctx, bad), Error);
  bad = good;
  bad.lse.shape = {4, 2};
  EXPECT_THROW(attention_train(ctx, bad), Error);
  const std::vector<int32_t> other{0, 3};
  bad = good;
  bad.packing = {.host_start = other, .start = other.data()};
  EXPECT_THROW(attention_train(ctx, bad), Error);
  const AttentionBackward fine{
      .q = q, .k = k, .v = k, .o = q, .d_o = q, .lse = lse, .packing = packing, .dq = q, .dk = k, .dv = k};
  auto wrong = fine;
  wrong.dk.shape = {2, 4, 2};
  EXPECT_THROW(attention_backward(ctx, wrong), Error);
  wrong = fine;
  wrong.d_o.dtype = Dtype::bf16;
  EXPECT_THROW(attention_backward(ctx, wrong), Error);
  ctx.workspace = host_tensor(Dtype::u8, {64});
  EXPECT_THROW(attention_train(ctx, good), Error);
  EXPECT_THROW(attention_backward(ctx, fine), Error);
}

}  // namespace
}  // namespace kda::test
