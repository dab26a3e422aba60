// Sampling on a GPU against the host's sampler: the same ids, except where a draw falls so near the border between two
// tokens that fp32 sums may put it on the other side. Skipped where there is no GPU.
#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kernels/sample.h"
#include "runtime/sampler.h"
#include "tests/cuda.h"

namespace kda::test {
namespace {

// A weight is exp of an fp32 difference of up to 100 (6e-6 of it), a border a sum of weights out of a total of 1.
constexpr double kBorder = 1e-5;

struct Wish {
  float temperature, top_p, min_p;
  int32_t top_k;
};

SamplingParams params_of(const SampleRow& r) {
  SamplingParams p;
  p.do_sample = true;
  p.temperature = double(r.temperature), p.top_p = double(r.top_p), p.min_p = double(r.min_p), p.top_k = r.top_k;
  p.seed = r.seed;
  return p;
}

// How far the draw lies from the stretch of [0,1) that belongs to `id`, under the host's distribution in double.
double from_draw(const SampleRow& r, std::span<const float> logits, int32_t id) {
  SamplerScratch scratch;
  const std::vector<int32_t> tokens(r.position);
  const auto p = probabilities(params_of(r), logits, tokens, 0, scratch);
  if (id < 0 || size_t(id) >= p.size()) return 1;
  const auto w = Philox::block(r.seed, {r.sequence, r.position, 0, 0});
  const double u = uniform53(w[0], w[1]);
  double low = 0;
  for (int32_t i = 0; i < id; ++i) low += p[size_t(i)];
  return std::max({low - u, u - low - p[size_t(id)], 0.0});
}

std::vector<int32_t> draw(Context& ctx, const std::vector<float>& logits, int64_t vocabulary,
                          const std::vector<SampleRow>& rows) {
  const int64_t R = int64_t(rows.size());
  TypedBuffer x(ctx, Dtype::f32, logits);
  const DeviceArray<SampleRow> d_rows(ctx, rows);
  const DeviceArray<int32_t> ids(ctx, std::vector<int32_t>(rows.size(), -77));
  sample(ctx, {.logits = x.view({R, vocabulary}), .rows = d_rows.data(), .ids = ids.data()});
  EXPECT_TRUE(x.guards_intact());
  return ids.fetch();
}

std::vector<float> normal(const std::string& name, int64_t n, float spread) {
  const auto a = values(name + " a", n), b = values(name + " b", n);
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = spread * std::sqrt(-2 * std::log(std::abs(a[i]) * 0.999f + 1e-6f)) * std::cos(3.14159265f * b[i]);
  return x;
}

const std::vector<Wish> kWishes{{0, 1, 0, 0},          {1, 1, 0, 0},       {1, .9f, 0, 0},     {.7f, .5f, 0, 0},
                                {1, .999f, 0, 0},      {1, 0, 0, 0},       {1, 1, 0, 50},      {1.3f, 1, 0, 1},
                                {1, 1, 0, 3000},       {.8f, .95f, 0, 40}, {1.5f, 1, .05f, 0}, {1e-3f, .9f, 0, 0},
                                {.9f, .95f, .02f, 100}};

std::vector<SampleRow> rows_of(const Wish& w, int64_t R) {
  std::vector<SampleRow> rows;
  for (int64_t r = 0; r < R; ++r)
    rows.push_back({w.temperature, w.top_p, w.min_p, w.top_k, 900 + uint64_t(r) * 0x100000001ull, uint32_t(r * 3),
                    uint32_t(r * 11)});
  return rows;
}

void expect_host_choices(Context& ctx, const std::vector<float>& logits, int64_t V, const std::vector<SampleRow>& rows,
                         const std::string& what) {
  const auto ids = draw(ctx, logits, V, rows);
  SamplerScratch scratch;
  for (size_t r = 0; r < rows.size(); ++r) {
    const std::span<const float> row(logits.data() + r * size_t(V), size_t(V));
    const std::vector<int32_t> tokens(rows[r].position);
    const int32_t want = sample(params_of(rows[r]), row, tokens, 0, rows[r].sequence, scratch).id;
    if (ids[r] != want) {
      EXPECT_LE(from_draw(rows[r], row, ids[r]), kBorder) << what << ", row " << r << ": " << ids[r] << " for " << want;
    }
  }
}

TEST(CudaSample, ChoosesWhatTheHostChooses) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (int64_t V : {1, 2, 33, 1000, 4097, 32000})
    for (float spread : {1.0f, 6.0f})
      for (const Wish& w : kWishes)
        expect_host_choices(
            ctx, normal("logits", 4 * V, spread), V, rows_of(w, 4),
            cat("V ", V, " spread ", spread, " t ", w.temperature, " top_p ", w.top_p, " top_k ", w.top_k));
}

TEST(CudaSample, EqualLogitsAndBannedOnes) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t V = 2500;
  for (const Wish& w : kWishes) {
    auto x = normal("ties", 3 * V, 2);
    for (float& v : x) v = std::round(v * 2) / 2;
    for (size_t i = 0; i < x.size(); i += 3) x[i] = -std::numeric_limits<float>::infinity();
    for (size_t i = 1; i < x.size(); i += 50) x[i] = -0.0f;
    expect_host_choices(ctx, x, V, rows_of(w, 3),
                        cat("ties: t ", w.temperature, " top_p ", w.top_p, " top_k ", w.top_k));
    expect_host_choices(ctx, std::vector<float>(size_t(3 * V), 1.5f), V, rows_of(w, 3),
                        cat("all equal: top_p ", w.top_p, " top_k ", w.top_k));
  }
}

