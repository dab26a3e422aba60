#include "runtime/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "base/error.h"
#include "base/rng.h"
#include "tests/check.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SamplingParams params_of(const nlohmann::json& c) {
  SamplingParams p;
  p.do_sample = true;
  std::set<std::string> known;
  const auto take = [&](const char* name, auto& field) {
    known.insert(name);
    if (c.contains(name)) field = c[name].get<std::decay_t<decltype(field)>>();
  };
  take("temperature", p.temperature);
  take("top_k", p.top_k);
  take("top_p", p.top_p);
  take("min_p", p.min_p);
  take("typical_p", p.typical_p);
  take("repetition_penalty", p.repetition_penalty);
  take("no_repeat_ngram_size", p.no_repeat_ngram_size);
  take("min_new_tokens", p.min_new_tokens);
  known.insert("logit_bias");
  if (c.contains("logit_bias"))
    for (const auto& [id, bias] : c["logit_bias"].items()) p.logit_bias[std::stoi(id)] = bias;
  for (const auto& [name, value] : c.items())
    if (!known.count(name)) ADD_FAILURE() << "the test does not know " << name;
  return p;
}

// Every case of a file against `probs.N`; returns how many rows were compared.
int check_file(const GoldenFile& file, const std::string& cases, const std::string& tokens, int64_t prompt_length,
               const std::vector<int32_t>& eos_ids, double tolerance) {
  const auto list = file.cases(cases);
  const auto logits = file["logits"].floats();
  const auto ids = file[tokens].ids();
  const size_t R = size_t(file["logits"].shape[0]), V = size_t(file["logits"].shape[1]), L = ids.size() / R;
  SamplerScratch scratch;
  std::set<size_t> tied;
  if (file.metadata.contains("rows_with_ties")) tied = file.cases("rows_with_ties").get<std::set<size_t>>();
  int compared = 0;
  for (size_t n = 0; n < list.size(); ++n) {
    SamplingParams p = params_of(list[n]);
    p.eos_ids = eos_ids;
    validate(p, int64_t(V));
    const auto want = file["probs." + std::to_string(n)].values();
    for (size_t r = 0; r < R; ++r, ++compared) {
      std::vector<double> row(want.begin() + std::ptrdiff_t(r * V), want.begin() + std::ptrdiff_t((r + 1) * V));
      auto got = probabilities(p, {&logits[r * V], V}, {&ids[r * L], L}, prompt_length < 0 ? int64_t(L) : prompt_length,
                               scratch);
      // Which of equal tokens top_p keeps is undefined in transformers; how many, and how likely, is not.
      if (tied.count(r) && p.top_p < 1) {
        std::sort(got.begin(), got.end());
        std::sort(row.begin(), row.end());
      }
      EXPECT_TRUE(close(got, row, tolerance, 1)) << "case " << n << " " << list[n] << " row " << r;
    }
  }
  return compared;
}

TEST(Sampler, GoldenProbabilities) {
  KDA_NEED(path, "sampling.safetensors");
  EXPECT_GT(check_file(GoldenFile(path), "combos", "prev", -1, {}, 1e-6), 0);
}

TEST(Sampler, EqualsTransformersInFurtherCombinations) {
  const GoldenFile file(std::string(KDA_SOURCE_DIR) + "/tests/data/sampling/transformers.safetensors");
  const auto eos = file.cases("eos_ids").get<std::vector<int32_t>>();
  const int64_t prompt_length = std::stoll(file.metadata["prompt_length"].get<std::string>());
  EXPECT_GE(check_file(file, "cases", "tokens", prompt_length, eos, 1e-6), 150);
}

TEST(Sampler, ComparisonCanFail) {
  SamplerScratch s;
  const std::vector<float> logits{0, 1, 2};
  SamplingParams p;
  p.do_sample = true;
  auto got = probabilities(p, logits, {}, 0, s);
  const double sum = 1 + std::exp(1) + std::exp(2);
  const std::vector<double> want{1 / sum, std::exp(1) / sum, std::exp(2) / sum};
  EXPECT_TRUE(close(got, want, 1e-12, 1));
  p.temperature = 1.00001;
  EXPECT_FALSE(close(probabilities(p, logits, {}, 0, s), want, 1e-6, 1));
}

