#include "kernels/attention.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/ref/attention.h"

namespace kda::test {
namespace {

struct Sizes {
  int64_t H, G, d;
};

// One sequence's inputs, [L,H,d] and [L,G,d].
struct Sequence {
  Sizes s;
  int64_t L;
  std::vector<float> q, k, v;
  Sequence(const std::string& name, Sizes sizes, int64_t length, float size = 1) : s(sizes), L(length) {
    q = values(name + " q", L * s.H * s.d, size);
    k = values(name + " k", L * s.G * s.d, size);
    v = values(name + " v", L * s.G * s.d);
  }
  std::vector<double> want() const {
    const auto wide = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
    return ref::attention(wide(q), wide(k), wide(v), size_t(s.H), size_t(s.G), size_t(s.d));
  }
};

// A cache and the context that fills it step by step.
class Runner {
 public:
  Runner(int threads, Sizes s, int64_t slots, int64_t capacity)
      : ctx_(threads, Precision::exact, 64),
        s_(s),
        slots_(slots),
        capacity_(capacity),
        k_(ctx_, slots * capacity * s.G * s.d),
        v_(ctx_, slots * capacity * s.G * s.d) {
    const size_t bytes = attention_workspace_bytes(ctx_, capacity, s.H, s.d, capacity);
    ctx_.workspace = host_tensor(Dtype::u8, {int64_t(bytes)});
  }

  struct Part {
    const Sequence* from;
    int64_t begin, end;  // the tokens of this step
    int32_t slot;
  };

  // One call for several sequences; the outputs one after another.
  std::vector<float> step(const std::vector<Part>& parts) {
    std::vector<int32_t> start{0}, slot, past;
    std::vector<float> q, k, v;
    const auto take = [](std::vector<float>& to, const std::vector<float>& x, int64_t row, int64_t b, int64_t e) {
      to.insert(to.end(), x.begin() + b * row, x.begin() + e * row);
    };
    for (const Part& p : parts) {
      start.push_back(start.back() + int32_t(p.end - p.begin));
      slot.push_back(p.slot);
      past.push_back(int32_t(p.begin));
      take(q, p.from->q, s_.H * s_.d, p.begin, p.end);
      take(k, p.from->k, s_.G * s_.d, p.begin, p.end);
      take(v, p.from->v, s_.G * s_.d, p.begin, p.end);
    }
    const int64_t T = start.back();
    Buffer bq(ctx_, q), bk(ctx_, k), bv(ctx_, v), o(ctx_, T * s_.H * s_.d);
    const Shape cache{slots_, capacity_, s_.G, s_.d};
    attention(ctx_, {.q = bq.view({T, s_.H, s_.d}),
                     .k = bk.view({T, s_.G, s_.d}),
                     .v = bv.view({T, s_.G, s_.d}),
                     .k_cache = k_.view(cache),
                     .v_cache = v_.view(cache),
                     .slot = slot.data(),
                     .past = past.data(),
                     .packing = {.host_start = start, .start = start.data()},
                     .o = o.view({T, s_.H, s_.d})});
    EXPECT_TRUE(o.guards_intact() && k_.guards_intact() && v_.guards_intact());
    return o.fetch();
  }

