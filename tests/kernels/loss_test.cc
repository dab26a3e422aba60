#include "kernels/loss.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/ref/loss.h"

namespace kda::test {
namespace {

constexpr LossKind kAll[] = {LossKind::cross_entropy, LossKind::kl,    LossKind::jsd,
                             LossKind::tvd,           LossKind::hinge, LossKind::logistic_ranking};
constexpr bool soft(LossKind k) { return k == LossKind::kl || k == LossKind::jsd || k == LossKind::tvd; }

struct Problem {
  int64_t R = 0, V = 0, k = 0;
  std::vector<float> x{}, t{};  // t empty: a sparse teacher, or none
  std::vector<int32_t> ids{}, labels{};
  std::vector<float> logprobs{};

  ref::Target target(int64_t r) const {
    ref::Target out;
    if (!t.empty()) out.logits.assign(t.begin() + r * V, t.begin() + (r + 1) * V);
    if (k) {
      out.ids.assign(ids.begin() + r * k, ids.begin() + (r + 1) * k);
      out.logprobs.assign(logprobs.begin() + r * k, logprobs.begin() + (r + 1) * k);
    }
    return out;
  }
  std::vector<double> row(int64_t r) const { return {x.begin() + r * V, x.begin() + (r + 1) * V}; }
};

// Every fifth row is masked, the third of them being the first. k > 0: the teacher's k likeliest ids.
Problem problem(int64_t R, int64_t V, int64_t k, float size = 4) {
  Problem p{.R = R, .V = V, .k = k, .x = values("x", R * V, size), .t = values("t", R * V, size)};
  for (int64_t r = 0; r < R; ++r) p.labels.push_back(r % 5 == 2 ? -1 : int32_t((r * 7 + 3) % V));
  if (!k) return p;
  for (int64_t r = 0; r < R; ++r) {
    std::vector<double> row(p.t.begin() + r * V, p.t.begin() + (r + 1) * V);
    row = ref::log_softmax(row);
    std::vector<int32_t> order(static_cast<size_t>(V));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[size_t(a)] > row[size_t(b)]; });
    for (int64_t j = 0; j < k; ++j) {
      p.ids.push_back(order[size_t(j)]);
      p.logprobs.push_back(float(row[size_t(order[size_t(j)])]));
    }
  }
  p.t.clear();
  return p;
}

struct Result {
  std::vector<float> value, gradient;
};

Result run(const Problem& p, const std::vector<LossTerm>& terms, int threads = 2) {
  CpuContext ctx(threads, Precision::exact, 0);
  ctx.workspace = host_tensor(Dtype::u8, {int64_t(logits_loss_workspace_bytes(ctx, p.R, p.V, p.k))});
  const int64_t n = int64_t(terms.size());
  Buffer x(ctx, p.x), t(ctx, p.t), l(ctx, p.logprobs), value(ctx, n * p.R);
  LogitsLoss a{.logits = x.view({p.R, p.V}),
               .teacher = {},
               .ids = {},
               .logprobs = {},
               .labels = view(p.labels.data(), {p.R}),
               .terms = terms,
               .value = value.view({n, p.R})};
  if (!p.t.empty()) a.teacher = t.view({p.R, p.V});
  if (p.k) {
    a.ids = view(p.ids.data(), {p.R, p.k});
    a.logprobs = l.view({p.R, p.k});
  }
  logits_loss(ctx, a);
  EXPECT_TRUE(x.guards_intact() && value.guards_intact());
  return {value.fetch(), x.fetch()};
}

// Value and gradient of every term together against the reference.
void expect_reference(const Problem& p, const std::vector<LossTerm>& terms, const std::string& what) {
  const Result got = run(p, terms);
  for (int64_t r = 0; r < p.R; ++r) {
    std::vector<double> want(static_cast<size_t>(p.V));
    double size = 0;  // of what is added up in a gradient: probabilities, times each term's factor
    for (size_t i = 0; i < terms.size(); ++i) {
      const float value = got.value[i * size_t(p.R) + size_t(r)];
      if (p.labels[size_t(r)] < 0) {
        EXPECT_EQ(value, 0.0f) << what;
        continue;
      }
      const ref::Target target = p.target(r);
      const double v = ref::row_loss(terms[i], p.row(r), target, p.labels[size_t(r)]);
      EXPECT_NEAR(value, v, 4e-6 * std::max(1.0, std::abs(v))) << what << " row " << r << " term " << i;
      const auto g = ref::row_gradient(terms[i], p.row(r), target, p.labels[size_t(r)]);
      size += 0.25 * std::abs(double(terms[i].scale)) * double(terms[i].temperature);
      for (size_t j = 0; j < g.size(); ++j) {
        want[j] += double(terms[i].scale) * g[j];
        size = std::max(size, std::abs(double(terms[i].scale) * g[j]));
      }
    }
    const std::vector<float> row(got.gradient.begin() + r * p.V, got.gradient.begin() + (r + 1) * p.V);
    EXPECT_TRUE(close(row, want, 2e-6, size)) << what << " row " << r;
  }
}