TEST(Sampler, PresenceAndFrequencyCountGeneratedTokensOnly) {
  SamplerScratch s;
  const std::vector<float> logits{0.5f, 1, 1.5f, 2, -1};
  const std::vector<int32_t> tokens{0, 1, 1, /* generated */ 1, 2, 2, 2};
  SamplingParams p;
  p.do_sample = true;
  p.presence_penalty = 0.5;
  p.frequency_penalty = 0.25;
  const std::vector<double> x{0.5, 1 - 0.75, 1.5 - 0.5 - 0.75, 2, -1};
  double sum = 0;
  for (double v : x) sum += std::exp(v);
  const auto got = probabilities(p, logits, tokens, 3, s);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(got[i], std::exp(x[i]) / sum, 1e-7) << i;
  // After the repetition penalty: 1 / 2 - 0.75 and not (1 - 0.75) / 2.
  p.repetition_penalty = 2;
  const auto both = probabilities(p, logits, tokens, 3, s);
  EXPECT_NEAR(std::log(both[1] / both[3]), (0.5 - 0.75) - 2, 1e-6);
  EXPECT_NEAR(std::log(both[0] / both[3]), 0.25 - 2, 1e-6);
}

TEST(Sampler, BiasesAndBans) {
  SamplerScratch s;
  const std::vector<float> logits{0, 1, 2, 3};
  SamplingParams p;
  p.logit_bias = {{3, -INFINITY}, {0, 5.0}};
  EXPECT_EQ(sample(p, logits, {}, 0, 0, s).id, 0);
  p.logit_bias = {{3, -INFINITY}};
  EXPECT_EQ(sample(p, logits, {}, 0, 0, s).id, 2);
  p.do_sample = true;
  EXPECT_EQ(probabilities(p, logits, {}, 0, s)[3], 0);
  p.logit_bias = {{0, -INFINITY}, {1, -INFINITY}, {2, -INFINITY}, {3, -INFINITY}};
  EXPECT_THROW(sample(p, logits, {}, 0, 0, s), Error);
  p.do_sample = false;
  EXPECT_THROW(sample(p, logits, {}, 0, 0, s), Error);
}

TEST(Sampler, EndsAreBannedUntilEnoughTokens) {
  SamplerScratch s;
  const std::vector<float> logits{0, 1, 2, 3, 4};
  SamplingParams p;
  p.eos_ids = {4};
  p.stop_ids = {3};
  p.min_new_tokens = 2;
  const std::vector<int32_t> tokens{0, 0, 0, 0};
  EXPECT_EQ(sample(p, logits, tokens, 4, 0, s).id, 2);
  EXPECT_EQ(sample(p, logits, tokens, 3, 0, s).id, 2);
  EXPECT_EQ(sample(p, logits, tokens, 2, 0, s).id, 4);
  p.ignore_eos = true;  // then the model's own end is a token like any other
  EXPECT_EQ(sample(p, logits, tokens, 3, 0, s).id, 4);
  EXPECT_FALSE(ends_sequence(p, 4));
  EXPECT_TRUE(ends_sequence(p, 3));
  p.ignore_eos = false;
  EXPECT_TRUE(ends_sequence(p, 4));
  EXPECT_FALSE(ends_sequence(p, 0));
}

TEST(Sampler, GreedyTakesTheLowestOfEqualsAndIgnoresWarpers) {
  SamplerScratch s;
  for (size_t V : {1u, 7u, 8u, 9u, 1000u}) {
    std::vector<float> logits(V, -2.0f);
    EXPECT_EQ(sample({}, logits, {}, 0, 0, s).id, 0);
    if (V < 7) continue;
    logits[6] = logits[V - 1] = 5;
    EXPECT_EQ(sample({}, logits, {}, 0, 0, s).id, 6) << V;
    SamplingParams p;
    p.top_p = 0.5, p.typical_p = 0.1, p.temperature = 3;
    EXPECT_EQ(sample(p, logits, {}, 0, 0, s).id, 6);
    p.do_sample = true, p.temperature = 0;
    EXPECT_EQ(sample(p, logits, {}, 0, 0, s).id, 6);
    EXPECT_EQ(probabilities(p, logits, {}, 0, s)[6], 1);
  }
}

TEST(Sampler, GreedyHonoursProcessors) {
  SamplerScratch s;
  const std::vector<float> logits{1, 4, 5, 4.5f};
  SamplingParams p;
  p.repetition_penalty = 2;
  const std::vector<int32_t> tokens{2, 3, 2};
  EXPECT_EQ(sample(p, logits, tokens, 3, 0, s).id, 1);
  p.repetition_penalty = 1;
  p.no_repeat_ngram_size = 2;
  const std::vector<int32_t> cycle{2, 2};
  EXPECT_EQ(sample(p, logits, cycle, 2, 0, s).id, 3);
}

