// Elementwise ops, norms, rotary positions and KDA's output norm on CUDA, against the references in double. Inputs are
// rounded to bf16 first; what remains is fp32 arithmetic and one rounding of the result to bf16 (2^-8 of it at most).
#include "kernels/kda.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"
#include "kernels/rope.h"
#include "tests/cuda.h"
#include "tests/ref/kda.h"
#include "tests/ref/norm.h"
#include "tests/ref/pointwise.h"
#include "tests/ref/rope.h"

namespace kda::test {
namespace {

constexpr int64_t kSizes[][2] = {{0, 5},  {1, 1},   {1, 7},    {2, 8},      {3, 17},   {5, 64},
                                 {7, 20}, {65, 33}, {17, 256}, {130, 2560}, {3, 18432}};

// |got - want| <= relative * |want| + absolute, element by element; a NaN fails.
testing::AssertionResult each_close(const std::vector<float>& got, const std::vector<double>& want, double relative,
                                    double absolute) {
  if (got.size() != want.size()) return testing::AssertionFailure() << got.size() << " values, want " << want.size();
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(double(got[i]) - want[i]) <= relative * std::abs(want[i]) + absolute))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << want[i];
  return testing::AssertionSuccess();
}
constexpr double kRounding = kBf16Epsilon * 1.001;

TEST(CudaPointwise, ComparisonCanFail) {
  EXPECT_TRUE(each_close({1.0f}, {1.001}, kRounding, 0));
  EXPECT_FALSE(each_close({1.0f}, {1.005}, kRounding, 0));
  EXPECT_FALSE(each_close({std::nanf("")}, {1.0}, 1, 1));
  EXPECT_FALSE(each_close({1.0f}, {}, 1, 1));
}

TEST(CudaPointwise, Relu2AndSwiglu) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [R, F] : kSizes)
    for (const float size : {1.0f, 100.0f}) {
      const auto x = rounded(values("x", R * F, size)), up = rounded(values("up", R * F, size));
      TypedBuffer gate(ctx, Dtype::bf16, x), other(ctx, Dtype::bf16, up), y(ctx, Dtype::bf16, R * F);
      relu2(ctx, {.x = gate.view({R, F}), .y = y.view({R, F})});
      EXPECT_TRUE(each_close(y.fetch(), ref::relu2(wide(x)), kRounding, 0)) << R << "x" << F;
      swiglu(ctx, {.gate = gate.view({R, F}), .up = other.view({R, F}), .y = y.view({R, F})});
      // exp's error grows with its argument: 100 of 2^-22 each at most.
      EXPECT_TRUE(each_close(y.fetch(), ref::swiglu(wide(x), wide(up)), kRounding + 1e-4, 1e-30)) << R << "x" << F;
      const auto separate = y.fetch();
      EXPECT_TRUE(y.guards_intact());
      swiglu(ctx, {.gate = gate.view({R, F}), .up = other.view({R, F}), .y = gate.view({R, F})});
      EXPECT_EQ(gate.fetch(), separate) << "in place";
      TypedBuffer in_place(ctx, Dtype::bf16, x);
      relu2(ctx, {.x = in_place.view({R, F}), .y = in_place.view({R, F})});
      EXPECT_TRUE(each_close(in_place.fetch(), ref::relu2(wide(x)), kRounding, 0)) << "in place";
      EXPECT_TRUE(in_place.guards_intact() && gate.guards_intact());
    }
}

TEST(CudaPointwise, ExtremesStayWhatTheyAre) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x{-inf, -3e38f, -0.0f, 0.0f, 1e-30f, 1e18f, inf, std::nanf("")};
  TypedBuffer in(ctx, Dtype::bf16, x), y(ctx, Dtype::bf16, 8);
  relu2(ctx, {.x = in.view({1, 8}), .y = y.view({1, 8})});
  const auto got = y.fetch();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(got[size_t(i)], 0.0f) << i;
  EXPECT_NEAR(got[5], 1e36, 1e34);
  EXPECT_EQ(got[6], inf);
  EXPECT_TRUE(std::isnan(got[7]));
}