TEST(LogitsLoss, DenseEqualsReferenceAtSizesAroundEachVector) {
  for (int64_t V : {1, 2, 7, 15, 16, 17, 31, 33, 64, 100})
    for (LossKind kind : {LossKind::cross_entropy, LossKind::kl, LossKind::jsd, LossKind::tvd})
      for (float T : {1.0f, 2.0f, 0.7f})
        expect_reference(problem(7, V, 0), {{.kind = kind, .temperature = T, .scale = 0.3f}},
                         cat("kind ", int(kind), " V ", V, " T ", T));
}

TEST(LogitsLoss, SparseEqualsReference) {
  for (int64_t V : {5, 17, 64})
    for (int64_t k : {1, 3, 5})
      for (LossKind kind : kAll)
        for (float T : {1.0f, 2.0f})
          for (auto missing : {MissingProbability::zero, MissingProbability::symmetric_uniform}) {
            // With all ids stored nothing is left over, and what the reference has at the clamp is rounding.
            if (soft(kind) && k == V && missing == MissingProbability::symmetric_uniform) continue;
            expect_reference(problem(6, V, k),
                             {{.kind = kind, .temperature = T, .missing = missing, .margin = 0.1f, .scale = 0.7f}},
                             cat("kind ", int(kind), " V ", V, " k ", k, " T ", T, " missing ", int(missing)));
          }
}

TEST(LogitsLoss, SeveralTermsShareARow) {
  const std::vector<LossTerm> dense{{.kind = LossKind::cross_entropy, .scale = 0.2f},
                                    {.kind = LossKind::kl, .temperature = 2, .scale = 0.5f},
                                    {.kind = LossKind::kl, .scale = 0.1f},
                                    {.kind = LossKind::jsd, .temperature = 2, .scale = 0.4f},
                                    {.kind = LossKind::tvd, .scale = -0.3f}};
  expect_reference(problem(9, 45, 0), dense, "dense");
  std::vector<LossTerm> sparse = dense;
  sparse.push_back({.kind = LossKind::hinge, .margin = 0.05f, .scale = 0.02f});
  sparse.push_back({.kind = LossKind::logistic_ranking, .scale = 0.01f});
  sparse.push_back({.kind = LossKind::kl, .missing = MissingProbability::symmetric_uniform, .scale = 0.3f});
  expect_reference(problem(9, 45, 6), sparse, "sparse");
}

TEST(LogitsLoss, CrossEntropyNeedsNoTeacher) {
  Problem p = problem(6, 33, 0);
  p.t.clear();
  expect_reference(p, {{.kind = LossKind::cross_entropy, .scale = 0.5f}}, "alone");
}

// Half a probability of 1e-12 beside the k ids: 1 - sum would be rounding alone, in fp32 as in double.
TEST(LogitsLoss, WhatIsLeftOverKeepsItsDigits) {
  Problem p = problem(1, 20, 2);
  p.labels = {0};
  for (float& x : p.x) x = -28;
  p.x[size_t(p.ids[0])] = 1;
  p.x[size_t(p.ids[1])] = 0.5f;
  const Result got = run(p, {{.kind = LossKind::tvd}});
  const double S = std::exp(1.0) + std::exp(0.5), q = std::exp(-28.0) / (S + 18 * std::exp(-28.0));
  const auto g = ref::row_gradient({.kind = LossKind::tvd}, p.row(0), p.target(0), 0);
  const size_t other = p.ids[0] != 3 && p.ids[1] != 3 ? 3 : p.ids[0] != 4 && p.ids[1] != 4 ? 4 : 5;
  EXPECT_NEAR(got.gradient[other] / g[other], 1, 1e-5);
  EXPECT_GT(q, 0);
}