TEST(Sampler, LogprobsAreTheModelsOwn) {
  SamplerScratch s;
  const auto logits = values("logprobs", 1000, 5);
  SamplingParams p;
  p.do_sample = true;
  p.temperature = 0.3;
  p.top_k = 3;
  p.logprobs = 5;
  const Sampled r = sample(p, logits, {}, 0, 0, s);
  double sum = 0;
  for (float x : logits) sum += std::exp(double(x));
  EXPECT_NEAR(r.logprob, double(logits[size_t(r.id)]) - std::log(sum), 1e-5);
  ASSERT_EQ(r.top.size(), 5u);
  EXPECT_EQ(logits[size_t(r.top[0].first)], *std::max_element(logits.begin(), logits.end()));
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_NEAR(r.top[i].second, double(logits[size_t(r.top[i].first)]) - std::log(sum), 1e-5);
    if (i) {
      EXPECT_GE(r.top[i - 1].second, r.top[i].second);
    }
  }
  p = {};
  p.logprobs = 3;
  const std::vector<float> ties{1, 2, 2, 2, 2, 0};
  const Sampled t = sample(p, ties, {}, 0, 0, s);
  ASSERT_EQ(t.top.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(t.top[size_t(i)].first, i + 1);
  EXPECT_EQ(t.logprob, t.top[0].second);
  p.logprobs = 0;
  EXPECT_TRUE(sample(p, ties, {}, 0, 0, s).top.empty());
  p.logprobs = -1;
  EXPECT_TRUE(std::isnan(sample(p, ties, {}, 0, 0, s).logprob));
}

TEST(Sampler, RefusesLogitsThatAreNotFinite) {
  SamplerScratch s;
  SamplingParams p;
  for (bool do_sample : {false, true}) {
    p.do_sample = do_sample;
    for (size_t V : {5u, 40u}) {
      std::vector<float> logits(V, 0.0f);
      logits[3] = -kInf;
      EXPECT_NO_THROW(sample(p, logits, {}, 0, 0, s));
      logits[4] = std::nanf("");
      logits[V - 1] = std::nanf("");
      try {
        sample(p, logits, {}, 0, 0, s);
        ADD_FAILURE() << "took a NaN";
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find(V == 5 ? "1 are NaN" : "2 are NaN"), std::string::npos) << e.what();
      }
      logits[4] = logits[V - 1] = kInf;
      EXPECT_THROW(sample(p, logits, {}, 0, 0, s), Error);
      EXPECT_THROW(sample(p, std::vector<float>(V, -kInf), {}, 0, 0, s), Error);
    }
  }
  p.temperature = 1e-44;
  EXPECT_THROW(sample(p, std::vector<float>{3, 2}, {}, 0, 0, s), Error);
}

// Pearson's statistic of n draws against a distribution; ids with fewer than 5 expected draws count as one.
double chi_square(const SamplingParams& p, const std::vector<float>& logits, const std::vector<double>& want, int n,
                  int& degrees) {
  SamplerScratch s;
  std::vector<int> seen(logits.size());
  std::vector<int32_t> tokens(1);
  for (int i = 0; i < n; ++i) ++seen[size_t(sample(p, logits, tokens, 1, uint32_t(i), s).id)];
  double rest_want = 0, rest_seen = 0, x = 0;
  degrees = -1;
  for (size_t i = 0; i < want.size(); ++i) {
    const double e = want[i] * n;
    EXPECT_TRUE(want[i] > 0 || seen[i] == 0) << "drew an id that was cut: " << i;
    if (e < 5) {
      rest_want += e, rest_seen += seen[i];
      continue;
    }
    x += (seen[i] - e) * (seen[i] - e) / e, ++degrees;
  }
  if (rest_want > 5) x += (rest_seen - rest_want) * (rest_seen - rest_want) / rest_want, ++degrees;
  return x;
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const auto logits = values("draws", 300, 4);
  SamplerScratch s;
  for (int which = 0; which < 3; ++which) {
    SamplingParams p;
    p.do_sample = true;
    p.seed = 11;
    if (which == 1) p.temperature = 0.7, p.top_k = 20;
    if (which == 2) p.temperature = 1.5, p.top_p = 0.8, p.min_p = 0.02;
    int degrees = 0;
    const auto want = probabilities(p, logits, std::vector<int32_t>{0}, 1, s);
    const double x = chi_square(p, logits, want, 40000, degrees);
    // The statistic has mean f and standard deviation sqrt(2 f); the seed is fixed, so this cannot flicker.
    EXPECT_LT(x, degrees + 4 * std::sqrt(2.0 * degrees)) << which << ", degrees " << degrees;
    SamplingParams other = p;
    other.temperature *= 1.1;
    if (which > 0) continue;
    const double wrong = chi_square(other, logits, want, 40000, degrees);
    EXPECT_GT(wrong, degrees + 8 * std::sqrt(2.0 * degrees)) << "the test cannot fail";
  }
}