TEST(CudaPointwise, AddRowsAndAddBias) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [R, D] : kSizes)
    for (const Dtype dx : {Dtype::bf16, Dtype::f32})
      for (const Dtype dy : {Dtype::bf16, Dtype::f32}) {
        if (dx == Dtype::f32 && dy == Dtype::bf16) continue;
        const auto cast = [](Dtype d, std::vector<float> v) { return d == Dtype::f32 ? v : rounded(std::move(v)); };
        const auto x = cast(dx, values("x", R * D)), before = cast(dy, values("y", R * D)), bias = values("bias", D);
        TypedBuffer from(ctx, dx, x), y(ctx, dy, before), z(ctx, dy, before), b(ctx, Dtype::f32, bias);
        add_rows(ctx, {.x = from.view({R, D}), .y = y.view({R, D})});
        add_bias(ctx, {.bias = b.view({D}), .y = z.view({R, D})});
        std::vector<double> sum = wide(before), biased = wide(before);
        for (size_t i = 0; i < sum.size(); ++i) {
          sum[i] += double(x[i]);
          biased[i] += double(bias[i % size_t(D)]);
        }
        const double tolerance = dy == Dtype::f32 ? 6e-8 : kRounding;
        EXPECT_TRUE(each_close(y.fetch(), sum, tolerance, 0)) << name_of(dx) << " into " << name_of(dy);
        EXPECT_TRUE(each_close(z.fetch(), biased, tolerance + 6e-8, 0)) << "bias into " << name_of(dy);
        EXPECT_TRUE(y.guards_intact() && z.guards_intact());
      }
}

TEST(CudaNorm, RmsNormAloneAndAfterASum) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t D : {1, 3, 4, 7, 20, 64, 127, 256, 260, 2048, 2560, 16384, 16388, 20000})
    for (const int64_t R : {0, 1, 3, 70})
      for (const float size : {1e-15f, 3.0f, 1e15f}) {
        const auto x = values("x", R * D, size), w = values("w", D), add = rounded(values("add", R * D, size));
        TypedBuffer in(ctx, Dtype::f32, x), weight(ctx, Dtype::f32, w), plus(ctx, Dtype::bf16, add),
            y(ctx, Dtype::bf16, R * D);
        // Sums of squares by fp32: D/256 roundings in a thread and ten more; half of their share in the root.
        const double tolerance = kRounding + (10 + double(D) / 256) * 6e-8;
        rms_norm(ctx, {.x = in.view({R, D}), .w = weight.view({D}), .y = y.view({R, D}), .eps = 1e-5f});
        EXPECT_TRUE(each_close(y.fetch(), ref::rms_norm(wide(x), wide(w), double(1e-5f)), tolerance, 1e-37))
            << R << "x" << D;
        EXPECT_EQ(in.fetch(), x);

        add_rms_norm(
            ctx,
            {.x = in.view({R, D}), .add = plus.view({R, D}), .w = weight.view({D}), .y = y.view({R, D}), .eps = 1e-5f});
        std::vector<double> sum = wide(x);
        std::vector<float> float_sum = x;
        for (size_t i = 0; i < sum.size(); ++i) {
          sum[i] += double(add[i]);
          float_sum[i] += add[i];
        }
        EXPECT_EQ(in.fetch(), float_sum) << R << "x" << D;
        EXPECT_TRUE(each_close(y.fetch(), ref::rms_norm(wide(float_sum), wide(w), double(1e-5f)), tolerance, 1e-37))
            << R << "x" << D;
        const auto separate = y.fetch();
        TypedBuffer again(ctx, Dtype::f32, x);
        add_rms_norm(ctx, {.x = again.view({R, D}),
                           .add = plus.view({R, D}),
                           .w = weight.view({D}),
                           .y = plus.view({R, D}),
                           .eps = 1e-5f});
        EXPECT_EQ(plus.fetch(), separate) << "in place";
        EXPECT_TRUE(in.guards_intact() && y.guards_intact() && plus.guards_intact());
      }
}

TEST(CudaNorm, ARowDependsOnNothingBesideIt) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t D = 2560, R = 37;
  const auto x = values("x", R * D), w = values("w", D);
  TypedBuffer in(ctx, Dtype::f32, x), weight(ctx, Dtype::f32, w), y(ctx, Dtype::bf16, R * D);
  rms_norm(ctx, {.x = in.view({R, D}), .w = weight.view({D}), .y = y.view({R, D}), .eps = 1e-5f});
  const auto whole = y.fetch();
  for (const int64_t r : {0, 17, 36}) {
    TypedBuffer one(ctx, Dtype::f32, {x.begin() + r * D, x.begin() + (r + 1) * D}), z(ctx, Dtype::bf16, D);
    rms_norm(ctx, {.x = one.view({1, D}), .w = weight.view({D}), .y = z.view({1, D}), .eps = 1e-5f});
    EXPECT_EQ(z.fetch(), std::vector<float>(whole.begin() + r * D, whole.begin() + (r + 1) * D));
  }
}