TEST(LogitsLoss, LargeVocabularyAndFarLogits) {
  const int64_t V = 128004;
  Problem p = problem(2, V, 0, 30);
  p.labels = {5, 77};
  for (LossKind kind : {LossKind::cross_entropy, LossKind::kl, LossKind::jsd, LossKind::tvd}) {
    const LossTerm term{.kind = kind};
    const Result got = run(p, {term});
    for (int64_t r = 0; r < 2; ++r) {
      const double want = ref::row_loss(term, p.row(r), p.target(r), p.labels[size_t(r)]);
      EXPECT_NEAR(got.value[size_t(r)], want, 3e-6 * std::abs(want) + 1e-7) << int(kind);
      double sum = 0;
      for (int64_t j = 0; j < V; ++j) sum += double(got.gradient[size_t(r * V + j)]);
      EXPECT_NEAR(sum, 0, 2e-6) << "a softmax's gradient sums to nothing, kind " << int(kind);
    }
  }
}

TEST(LogitsLoss, ATeacherMayRuleIdsOut) {
  Problem p = problem(3, 20, 0);
  p.labels = {1, 2, 3};
  for (int64_t r = 0; r < 3; ++r) p.t[size_t(r * 20 + 4)] = -std::numeric_limits<float>::infinity();
  for (LossKind kind : {LossKind::kl, LossKind::jsd, LossKind::tvd}) {
    const Result got = run(p, {{.kind = kind}});
    Problem finite = p;
    for (int64_t r = 0; r < 3; ++r) finite.t[size_t(r * 20 + 4)] = -200;
    const Result want = run(finite, {{.kind = kind}});
    EXPECT_TRUE(close(got.value, want.value, 1e-6, 1.0));
    EXPECT_TRUE(close(got.gradient, want.gradient, 1e-6, 1.0));
  }
}

TEST(LogitsLoss, NaNShows) {
  for (int64_t k : {0, 4}) {
    Problem p = problem(2, 33, k);
    p.labels = {1, 2};
    p.x[5] = std::numeric_limits<float>::quiet_NaN();
    const Result got = run(p, {{.kind = LossKind::kl}, {.kind = LossKind::cross_entropy}});
    EXPECT_TRUE(std::isnan(got.value[0]) && std::isnan(got.value[2])) << k;
    EXPECT_FALSE(std::isnan(got.value[1]) || std::isnan(got.value[3])) << k;
  }
}

TEST(LogitsLoss, ARowIsTheSameAloneAndAnyThreads) {
  const std::vector<LossTerm> terms{{.kind = LossKind::cross_entropy, .scale = 0.2f},
                                    {.kind = LossKind::kl, .temperature = 2, .scale = 0.5f},
                                    {.kind = LossKind::jsd, .scale = 0.1f}};
  for (int64_t k : {0, 8}) {
    const Problem p = problem(41, 515, k);
    const Result all = run(p, terms, 1);
    for (int threads : {2, 3}) {
      const Result again = run(p, terms, threads);
      EXPECT_EQ(again.value, all.value);
      EXPECT_EQ(again.gradient, all.gradient);
    }
  }
}