TEST(Sampler, ADrawDependsOnSeedSequenceAndPositionOnly) {
  const auto logits = values("draw", 500, 3);
  SamplerScratch a, used;
  SamplingParams p;
  p.do_sample = true;
  p.seed = 5;
  const std::vector<int32_t> tokens{1, 2, 3, 4, 5, 6, 7, 8};
  const std::span<const int32_t> all(tokens);
  std::set<int32_t> ids;
  for (size_t length : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u})
    for (uint32_t sequence : {0u, 1u, 2u, 3u}) {
      SamplerScratch fresh;
      const auto prefix = all.first(length);
      const int32_t id = sample(p, logits, prefix, 1, sequence, used).id;
      EXPECT_EQ(sample(p, logits, prefix, int64_t(length), sequence, fresh).id, id);
      ids.insert(id);
      // By hand: the inverse of the cumulative distribution at Philox(seed; sequence, position, 0, 0).
      const auto w = Philox::block(5, {sequence, uint32_t(length), 0, 0});
      const auto prob = probabilities(p, logits, prefix, 1, a);
      double sum = 0;
      size_t want = 0;
      while ((sum += prob[want]) <= uniform53(w[0], w[1])) ++want;
      EXPECT_EQ(size_t(id), want);
    }
  EXPECT_GT(ids.size(), 20u);
  const int32_t before = sample(p, logits, all, 1, 0, a).id;
  int changed = 0;
  for (uint64_t seed = 100; seed < 110; ++seed) p.seed = seed, changed += sample(p, logits, all, 1, 0, a).id != before;
  EXPECT_GT(changed, 5);
}

TEST(Sampler, LargeVocabularyCutsAreExact) {
  const int64_t V = 128004;
  const auto logits = values("large", V, 8);
  SamplerScratch s;
  SamplingParams p;
  p.do_sample = true;
  for (int64_t k : {1, 50, 512, 513, 5000}) {
    p.top_k = k;
    const auto got = probabilities(p, logits, {}, 0, s);
    int64_t kept = 0;
    double least = 1, most_cut = -1e9;
    for (size_t i = 0; i < got.size(); ++i) {
      kept += got[i] > 0;
      if (got[i] > 0)
        least = std::min(least, double(logits[i]));
      else
        most_cut = std::max(most_cut, double(logits[i]));
    }
    EXPECT_GE(kept, k);
    EXPECT_LT(kept, k + 20);  // ties
    EXPECT_LT(most_cut, least == 1 ? 9 : least);
  }
  p.top_k = 0;
  p.top_p = 0.6;
  const auto all = probabilities({.do_sample = true}, logits, {}, 0, s), cut = probabilities(p, logits, {}, 0, s);
  double mass = 0, least = 1;
  for (size_t i = 0; i < cut.size(); ++i)
    if (cut[i] > 0) mass += all[i], least = std::min(least, all[i]);
  EXPECT_GE(mass, 0.6 - 1e-12);
  EXPECT_LT(mass - least, 0.6);
}

TEST(Sampler, ValidateNamesFieldRangeAndValue) {
  const auto refuses = [](SamplingParams p, const std::string& field, const std::string& value) {
    try {
      validate(p, 100);
      ADD_FAILURE() << "took " << field << " " << value;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(field), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find(value), std::string::npos) << e.what();
    }
  };
  EXPECT_NO_THROW(validate({}, 100));
  refuses({.temperature = -1}, "temperature", "-1");
  refuses({.temperature = std::nan("")}, "temperature", "nan");
  refuses({.temperature = double(kInf)}, "temperature", "inf");
  refuses({.top_k = -2}, "top_k", "-2");
  refuses({.top_p = 1.5}, "top_p", "1.5");
  refuses({.min_p = -0.1}, "min_p", "-0.1");
  refuses({.typical_p = 0}, "typical_p", "0");
  refuses({.repetition_penalty = 0}, "repetition_penalty", "0");
  refuses({.presence_penalty = 2.5}, "presence_penalty", "2.5");
  refuses({.frequency_penalty = -2.5}, "frequency_penalty", "-2.5");
  refuses({.no_repeat_ngram_size = -3}, "no_repeat_ngram_size", "-3");
  refuses({.min_new_tokens = 7, .max_new_tokens = 6}, "min_new_tokens", "7");
  refuses({.max_new_tokens = -4}, "max_new_tokens", "-4");
  refuses({.logit_bias = {{100, 1.0}}}, "logit_bias", "100");
  refuses({.logit_bias = {{1, std::nan("")}}}, "logit_bias", "nan");
  refuses({.stop = {""}}, "stop", "empty");
  refuses({.stop_ids = {-5}}, "stop_ids", "-5");
  refuses({.logprobs = 101}, "logprobs", "101");
}

}  // namespace
}  // namespace kda::test
