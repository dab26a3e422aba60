// conv_silu on CUDA against the reference in double: inputs and windows in bf16, results rounded to bf16.
#include "kernels/conv.h"

#include "tests/cuda.h"
#include "tests/kernels/kda_problem.h"

namespace kda::test {
namespace {

struct Problem {
  int64_t C, channels, channel, slots;
  Pack pack;
  std::vector<StateMark> marks;
  std::vector<float> x, w, window;

  Problem(const std::string& name, const std::vector<int64_t>& lengths, int64_t C_, int64_t channels_, int64_t channel_,
          int64_t slots_)
      : C(C_), channels(channels_), channel(channel_), slots(slots_), pack(lengths) {
    x = rounded(values(name + "/x", pack.T() * C, 3));
    w = values(name + "/w", C * 4);
    window = rounded(values(name + "/window", slots * 3 * channels, 3));
  }
};

using Answer = std::pair<std::vector<float>, std::vector<float>>;  // y, window

Answer run(Context& ctx, const Problem& p) {
  const int64_t T = p.pack.T();
  TypedBuffer x(ctx, Dtype::bf16, p.x), w(ctx, Dtype::f32, p.w), window(ctx, Dtype::bf16, p.window),
      y(ctx, Dtype::bf16, T * p.C);
  const DeviceArray<int32_t> start(ctx, p.pack.start), in(ctx, p.pack.in), out(ctx, p.pack.out);
  const DeviceArray<StateMark> marks(ctx, p.marks);
  conv_silu(ctx, {.x = x.view({T, p.C}),
                  .w = w.view({p.C, 4}),
                  .window = window.view({p.slots, 3, p.channels}),
                  .channel = p.channel,
                  .slots = {in.data(), out.data()},
                  .packing = {p.pack.start, start.data()},
                  .y = y.view({T, p.C}),
                  .marks = {p.marks, marks.data()}});
  EXPECT_TRUE(y.guards_intact() && window.guards_intact());
  return {y.fetch(), window.fetch()};
}

std::pair<Doubles, Doubles> reference_conv(const Problem& p) {
  Doubles y, window = doubles(p.window);
  const auto keep = [&](int64_t slot, const Doubles& w) {
    for (int64_t j = 0; slot >= 0 && j < 3; ++j)
      for (int64_t c = 0; c < p.C; ++c)
        window[size_t((slot * 3 + j) * p.channels + p.channel + c)] = w[size_t(j * p.C + c)];
  };
  for (int64_t n = 0; n < p.pack.N(); ++n) {
    const int64_t a = p.pack.start[size_t(n)], T = p.pack.start[size_t(n) + 1] - a, in = p.pack.in[size_t(n)];
    Doubles before(size_t(3 * p.C));
    for (int64_t j = 0; in >= 0 && j < 3; ++j)
      for (int64_t c = 0; c < p.C; ++c)
        before[size_t(j * p.C + c)] = double(p.window[size_t((in * 3 + j) * p.channels + p.channel + c)]);
    const Doubles x(p.x.begin() + a * p.C, p.x.begin() + (a + T) * p.C);
    const auto r = ref::conv_silu(x, doubles(p.w), before, T, p.C);
    y.insert(y.end(), r.y.begin(), r.y.end());
    keep(p.pack.out[size_t(n)], r.window);
    for (const StateMark& m : p.marks)
      if (m.sequence == n)
        keep(m.slot,
             ref::conv_silu({x.begin(), x.begin() + m.tokens * p.C}, doubles(p.w), before, m.tokens, p.C).window);
  }
  return {y, window};
}

// One rounding of the result to bf16, and fp32 roundings of four terms of size 3.
void expect_reference(const Problem& p, const Answer& got, const std::string& what) {
  const auto want = reference_conv(p);
  ASSERT_EQ(got.first.size(), want.first.size());
  for (size_t i = 0; i < got.first.size(); ++i)
    ASSERT_LE(std::abs(double(got.first[i]) - want.first[i]), kBf16Epsilon * 1.001 * std::abs(want.first[i]) + 1e-5)
        << what << ", element " << i;
  EXPECT_TRUE(close(got.second, want.second, 0, 1)) << what;  // copies
}

TEST(CudaConv, FollowsTheReferenceAtEveryLengthAndWidth) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t T : {0, 1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200})
    for (const int64_t C : {1, 8, 16, 20, 129, 1032}) {
      const std::string what = cat("T", T, " C", C);
      const int64_t extra = C % 8 == 0 ? 8 : 7;
      const Problem p(what, {T}, C, C + 2 * extra, extra, 1);
      expect_reference(p, run(ctx, p), what);
    }
}

TEST(CudaConv, TakesRaggedPacksAndAnySlots) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t C : {20, 24}) {
    Problem p(cat("ragged", C), {17, 0, 1, 40, 0, 2, 3, 0, 0, 1, 1, 33, 0}, C, 72, 24, 14);
    p.pack.in = {3, -1, -1, 0, 5, 8, 7, 9, -1, 10, 11, -1, 12};
    p.pack.out = {3, 1, 2, 4, 6, -1, 7, 9, 0, 10, 11, 13, -1};
    p.pack.in[3] = -1;
    expect_reference(p, run(ctx, p), cat("ragged ", C));
    for (auto& s : p.pack.in) s = -1;
    for (auto& s : p.pack.out) s = -1;
    expect_reference(p, run(ctx, p), "nothing in or out");
  }
  const Problem nothing("nothing", {0, 0, 0}, 16, 16, 0, 3);
  expect_reference(nothing, run(ctx, nothing), "only empty sequences");
}

TEST(CudaConv, LeavesWindowsAtMarks) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t C : {16, 20}) {
    Problem p(cat("marks", C), {130, 0, 65, 257}, C, C, 0, 9);
    p.marks = {{0, 64, 5}, {0, 128, 6}, {2, 64, 7}, {3, 256, 8}};
    expect_reference(p, run(ctx, p), cat("marks ", C));
  }
}

TEST(CudaConv, AnySplitIsTheSameBitForBit) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t T = 100, C = 40;
  const Problem whole("split", {T}, C, C, 0, 1);
  const auto want = run(ctx, whole);
  for (const int64_t block : {1, 2, 3, 16, 17, 32, 33, 64}) {
    Problem part = whole;
    std::vector<float> y;
    for (int64_t from = 0; from < T; from += block) {
      const int64_t to = std::min<int64_t>(T, from + block);
      part.pack = Pack({to - from});
      part.x.assign(whole.x.begin() + from * C, whole.x.begin() + to * C);
      const auto got = run(ctx, part);
      part.window = got.second;
      y.insert(y.end(), got.first.begin(), got.first.end());
    }
    EXPECT_EQ(y, want.first) << block;
    EXPECT_EQ(part.window, want.second) << block;
  }
}

TEST(CudaConv, SurvivesHugeInputs) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  Problem p("huge", {5}, 24, 24, 0, 1);
  for (size_t i = 0; i < p.x.size(); ++i) p.x[i] *= i % 2 ? 1e3f : 1e30f;
  p.x = rounded(p.x);
  for (float y : run(ctx, p).first) EXPECT_TRUE(std::isfinite(y));
}

TEST(CudaConv, SabotageIsNoticed) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  Problem p("sabotage", {9}, 24, 24, 0, 1);
  const auto want = reference_conv(p);
  for (int64_t c = 0; c < 24; ++c) std::reverse(p.w.begin() + 4 * c, p.w.begin() + 4 * c + 4);  // taps the wrong way
  EXPECT_GT(relative_l2(run(ctx, p).first, want.first), 0.05);
}

}  // namespace
}  // namespace kda::test