TEST(LogitsLoss, Refuses) {
  CpuContext ctx(1);
  std::vector<float> m(64), v(8);
  std::vector<int32_t> labels(2, 1), ids(4, 0);
  const LossTerm kl{.kind = LossKind::kl}, hinge{.kind = LossKind::hinge};
  const LogitsLoss good{.logits = view(m.data(), {2, 8}),
                        .teacher = view(m.data() + 16, {2, 8}),
                        .ids = {},
                        .logprobs = {},
                        .labels = view(labels.data(), {2}),
                        .terms = {&kl, 1},
                        .value = view(v.data(), {1, 2})};
  const auto message = [&](const LogitsLoss& a) {
    try {
      logits_loss(ctx, a);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(good), "");
  auto bad = good;
  bad.terms = {&hinge, 1};
  EXPECT_NE(message(bad).find("hinge compares the teacher's likeliest ids: it needs ids"), std::string::npos);
  bad = good;
  bad.teacher = {};
  EXPECT_NE(message(bad).find("kl needs a teacher"), std::string::npos);
  bad = good;
  bad.ids = view(ids.data(), {2, 2});
  bad.logprobs = view(m.data(), {2, 2});
  EXPECT_NE(message(bad).find("got both"), std::string::npos);
  bad.teacher = {};
  EXPECT_EQ(message(bad), "");
  ids[3] = 8;
  EXPECT_NE(message(bad).find("id 8 outside"), std::string::npos);
  bad = good;
  labels[1] = 8;
  EXPECT_NE(message(good).find("label 8 outside"), std::string::npos);
  labels[1] = 0;
  bad.value.shape = {2, 2};
  EXPECT_THROW(logits_loss(ctx, bad), Error);
  const LossTerm cold{.kind = LossKind::kl, .temperature = 0};
  bad = good;
  bad.terms = {&cold, 1};
  EXPECT_NE(message(bad).find("temperature must be above 0"), std::string::npos);
}

// ---- DistillKit's own values

struct GoldenProblem {
  GoldenFile file;
  Problem dense, sparse;
  explicit GoldenProblem(const std::filesystem::path& path) : file(path) {
    const auto& x = file["student_logits"];
    const int64_t R = x.shape[0] * x.shape[1], V = x.shape[2], k = file["sparse_ids"].shape[2];
    dense = {.R = R, .V = V, .k = 0, .x = x.floats(), .t = file["teacher_logits"].floats()};
    for (int64_t r = 0; r < R; ++r) dense.labels.push_back(0);  // nothing is masked
    sparse = dense;
    sparse.t.clear();
    sparse.k = k;
    sparse.ids = file["sparse_ids"].ids();
    sparse.logprobs = file["sparse_logprobs"].floats();
  }
  // Pairs that the ranking losses take the mean over.
  int64_t pairs() const {
    int64_t n = 0;
    for (int64_t r = 0; r < sparse.R; ++r)
      for (int64_t a = 0; a < sparse.k; ++a)
        for (int64_t b = 0; b < sparse.k; ++b)
          n += sparse.logprobs[size_t(r * sparse.k + a)] > sparse.logprobs[size_t(r * sparse.k + b)];
    return n;
  }
};

TEST(LogitsLoss, EqualsDistillKit) {
  KDA_NEED(path, "distill_losses.safetensors");
  const GoldenProblem g(path);
  const std::map<std::string, LossKind> kinds{{"kl", LossKind::kl},
                                              {"jsd", LossKind::jsd},
                                              {"tvd", LossKind::tvd},
                                              {"hinge", LossKind::hinge},
                                              {"logistic_ranking", LossKind::logistic_ranking}};
  int tried = 0;
  for (const auto& c : g.file.cases()) {
    const auto kind = kinds.find(c["function"]);
    if (kind == kinds.end()) continue;
    const std::string i = std::to_string(c["index"].get<int>());
    const bool sparse = c["sparse"];
    const Problem& p = sparse ? g.sparse : g.dense;
    LossTerm term{.kind = kind->second, .temperature = c.value("temperature", 1.0f), .margin = c.value("margin", 0.0f)};
    if (c.value("missing_probability_handling", "zero") == "symmetric_uniform")
      term.missing = MissingProbability::symmetric_uniform;
    term.scale = 1.0f / float(soft(term.kind) ? p.R : g.pairs());
    const Result got = run(p, {term});
    double loss = 0;
    for (float v : got.value) loss += double(v) * double(term.scale);
    const double want = g.file[i + ".loss"].values()[0];
    EXPECT_NEAR(loss / want, 1, 1e-5) << c.dump();
    EXPECT_LT(relative_l2(got.gradient, g.file[i + ".d_logits"].values()), 1e-4) << c.dump();
    EXPECT_LT(relative_max(got.gradient, g.file[i + ".d_logits"].values()), 1e-4) << c.dump();
    ++tried;
    // The same comparisons see a temperature a hundredth off and a factor a thousandth off.
    if (soft(term.kind))
      term.temperature *= 1.01f;
    else
      term.scale *= 1.001f;
    EXPECT_GT(relative_l2(run(p, {term}).gradient, g.file[i + ".d_logits"].values()), 1e-4) << c.dump();
  }
  EXPECT_EQ(tried, 21);
}

// ---- hidden states

double hidden_value(HiddenLossKind kind, const double* a, const double* b, int64_t D) {
  double squares = 0, dot = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < D; ++i) {
    squares += (a[i] - b[i]) * (a[i] - b[i]);
    dot += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  }
  return kind == HiddenLossKind::mse ? squares / double(D) : 1 - dot / std::sqrt(aa * bb);
}

