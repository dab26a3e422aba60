// Attention on a GPU against the plain double reference, on inputs rounded to bf16. Skipped where there is none.
#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "tests/cuda.h"
#include "tests/ref/attention.h"

namespace kda::test {
namespace {

// |v| < 1 and weights sum to 1: each weight is rounded to bf16 (2^-9 of it), their sum is of the rounded ones (the same
// again), and so is the result.
constexpr double kTolerance = 3.0 / 512;

struct Sizes {
  int64_t H, G, d;
};

struct Sequence {
  Sizes s;
  int64_t L;
  std::vector<float> q, k, v;
  Sequence(const std::string& name, Sizes sizes, int64_t length, float size = 1) : s(sizes), L(length) {
    q = rounded(values(name + " q", L * s.H * s.d, size));
    k = rounded(values(name + " k", L * s.G * s.d, size));
    v = rounded(values(name + " v", L * s.G * s.d));
  }
  std::vector<double> want() const {
    return ref::attention(wide(q), wide(k), wide(v), size_t(s.H), size_t(s.G), size_t(s.d));
  }
};

class Runner {
 public:
  Runner(Sizes s, int64_t slots, int64_t capacity, int64_t places = 16)
      : ctx_(attention_bytes(s, capacity, places)),
        s_(s),
        cache_{slots, capacity, s.G, s.d},
        k_(ctx_, Dtype::bf16, cache_.size()),
        v_(ctx_, Dtype::bf16, cache_.size()) {}

  struct Part {
    const Sequence* from;
    int64_t begin, end;
    int32_t slot;
  };

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
    TypedBuffer bq(ctx_, Dtype::bf16, q), bk(ctx_, Dtype::bf16, k), bv(ctx_, Dtype::bf16, v),
        o(ctx_, Dtype::bf16, T * s_.H * s_.d);
    const DeviceArray<int32_t> d_start(ctx_, start), d_slot(ctx_, slot), d_past(ctx_, past);
    attention(ctx_, {.q = bq.view({T, s_.H, s_.d}),
                     .k = bk.view({T, s_.G, s_.d}),
                     .v = bv.view({T, s_.G, s_.d}),
                     .k_cache = k_.view(cache_),
                     .v_cache = v_.view(cache_),
                     .slot = d_slot.data(),
                     .past = d_past.data(),
                     .packing = {.host_start = start, .start = d_start.data()},
                     .o = o.view({T, s_.H, s_.d})});
    EXPECT_TRUE(o.guards_intact() && k_.guards_intact() && v_.guards_intact());
    return o.fetch();
  }

  // The whole of a sequence, `block` tokens at a time.
  std::vector<float> blocks(const Sequence& x, int64_t block, int32_t slot = 0) {
    std::vector<float> got;
    for (int64_t b = 0; b < x.L; b += block) {
      const auto part = step({{&x, b, std::min(x.L, b + block), slot}});
      got.insert(got.end(), part.begin(), part.end());
    }
    return got;
  }

