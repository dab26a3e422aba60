#include "kernels/conv.h"

#include "tests/kernels/kda_problem.h"

using namespace kda;
using namespace kda::test;

namespace {

struct ConvProblem {
  int64_t C, channels, channel, slots;
  Pack pack;
  std::vector<float> x, w, window;
  std::vector<StateMark> marks;

  ConvProblem(const std::string& name, const std::vector<int64_t>& lengths, int64_t C_, int64_t channels_,
              int64_t channel_, int64_t slots_)
      : C(C_), channels(channels_), channel(channel_), slots(slots_), pack(lengths) {
    x = values(name + "/x", pack.T() * C, 3);
    w = values(name + "/w", C * 4);
    window = values(name + "/window", slots * 3 * channels, 3);
  }
};

std::pair<std::vector<float>, std::vector<float>> run(Context& ctx, const ConvProblem& p) {
  const int64_t T = p.pack.T();
  Buffer x(ctx, p.x), w(ctx, p.w), window(ctx, p.window), y(ctx, T * p.C);
  conv_silu(ctx, {.x = x.view({T, p.C}),
                  .w = w.view({p.C, 4}),
                  .window = window.view({p.slots, 3, p.channels}),
                  .channel = p.channel,
                  .slots = p.pack.slots(),
                  .packing = p.pack.packing(),
                  .y = y.view({T, p.C}),
                  .marks = {p.marks, p.marks.data()}});
  EXPECT_TRUE(y.guards_intact() && window.guards_intact());
  return {y.fetch(), window.fetch()};
}

std::pair<Doubles, Doubles> reference_conv(const ConvProblem& p) {
  Doubles y, window = doubles(p.window);
  for (int64_t n = 0; n < p.pack.N(); ++n) {
    const int64_t a = p.pack.start[size_t(n)], T = p.pack.start[size_t(n) + 1] - a;
    const int64_t in = p.pack.in[size_t(n)], out = p.pack.out[size_t(n)];
    Doubles before(size_t(3 * p.C));
    for (int64_t j = 0; in >= 0 && j < 3; ++j)
      for (int64_t c = 0; c < p.C; ++c)
        before[size_t(j * p.C + c)] = p.window[size_t((in * 3 + j) * p.channels + p.channel + c)];
    const Doubles x(p.x.begin() + a * p.C, p.x.begin() + (a + T) * p.C);
    const auto r = ref::conv_silu(x, doubles(p.w), before, T, p.C);
    y.insert(y.end(), r.y.begin(), r.y.end());
    const auto keep = [&](int64_t slot, const Doubles& last) {
      for (int64_t j = 0; slot >= 0 && j < 3; ++j)
        for (int64_t c = 0; c < p.C; ++c)
          window[size_t((slot * 3 + j) * p.channels + p.channel + c)] = last[size_t(j * p.C + c)];
    };
    keep(out, r.window);
    for (const StateMark& m : p.marks)  // as if the sequence ended there
      if (m.sequence == n)
        keep(
            m.slot,
            ref::conv_silu(Doubles(x.begin(), x.begin() + m.tokens * p.C), doubles(p.w), before, m.tokens, p.C).window);
  }
  return {y, window};
}

void expect_reference(const ConvProblem& p, const std::pair<std::vector<float>, std::vector<float>>& got,
                      const std::string& what) {
  const auto want = reference_conv(p);
  // Four products of size 3, silu's slope is at most 1.1; six roundings.
  EXPECT_TRUE(close(got.first, want.first, 6 * 1.2e-7, 12)) << what;
  EXPECT_TRUE(close(got.second, want.second, 0, 1)) << what;  // copies
}

TEST(Conv, FollowsTheReferenceAtEveryLengthAndWidth) {
  CpuContext ctx;
  for (const int64_t T : {0, 1, 2, 3, 4, 15, 16, 17, 33, 65})
    for (const int64_t C : {1, 16, 20, 129, 300}) {
      const std::string what = cat("conv/T", T, "_C", C);
      const ConvProblem p(what, {T}, C, C + 7, 5, 1);
      expect_reference(p, run(ctx, p), what);
    }
}

TEST(Conv, TakesRaggedPacksAndAnySlots) {
  const std::vector<int64_t> lengths{17, 0, 1, 40, 0, 2, 0};
  ConvProblem p("conv/ragged", lengths, 20, 60, 20, 9);
  p.pack.in = {3, -1, -1, 0, 5, 8, 7};
  p.pack.out = {3, 1, 2, 4, 6, -1, 7};
  CpuContext one(1), two(2), three(3);
  const auto got = run(two, p);
  expect_reference(p, got, "ragged");
  EXPECT_EQ(run(one, p), got);
  EXPECT_EQ(run(three, p), got);
}

TEST(Conv, KeepsTheWindowsThatAreMarked) {
  CpuContext one(1), two(2);
  for (const int64_t C : {1, 20, 129}) {
    ConvProblem p(cat("conv/marks", C), {130, 0, 65, 257}, C, C + 3, 2, 9);
    const auto plain = run(two, p);
    p.marks = {{0, 64, 5}, {0, 128, 6}, {2, 64, 7}, {3, 256, 8}};
    const auto got = run(two, p);
    expect_reference(p, got, cat("marks ", C));
    EXPECT_EQ(got.first, plain.first);
    EXPECT_NE(got.second, plain.second);
    EXPECT_EQ(run(one, p), got);
  }
}

TEST(Conv, AnySplitIsTheSameBitForBit) {
  CpuContext ctx;
  const ConvProblem whole("conv/split", {40}, 36, 36, 0, 1);
  const auto want = run(ctx, whole);
  for (const int64_t block : {1, 2, 3, 16, 17}) {
    ConvProblem part = whole;
    std::vector<float> y;
    for (int64_t from = 0; from < 40; from += block) {
      const int64_t to = std::min<int64_t>(40, from + block);
      part.pack = Pack({to - from});
      part.x.assign(whole.x.begin() + from * 36, whole.x.begin() + to * 36);
      const auto got = run(ctx, part);
      part.window = got.second;
      y.insert(y.end(), got.first.begin(), got.first.end());
    }
    EXPECT_EQ(y, want.first) << block;
    EXPECT_EQ(part.window, want.second) << block;
  }
}

TEST(Conv, SurvivesHugeInputsAndKeepsNaN) {
  CpuContext ctx;
  ConvProblem p("conv/huge", {5}, 20, 20, 0, 1);
  for (size_t i = 0; i < p.x.size(); ++i) p.x[i] *= i % 2 ? 1e3f : 1e30f;
  const auto got = run(ctx, p);
  for (float y : got.first) EXPECT_TRUE(std::isfinite(y));
  p.x[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(run(ctx, p).first[0]));
}

TEST(Conv, SabotageIsNoticed) {
  CpuContext ctx;
  ConvProblem p("conv/sabotage", {9}, 20, 20, 0, 1);
  auto got = run(ctx, p);
  const auto want = reference_conv(p);
  got.first[50] += 2e-5f;
  got.second[1] += 1e-6f;
  EXPECT_FALSE(close(got.first, want.first, 6 * 1.2e-7, 12));
  EXPECT_FALSE(close(got.second, want.second, 0, 1));
  for (int64_t c = 0; c < 20; ++c) std::reverse(p.w.begin() + 4 * c, p.w.begin() + 4 * c + 4);  // taps the wrong way
  EXPECT_FALSE(close(run(ctx, p).first, want.first, 6 * 1.2e-7, 12));
}

TEST(Conv, TheDoorRefuses) {
  CpuContext ctx;
  const ConvProblem p("conv/door", {4}, 8, 24, 8, 1);
  const auto refused = [&](auto change) {
    ConvProblem q = p;
    Buffer x(ctx, p.x), w(ctx, p.w), window(ctx, p.window), y(ctx, 4 * 8);
    Conv a{.x = x.view({4, 8}),
           .w = w.view({8, 4}),
           .window = window.view({1, 3, 24}),
           .channel = 8,
           .slots = q.pack.slots(),
           .packing = q.pack.packing(),
           .y = y.view({4, 8})};
    change(a, q.pack);
    try {
      conv_silu(ctx, a);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused([](auto&, auto&) {}), "accepted");
  EXPECT_EQ(refused([](auto& a, auto&) { a.w.shape = {8, 3}; }), "conv_silu: w must be [8,4], got [8,3]");
  EXPECT_EQ(refused([](auto& a, auto&) {
              a.window.shape = {1, 2, 36};
            }),
            "conv_silu: window must be [slots,3,channels], got [1,2,36]");
  EXPECT_EQ(refused([](auto& a, auto&) { a.channel = 20; }), "conv_silu: channels 20..28 of a window of 24");
  EXPECT_EQ(refused([](auto& a, auto&) { a.y.data = const_cast<void*>(a.x.data); }),
            "conv_silu: y may not be x's memory");
  EXPECT_EQ(refused([](auto& a, auto&) { a.x.dtype = Dtype::bf16; }), "conv_silu: x must be f32, got bf16");
  EXPECT_EQ(refused([](auto&, auto& k) { k.start[1] = 3; }),
            "conv_silu: the packing ends at token 3, the tensors have 4");
  EXPECT_EQ(refused([](auto&, auto& k) { k.in[0] = 1; }), "conv_silu: slots.in[0] = 1, the pool has 1");
}

}  // namespace