 private:
  CpuContext ctx_;
  Sizes s_;
  int64_t slots_, capacity_;
  Buffer k_, v_;  // NaN at first: a key read before it is written shows
};

std::vector<float> whole(const Sequence& s, int threads = 1) {
  return Runner(threads, s.s, 1, s.L).step({{&s, 0, s.L, 0}});
}

TEST(Attention, EqualsReferenceAtSizesAroundEachBlock) {
  for (Sizes s : {Sizes{1, 1, 16}, {4, 2, 64}, {5, 1, 128}, {3, 3, 20}, {6, 2, 7}, {2, 1, 1}, {70, 1, 8}})
    for (int64_t L : {1, 2, 3, 15, 16, 17, 63, 64, 65, 130}) {
      const Sequence x("a", s, L, 2);
      // Weights sum to one and |v| < 1; a score of up to 4 sqrt(d) carries its own rounding into the exponent.
      EXPECT_TRUE(close(whole(x, 2), x.want(), 4e-7 * (4 + std::sqrt(double(s.d))), 1))
          << "H " << s.H << " G " << s.G << " d " << s.d << " L " << L;
    }
}

TEST(Attention, ComparisonCanFail) {
  const Sequence x("a", {2, 1, 16}, 20);
  auto got = whole(x);
  ASSERT_TRUE(close(got, x.want(), 3e-6, 1));
  got[100] += 1e-5f;
  EXPECT_FALSE(close(got, x.want(), 3e-6, 1));
}

TEST(Attention, LargeScoresDoNotOverflow) {
  const Sequence x("large", {2, 1, 32}, 150, 40);
  // Scores reach 9000: each carries 9000 * 2^-24 of rounding into its exponential.
  EXPECT_TRUE(close(whole(x, 2), x.want(), 5e-3, 1));
}

TEST(Attention, AnySplitOfAPromptGivesTheSameBits) {
  const Sequence x("split", {4, 2, 64}, 150);
  const auto want = whole(x);
  const int64_t row = x.s.H * x.s.d;
  for (int64_t step : {1, 2, 3, 15, 16, 17, 64, 100}) {
    Runner r(2, x.s, 1, x.L);
    std::vector<float> got;
    for (int64_t b = 0; b < x.L; b += step) {
      const auto part = r.step({{&x, b, std::min(x.L, b + step), 0}});
      got.insert(got.end(), part.begin(), part.end());
    }
    ASSERT_EQ(got.size(), size_t(x.L * row));
    EXPECT_EQ(got, want) << "blocks of " << step;
  }
}

TEST(Attention, PackedEqualsAloneForAnyThreads) {
  const Sizes s{6, 2, 24};
  const Sequence a("pa", s, 70), b("pb", s, 1), c("pc", s, 33);
  const auto part = [](const std::vector<float>& x, int64_t from, int64_t to) {
    return std::vector<float>(x.begin() + from, x.begin() + to);
  };
  const int64_t row = s.H * s.d;
  for (int threads : {1, 2, 3}) {
    Runner r(threads, s, 5, 100);
    // a: 60 tokens; an empty one; b; c: 30. Then one token of a, three of c.
    const auto first = r.step({{&a, 0, 60, 4}, {&b, 0, 0, 3}, {&b, 0, 1, 0}, {&c, 0, 30, 2}});
    const auto second = r.step({{&a, 60, 61, 4}, {&c, 30, 33, 2}});
    const auto wa = whole(a), wb = whole(b), wc = whole(c);
    EXPECT_EQ(part(first, 0, 60 * row), part(wa, 0, 60 * row));
    EXPECT_EQ(part(first, 60 * row, 61 * row), wb);
    EXPECT_EQ(part(first, 61 * row, 91 * row), part(wc, 0, 30 * row));
    EXPECT_EQ(part(second, 0, row), part(wa, 60 * row, 61 * row));
    EXPECT_EQ(part(second, row, 4 * row), part(wc, 30 * row, 33 * row));
  }
}

TEST(Attention, ANanTouchesLaterTokensOnly) {
  for (int which : {0, 1, 2}) {
    Sequence x("nan", {4, 2, 16}, 90);
    const auto clean = whole(x);
    const int64_t at = 37, G = x.s.G, H = x.s.H, d = x.s.d;
    std::vector<float>& m = which == 0 ? x.q : which == 1 ? x.k : x.v;
    m[size_t(at * (which == 0 ? H : G) * d)] = std::nanf("");
    const auto got = whole(x);
    EXPECT_TRUE(std::equal(got.begin(), got.begin() + at * H * d, clean.begin())) << which;
    EXPECT_TRUE(std::isnan(got[size_t(at * H * d)])) << which;
    if (which > 0) {
      EXPECT_TRUE(std::isnan(got[size_t((x.L - 1) * H * d)])) << which;
    }
  }
}

TEST(Attention, RefusesWhatDoesNotFit) {
  const Sequence x("r", {4, 2, 16}, 20);
  Runner r(1, x.s, 2, 16);
  EXPECT_THROW(r.step({{&x, 0, 17, 0}}), Error);
  EXPECT_NO_THROW(r.step({{&x, 0, 16, 0}}));
  EXPECT_THROW(r.step({{&x, 16, 17, 0}}), Error);
  EXPECT_THROW(r.step({{&x, 0, 1, 2}}), Error);
  EXPECT_THROW(r.step({{&x, 0, 1, -1}}), Error);
  EXPECT_NO_THROW(r.step({}));
  const Sequence odd("r", {4, 3, 16}, 2);
  Runner bad(1, odd.s, 1, 4);
  EXPECT_THROW(bad.step({{&odd, 0, 2, 0}}), Error);
}

}  // namespace
}  // namespace kda::test
