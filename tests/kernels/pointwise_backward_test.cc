#include "kernels/pointwise_backward.h"

#include <gtest/gtest.h>

#include <hwy/targets.h>

#include "tests/check.h"
#include "tests/ref/gradient.h"
#include "tests/ref/pointwise.h"
#include "tests/ref/rope.h"

namespace kda::test {
namespace {

std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// The gradient of an elementwise function: one complex step for all elements at once.
template <class F>
std::vector<double> slope(const F& f, const std::vector<float>& x, const std::vector<float>& dy) {
  std::vector<ref::Complex> z;
  for (float v : x) z.emplace_back(double(v), 1e-60);
  std::vector<double> g;
  const auto y = f(z);
  for (size_t i = 0; i < y.size(); ++i) g.push_back(y[i].imag() / 1e-60 * double(dy[i]));
  return g;
}

const int64_t kRows[] = {0, 1, 2, 3}, kWidths[] = {1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 1000};

void check_relu2(int64_t R, int64_t F) {
  CpuContext ctx(2, Precision::exact, 1);
  const auto x = values("x", R * F, 2), dy = values("dy", R * F);
  const Buffer xs(ctx, x);
  Buffer in_place(ctx, dy), dx(ctx, R * F);
  relu2_backward(ctx, {.x = xs.view({R, F}), .dy = in_place.view({R, F}), .dx = dx.view({R, F})});
  const auto want = slope([](const auto& z) { return ref::relu2(z); }, x, dy);
  EXPECT_TRUE(close(dx.fetch(), want, std::ldexp(1, -23), 4)) << R << "x" << F;
  relu2_backward(ctx, {.x = xs.view({R, F}), .dy = in_place.view({R, F}), .dx = in_place.view({R, F})});
  EXPECT_EQ(in_place.fetch(), dx.fetch());
  EXPECT_TRUE(dx.guards_intact() && in_place.guards_intact());
}

void check_swiglu(int64_t R, int64_t F, float size) {
  CpuContext ctx(2, Precision::exact, 1);
  const auto gate = values("gate", R * F, size), up = values("up", R * F), dy = values("dy", R * F);
  const Buffer g(ctx, gate), u(ctx, up);
  Buffer in_place(ctx, dy), dgate(ctx, R * F), dup(ctx, R * F);
  const Shape shape{R, F};
  SwiGluBackward a{.gate = g.view(shape),
                   .up = u.view(shape),
                   .dy = in_place.view(shape),
                   .dgate = dgate.view(shape),
                   .dup = dup.view(shape)};
  swiglu_backward(ctx, a);
  const auto cg = ref::complex_of(wide(gate)), cu = ref::complex_of(wide(up));
  const auto want_gate = slope([&](const auto& z) { return ref::swiglu(z, cu); }, gate, dy);
  const auto want_up = slope([&](const auto& z) { return ref::swiglu(cg, z); }, up, dy);
  // exp is within 3 units, the rest rounds seven times; 1 + gate (1 - s) has terms of at most 1 + 0.3.
  EXPECT_TRUE(close(dgate.fetch(), want_gate, 10 * std::ldexp(1, -24), 2)) << R << "x" << F;
  EXPECT_TRUE(close(dup.fetch(), want_up, 10 * std::ldexp(1, -24), double(size))) << R << "x" << F;
  EXPECT_TRUE(dgate.guards_intact() && dup.guards_intact());
  a.dup = in_place.view(shape);
  swiglu_backward(ctx, a);
  EXPECT_EQ(in_place.fetch(), dup.fetch());
  EXPECT_TRUE(in_place.guards_intact());
}

TEST(PointwiseBackward, EqualsTheComplexStep) {
  for (int64_t R : kRows)
    for (int64_t F : kWidths) {
      check_relu2(R, F);
      check_swiglu(R, F, 4);
      check_swiglu(R, F, 60);
    }
  check_relu2(9, 4099);
  check_swiglu(9, 4099, 4);
}

TEST(PointwiseBackward, OnEveryInstructionSet) {
  for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & -left);
    hwy::GetChosenTarget().DeInit();
    SCOPED_TRACE(hwy::TargetName(left & -left));
    check_relu2(2, 37);
    check_swiglu(2, 37, 4);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

TEST(PointwiseBackward, NotANumberStaysOneAndFarGatesAreFinite) {
  CpuContext ctx(1);
  const Buffer x(ctx, std::vector<float>{std::nanf(""), -1, 100, -100}), one(ctx, std::vector<float>(4, 1));
  Buffer a(ctx, 4), b(ctx, 4);
  relu2_backward(ctx, {.x = x.view({1, 4}), .dy = one.view({1, 4}), .dx = a.view({1, 4})});
  EXPECT_TRUE(std::isnan(a.fetch()[0]) && a.fetch()[1] == 0 && a.fetch()[2] == 200);
  swiglu_backward(ctx, {.gate = x.view({1, 4}),
                        .up = one.view({1, 4}),
                        .dy = one.view({1, 4}),
                        .dgate = a.view({1, 4}),
                        .dup = b.view({1, 4})});
  EXPECT_FLOAT_EQ(a.fetch()[2], 1);
  EXPECT_NEAR(a.fetch()[3], 0, 1e-30);
  EXPECT_FLOAT_EQ(b.fetch()[2], 100);
}

std::vector<float> bias(int threads, int64_t R, int64_t D, const std::vector<float>& dy) {
  CpuContext ctx(threads, Precision::exact, 1);
  ctx.workspace = host_tensor(Dtype::u8, {int64_t(add_bias_backward_workspace_bytes(ctx, R, D))});
  const Buffer in(ctx, dy);
  Buffer out(ctx, std::vector<float>(size_t(D), 0.5f));
  add_bias_backward(ctx, {.dy = in.view({R, D}), .dbias = out.view({D})});
  EXPECT_TRUE(out.guards_intact());
  return out.fetch();
}

TEST(AddBiasBackward, SumsRowsOnAnyThreads) {
  for (int64_t R : {0, 1, 2, 5, 300, 20000})
    for (int64_t D : {1, 3, 16, 17, 65}) {
      const auto dy = values("dy", R * D);
      std::vector<double> want(size_t(D), 0.5);
      for (size_t i = 0; i < dy.size(); ++i) want[i % size_t(D)] += double(dy[i]);
      const auto got = bias(1, R, D, dy);
      EXPECT_TRUE(close(got, want, double(R + 2) * std::ldexp(1, -24), std::sqrt(double(R)) + 1)) << R << "x" << D;
      EXPECT_EQ(got, bias(2, R, D, dy));
      EXPECT_EQ(got, bias(3, R, D, dy));
    }
}

TEST(EmbeddingBackward, AddsEveryTokenInOrder) {
  const int64_t T = 500, V = 7;
  for (int64_t D : {1, 3, 16, 63, 64, 65, 200}) {
    const auto dy = values("dy", T * D), before = values("table", V * D);
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < T; ++t) ids.push_back(int32_t(t * t % (V - 1)));
    std::vector<float> want = before;  // the same order in f32: the same bits
    for (int64_t t = 0; t < T; ++t)
      for (int64_t d = 0; d < D; ++d) want[size_t(ids[size_t(t)] * D + d)] += dy[size_t(t * D + d)];
    for (int threads : {1, 2, 3}) {
      CpuContext ctx(threads, Precision::exact, 1);
      const Buffer in(ctx, dy);
      Buffer table(ctx, before);
      const EmbeddingBackward a{
          .ids = view(std::as_const(ids).data(), {T}), .dy = in.view({T, D}), .dtable = table.view({V, D})};
      embedding_backward(ctx, a);
      EXPECT_EQ(table.fetch(), want);
      EXPECT_TRUE(table.guards_intact());
    }
  }
}

TEST(EmbeddingBackward, RefusesForeignIds) {
  CpuContext ctx(1);
  std::vector<float> m(6), table(6);
  for (int32_t id : {-1, 2}) {
    const std::vector<int32_t> ids{0, id};
    EXPECT_THROW(
        embedding_backward(
            ctx, {.ids = view(ids.data(), {2}), .dy = view(m.data(), {2, 3}), .dtable = view(table.data(), {2, 3})}),
        Error);
  }
}

TEST(RopeBackward, IsTheTranspose) {
  for (int64_t half : {1, 3, 16, 65}) {
    const std::vector<int32_t> position{0, 1, 63, 65535};
    const int64_t H = 3, T = int64_t(position.size()), n = T * H * 2 * half;
    std::vector<float> f;
    for (int64_t i = 0; i < half; ++i) f.push_back(float(std::pow(10000.0, -double(i) / double(half))));
    const auto dy = values("dy", n);
    const auto want = ref::gradient([&](const auto& z) { return ref::rope(z, position, f, size_t(H), 1.25); },
                                    wide(values("x", n)), wide(dy));
    CpuContext ctx(2, Precision::exact, 1);
    Buffer x(ctx, dy);
    rope_backward(ctx, {.x = x.view({T, H, 2 * half}),
                        .position = view(position.data(), {T}),
                        .inv_freq = view(std::as_const(f).data(), {half}),
                        .factor = 1.25f});
    EXPECT_TRUE(close(x.fetch(), want, 4 * 6e-8, 2.5)) << half;
    EXPECT_TRUE(x.guards_intact());
  }
}

TEST(PointwiseBackward, ComparisonCanFail) {
  const auto x = values("x", 20, 2), dy = values("dy", 20);
  auto want = slope([](const auto& z) { return ref::relu2(z); }, x, dy);
  const auto same = want;
  want[3] += 1e-5;
  EXPECT_TRUE(close(same, same, 1e-7, 4));
  EXPECT_FALSE(close(same, want, 1e-7, 4));
}

TEST(PointwiseBackward, RefusesWrongShapes) {
  CpuContext ctx(1);
  std::vector<float> m(8);
  const View two = view(m.data(), {2, 4}), four = view(m.data(), {4, 2}), line = view(m.data(), {4});
  EXPECT_THROW(relu2_backward(ctx, {.x = two, .dy = two, .dx = four}), Error);
  EXPECT_THROW(relu2_backward(ctx, {.x = line, .dy = line, .dx = line}), Error);
  EXPECT_THROW(swiglu_backward(ctx, {.gate = two, .up = four, .dy = two, .dgate = two, .dup = two}), Error);
  EXPECT_THROW(add_bias_backward(ctx, {.dy = four, .dbias = line}), Error);
  ctx.workspace = {};
  EXPECT_THROW(add_bias_backward(ctx, {.dy = two, .dbias = line}), Error);
}

}  // namespace
}  // namespace kda::test