TEST(CudaRope, TurnsByTheAngleOfThePosition) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t d : {2, 6, 16, 64, 128, 256})
    for (const int64_t H : {1, 3, 20})
      for (const int64_t T : {0, 1, 2, 65}) {
        const int64_t half = d / 2;
        const auto x = rounded(values("x", T * H * d));
        std::vector<int32_t> position;
        for (int64_t t = 0; t < T; ++t)
          position.push_back(int32_t(t % 3 == 0 ? t : t % 3 == 1 ? 65536 + t : 1048575 - t));
        std::vector<float> inv_freq;
        for (int64_t i = 0; i < half; ++i) inv_freq.push_back(std::pow(10000.0f, -float(i) / float(half)));
        TypedBuffer in(ctx, Dtype::bf16, x), f(ctx, Dtype::f32, inv_freq);
        const DeviceArray<int32_t> at(ctx, position);
        rope(ctx, {.x = in.view({T, H, d}), .position = at.view(), .inv_freq = f.view({half}), .factor = 1.25f});
        // Two products of size 1.25 at most may cancel: their fp32 roundings, and the result's to bf16.
        EXPECT_TRUE(each_close(in.fetch(), ref::rope(wide(x), position, inv_freq, size_t(H), 1.25), kRounding, 1e-6))
            << T << " " << H << " " << d;
        EXPECT_TRUE(in.guards_intact());
      }
}

TEST(CudaKdaOutput, NormsAndGatesEachHead) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t V : {1, 8, 16, 20, 64, 96, 128, 256, 300})
    for (const int64_t H : {1, 3, 20})
      for (const int64_t T : {0, 1, 7, 8, 9, 33}) {
        const float size = V == 16 ? 1e12f : 1;
        const auto o = rounded(values("o", T * H * V, size)), g = rounded(values("g", T * H * V, 4));
        const auto bias = values("bias", H * V), w = values("w", V);
        TypedBuffer ob(ctx, Dtype::bf16, o), gb(ctx, Dtype::bf16, g), bb(ctx, Dtype::f32, bias), wb(ctx, Dtype::f32, w),
            y(ctx, Dtype::bf16, T * H * V);
        const Shape s{T, H, V};
        const auto call = [&](View to) {
          kda_output(
              ctx,
              {.o = ob.view(s), .g = gb.view(s), .g_bias = bb.view({H * V}), .w = wb.view({V}), .y = to, .eps = 1e-5f});
        };
        call(y.view(s));
        const auto want = ref::gated_norm(wide(o), wide(g), wide(bias), wide(w), double(1e-5f), H, V);
        EXPECT_TRUE(each_close(y.fetch(), want, kRounding + 1e-5, 1e-37)) << T << " " << H << " " << V;
        const auto separate = y.fetch();
        call(ob.view(s));
        EXPECT_EQ(ob.fetch(), separate) << "in place of o";
        TypedBuffer fresh(ctx, Dtype::bf16, o);
        kda_output(ctx, {.o = fresh.view(s),
                         .g = gb.view(s),
                         .g_bias = bb.view({H * V}),
                         .w = wb.view({V}),
                         .y = gb.view(s),
                         .eps = 1e-5f});
        EXPECT_EQ(gb.fetch(), separate) << "in place of g";
        EXPECT_TRUE(y.guards_intact() && ob.guards_intact() && gb.guards_intact());
      }
}

TEST(CudaPointwise, SabotageIsNoticed) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const auto x = rounded(values("x", 64));
  TypedBuffer in(ctx, Dtype::bf16, x), y(ctx, Dtype::bf16, 64);
  relu2(ctx, {.x = in.view({1, 64}), .y = y.view({1, 64})});
  auto want = ref::relu2(wide(x));
  EXPECT_TRUE(each_close(y.fetch(), want, kRounding, 0));
  for (double& v : want) v *= 1 + 2.1 * kBf16Epsilon;  // two units in the last place
  EXPECT_FALSE(each_close(y.fetch(), want, kRounding, 0));
}

}  // namespace
}  // namespace kda::test