TEST(CudaSample, ComparisonCanFail) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t V = 1000;
  const auto x = normal("sabotage", V, 1);
  const auto rows = rows_of({1, 1, 0, 0}, 1);
  const int32_t id = draw(ctx, x, V, rows)[0];
  EXPECT_LE(from_draw(rows[0], x, id), kBorder);
  EXPECT_GT(from_draw(rows[0], x, (id + 2) % int32_t(V)), kBorder);
}

TEST(CudaSample, ARowDependsOnNothingBesideIt) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t V = 5000, R = 40;
  const auto x = normal("beside", R * V, 3);
  std::vector<SampleRow> rows;
  for (int64_t r = 0; r < R; ++r) rows.push_back(rows_of(kWishes[size_t(r) % kWishes.size()], r + 1).back());
  const auto together = draw(ctx, x, V, rows);
  for (int64_t r : {0, 1, 2, 17, 39})
    EXPECT_EQ(draw(ctx, {x.begin() + r * V, x.begin() + (r + 1) * V}, V, {rows[size_t(r)]})[0], together[size_t(r)])
        << r;
}

TEST(CudaSample, SaysWhereNothingCanBeChosen) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t V = 700;
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> x(size_t(5 * V), 0.5f);
  x[7] = std::nanf("");
  x[size_t(V) + 5] = infinity;
  std::fill(x.begin() + 2 * V, x.begin() + 3 * V, -infinity);
  std::fill(x.begin() + 3 * V, x.begin() + 4 * V, 3e38f);  // beyond f32 once divided by the temperature
  x[size_t(4 * V) + 77] = 0.75f;
  EXPECT_EQ(draw(ctx, x, V, rows_of({0, 1, 0, 0}, 5)), (std::vector<int32_t>{-1, -1, -1, 0, 77}));
  EXPECT_EQ(draw(ctx, x, V, rows_of({1e-3f, .9f, 0, 0}, 5)), (std::vector<int32_t>{-1, -1, -1, -1, 77}));
}

TEST(CudaSample, DrawsFollowTheDistribution) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t V = 4, R = 4000;
  const std::vector<float> one{std::log(.1f), std::log(.2f), std::log(.3f), std::log(.4f)};
  std::vector<float> x;
  for (int64_t r = 0; r < R; ++r) x.insert(x.end(), one.begin(), one.end());
  std::vector<int64_t> count(4);
  for (int32_t id : draw(ctx, x, V, rows_of({1, 1, 0, 0}, R))) ++count.at(size_t(id));
  // Five standard deviations of a count.
  for (int i = 0; i < 4; ++i) {
    const double p = .1 * (i + 1);
    EXPECT_NEAR(double(count[size_t(i)]), p * R, 5 * std::sqrt(R * p * (1 - p))) << i;
  }
}

}  // namespace
}  // namespace kda::test