 private:
  static size_t attention_bytes(Sizes s, int64_t capacity, int64_t places) {
    return attention_workspace_bytes(CudaContext(0), places, s.H, s.d, capacity);
  }
  CudaContext ctx_;
  Sizes s_;
  Shape cache_;
  TypedBuffer k_, v_;  // NaN at first: a key read before it is written shows
};

std::vector<float> whole(const Sequence& s) { return Runner(s.s, 1, s.L).step({{&s, 0, s.L, 0}}); }

std::vector<float> rows(const std::vector<float>& x, int64_t from, int64_t to, const Sizes& s) {
  return {x.begin() + from * s.H * s.d, x.begin() + to * s.H * s.d};
}

TEST(CudaAttention, EqualsReferenceAtSizesAroundEachBlock) {
  KDA_NEEDS_CUDA();
  for (Sizes s : {Sizes{20, 4, 128},
                  {4, 2, 64},
                  {17, 1, 64},
                  {1, 1, 128},
                  {4, 2, 16},
                  {3, 3, 20},
                  {6, 2, 7},
                  {2, 1, 1},
                  {2, 1, 96}})
    for (int64_t L : {1, 2, 3, 17, 63, 64, 65, 130}) {
      const Sequence x("a", s, L, 2);
      EXPECT_TRUE(close(whole(x), x.want(), kTolerance, 1))
          << "H " << s.H << " G " << s.G << " d " << s.d << " L " << L;
    }
}

TEST(CudaAttention, ComparisonCanFail) {
  KDA_NEEDS_CUDA();
  const Sequence x("a", {4, 2, 64}, 20);
  auto got = whole(x);
  ASSERT_TRUE(close(got, x.want(), kTolerance, 1));
  got[100] += 0.02f;
  EXPECT_FALSE(close(got, x.want(), kTolerance, 1));
}

TEST(CudaAttention, LargeScoresDoNotOverflow) {
  KDA_NEEDS_CUDA();
  const Sequence x("large", {2, 1, 64}, 150, 40);
  // Scores reach 13,000: each carries as much times 2^-23 of rounding into its exponential.
  EXPECT_TRUE(close(whole(x), x.want(), kTolerance + 4e-3, 1));
}

TEST(CudaAttention, ATokenAfterAPromptEqualsReference) {
  KDA_NEEDS_CUDA();
  for (Sizes s : {Sizes{20, 4, 128}, {17, 1, 64}, {4, 2, 32}})
    for (int64_t past : {1, 63, 64, 65, 511, 512, 513, 1100}) {
      const Sequence x("p", s, past + 1);
      Runner r(s, 2, past + 1);
      r.step({{&x, 0, past, 1}});
      const auto want = x.want();
      EXPECT_TRUE(close(r.step({{&x, past, past + 1, 1}}), std::vector<double>(want.end() - s.H * s.d, want.end()),
                        kTolerance, 1))
          << "H " << s.H << " d " << s.d << " past " << past;
    }
}

TEST(CudaAttention, AnySplitOfAPromptGivesTheSameBits) {
  KDA_NEEDS_CUDA();
  for (Sizes s : {Sizes{5, 1, 128}, {4, 2, 64}, {2, 1, 24}}) {
    const Sequence x("split", s, s.d == 24 ? 90 : 600);
    const auto want = whole(x);
    for (int64_t step : {1, 3, 17, 64, 100, 333}) {
      if (step < 64 && x.L > 100) {  // one token at a time from before the first split's end on
        Runner r(s, 1, x.L);
        auto got = r.step({{&x, 0, 505, 0}});
        for (int64_t b = 505; b < 530; b += step) {
          const auto part = r.step({{&x, b, b + step, 0}});
          got.insert(got.end(), part.begin(), part.end());
        }
        EXPECT_EQ(got, rows(want, 0, int64_t(got.size()) / (s.H * s.d), s)) << "d " << s.d << " blocks of " << step;
      } else {
        EXPECT_EQ(Runner(s, 1, x.L).blocks(x, step), want) << "d " << s.d << " blocks of " << step;
      }
    }
  }
}

TEST(CudaAttention, PackedEqualsAlone) {
  KDA_NEEDS_CUDA();
  for (Sizes s : {Sizes{6, 2, 64}, {6, 2, 24}}) {
    const Sequence a("pa", s, 70), b("pb", s, 1), c("pc", s, 33);
    Runner r(s, 5, 100);
    const auto first = r.step({{&a, 0, 60, 4}, {&b, 0, 0, 3}, {&b, 0, 1, 0}, {&c, 0, 30, 2}});
    const auto single = r.step({{&a, 60, 61, 4}, {&b, 0, 1, -1}, {&c, 30, 31, 2}});
    const auto second = r.step({{&a, 61, 63, 4}, {&b, 0, 1, -1}, {&c, 31, 33, 2}});
    const auto wa = whole(a), wb = whole(b), wc = whole(c);
    EXPECT_EQ(rows(first, 0, 60, s), rows(wa, 0, 60, s));
    EXPECT_EQ(rows(first, 60, 61, s), wb);
    EXPECT_EQ(rows(first, 61, 91, s), rows(wc, 0, 30, s));
    EXPECT_EQ(rows(single, 0, 1, s), rows(wa, 60, 61, s));
    EXPECT_EQ(rows(single, 2, 3, s), rows(wc, 30, 31, s));
    EXPECT_EQ(rows(second, 0, 2, s), rows(wa, 61, 63, s));
    EXPECT_EQ(rows(second, 3, 5, s), rows(wc, 31, 33, s));
    for (const auto& unused : {rows(single, 1, 2, s), rows(second, 2, 3, s)})
      EXPECT_TRUE(std::all_of(unused.begin(), unused.end(), [](float x) { return std::isfinite(x); }));
  }
}

// Many places of a long cache would want too much scratch: their splits are then walked one after another.
TEST(CudaAttention, SplitsBesideEachOtherAndInTurnGiveTheSameBits) {
  KDA_NEEDS_CUDA();
  const Sizes s{64, 1, 64};
  const Sequence x("turns", s, 1300);
  const int64_t capacity = 65536, past = 1299;
  Runner few(s, 2, capacity), many(s, 2, capacity, 40);
  few.step({{&x, 0, past, 1}});
  many.step({{&x, 0, past, 1}});
  std::vector<Runner::Part> parts(40, Runner::Part{&x, 0, 1, -1});
  parts[7] = {&x, past, past + 1, 1};
  const auto beside = few.step({parts[7]}), in_turn = many.step(parts);
  EXPECT_EQ(beside, rows(in_turn, 7, 8, s));
}

TEST(CudaAttention, ARecordedStepFollowsItsArrays) {
  KDA_NEEDS_CUDA();
  const Sizes s{4, 2, 64};
  const Sequence x("recorded", s, 4);
  const auto want = whole(x);
  CudaContext ctx;
  const Shape cache{1, 8, s.G, s.d}, one{1, s.H, s.d}, kv{1, s.G, s.d};
  TypedBuffer kc(ctx, Dtype::bf16, cache.size()), vc(ctx, Dtype::bf16, cache.size()), q(ctx, Dtype::bf16, one.size()),
      k(ctx, Dtype::bf16, kv.size()), v(ctx, Dtype::bf16, kv.size()), o(ctx, Dtype::bf16, one.size());
  DeviceArray<int32_t> start(ctx, {0, 1}), slot(ctx, {0}), past(ctx, {0});
  const std::vector<int32_t> host_start{0, 1};
  const auto step = [&] {
    attention(ctx, {.q = q.view(one),
                    .k = k.view(kv),
                    .v = v.view(kv),
                    .k_cache = kc.view(cache),
                    .v_cache = vc.view(cache),
                    .slot = slot.data(),
                    .past = past.data(),
                    .packing = {.host_start = host_start, .start = start.data()},
                    .o = o.view(one)});
  };
  step();
  const auto recorded = ctx.backend->record(ctx, step);
  ASSERT_TRUE(recorded);
  const auto put = [&](const TypedBuffer& to, const std::vector<float>& from, int32_t t, Shape shape) {
    std::vector<bf16> row;
    for (int64_t i = 0; i < shape.size(); ++i) row.emplace_back(from[size_t(t * shape.size() + i)]);
    ctx.backend->copy(ctx, to.view(shape).data, row.data(), row.size() * sizeof(bf16));
  };
  for (int32_t t = 0; t < 4; ++t) {
    put(q, x.q, t, one), put(k, x.k, t, kv), put(v, x.v, t, kv);
    ctx.backend->copy(ctx, past.data(), &t, sizeof t);
    recorded->run(ctx);
    EXPECT_EQ(o.fetch(), rows(want, t, t + 1, s)) << t;
  }
}

TEST(CudaAttention, RefusesWhatDoesNotFit) {
  KDA_NEEDS_CUDA();
  const Sequence x("r", {4, 2, 16}, 20);
  Runner r(x.s, 2, 16);
  EXPECT_THROW(r.step({{&x, 0, 17, 0}}), Error);
  EXPECT_NO_THROW(r.step({{&x, 0, 16, 0}}));
  EXPECT_NO_THROW(r.step({}));
  const Sequence broad("broad", {1, 1, 1040}, 1);
  EXPECT_THROW(whole(broad), Error);
}

}  // namespace
}  // namespace kda::test