Result run_hidden(const std::vector<float>& a, const std::vector<float>& b, const std::vector<int32_t>& labels,
                  HiddenLossKind kind, float scale, const std::vector<float>& before, int threads = 2) {
  CpuContext ctx(threads);
  const int64_t R = int64_t(labels.size()), D = int64_t(a.size()) / R;
  Buffer x(ctx, a), t(ctx, b), dx(ctx, before), value(ctx, R);
  hidden_loss(ctx, {.student = x.view({R, D}),
                    .teacher = t.view({R, D}),
                    .labels = view(labels.data(), {R}),
                    .kind = kind,
                    .scale = scale,
                    .d_student = dx.view({R, D}),
                    .value = value.view({R})});
  EXPECT_TRUE(dx.guards_intact() && value.guards_intact());
  return {value.fetch(), dx.fetch()};
}

TEST(HiddenLoss, EqualsReferenceAndAdds) {
  const std::vector<int32_t> labels{3, -1, 0, 7, 1};
  const int64_t R = 5;
  for (auto kind : {HiddenLossKind::mse, HiddenLossKind::cosine})
    for (int64_t D : {1, 2, 15, 16, 17, 63, 257}) {
      const auto a = values("a", R * D, 2), b = values("b", R * D, 2), before = values("before", R * D);
      const Result got = run_hidden(a, b, labels, kind, 0.25f, before);
      const std::vector<double> wide_b(b.begin(), b.end());
      std::vector<double> x(a.begin(), a.end()), want(before.begin(), before.end());
      for (int64_t r = 0; r < R; ++r) {
        double* row = x.data() + r * D;
        const double v = labels[size_t(r)] < 0 ? 0 : hidden_value(kind, row, wide_b.data() + r * D, D);
        EXPECT_NEAR(got.value[size_t(r)], v, 2e-6 * std::max(1.0, v));
        for (int64_t i = 0; i < D && labels[size_t(r)] >= 0; ++i) {
          const double h = 1e-5, at = row[i];
          row[i] = at + h;
          const double up = hidden_value(kind, row, wide_b.data() + r * D, D);
          row[i] = at - h;
          const double down = hidden_value(kind, row, wide_b.data() + r * D, D);
          row[i] = at;
          want[size_t(r * D + i)] += 0.25 * (up - down) / (2 * h);
        }
      }
      EXPECT_TRUE(close(got.gradient, want, 3e-6, 1.0)) << int(kind) << " " << D;
      EXPECT_EQ(run_hidden(a, b, labels, kind, 0.25f, before, 1).gradient, got.gradient);
    }
}

TEST(HiddenLoss, EqualsDistillKit) {
  KDA_NEED(path, "distill_losses.safetensors");
  const GoldenFile g(path);
  for (const auto& [kind, i] : {std::pair(HiddenLossKind::mse, "21"), std::pair(HiddenLossKind::cosine, "22")}) {
    double loss = 0;
    for (int layer = 0; layer < 3; ++layer) {
      const auto a = g[cat("student_hidden.", layer)].floats(), b = g[cat("teacher_hidden.", layer)].floats();
      const auto R = size_t(g["labels"].size());
      const float scale = 1.0f / float(3 * R);
      const Result got = run_hidden(a, b, std::vector<int32_t>(R, 0), kind, scale, std::vector<float>(a.size(), 0.0f));
      for (float v : got.value) loss += double(v) * double(scale);
      EXPECT_LT(relative_l2(got.gradient, g[cat(i, ".d_hidden.", layer)].values()), 1e-4);
      const Result other =
          run_hidden(a, b, std::vector<int32_t>(R, 0), kind, scale * 1.001f, std::vector<float>(a.size(), 0.0f));
      EXPECT_GT(relative_l2(other.gradient, g[cat(i, ".d_hidden.", layer)].values()), 1e-4);
    }
    EXPECT_NEAR(loss / g[cat(i, ".loss")].values()[0], 1, 1e-5);
  }
}

}  // namespace
}  // namespace kda::test
