// Whole models against reference files made by independent programs: hidden states, KDA states, logits, greedy text, and
// that neither blocks, batches, threads nor a stop in between change what a model says.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "runtime/generate.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/model_folders.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;

std::string name_of(const testing::TestParamInfo<fs::path>& info) {
  std::string s = info.param.filename().string();
  for (char& c : s)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return s;
}

EngineOptions options(Precision p, int threads = 2, int64_t block = 2048) {
  EngineOptions o;
  o.device = DeviceKind::cpu;
  o.precision = p;
  o.threads = threads;
  o.block_tokens = block;
  return o;
}

struct Scored {
  std::vector<float> logits;               // [T,V]
  std::vector<std::vector<float>> hidden;  // by layer, [T,D]
  std::vector<std::vector<float>> states;  // by layer
};

Scored score(Engine& e, const std::vector<int32_t>& ids, const std::vector<size_t>& pieces = {}) {
  Scored out;
  out.hidden.resize(e.config().layers.size() + 1);
  Session s(e);
  size_t at = 0;
  for (size_t i = 0; at < ids.size(); ++i) {
    const size_t n = std::min(pieces.empty() ? ids.size() : pieces[i % pieces.size()], ids.size() - at);
    e.score(
        s, std::span(ids).subspan(at, n),
        [&](int64_t, ConstView rows) {
          const float* p = rows.as<float>();
          out.logits.insert(out.logits.end(), p, p + rows.size());
        },
        [&](int64_t, int64_t l, ConstView rows) {
          const float* p = rows.as<float>();
          out.hidden[size_t(l)].insert(out.hidden[size_t(l)].end(), p, p + rows.size());
        });
    at += n;
  }
  for (size_t l = 0; l < e.config().layers.size(); ++l) out.states.push_back(s.kda_state(int64_t(l)));
  return out;
}

class GoldenModel : public testing::TestWithParam<fs::path> {
 protected:
  GoldenModel() : expected(GetParam() / "expected.safetensors") {
    const auto ids = expected["input_ids"].ids();
    const size_t B = size_t(expected["input_ids"].shape[0]), T = ids.size() / B;
    for (size_t b = 0; b < B; ++b) inputs.emplace_back(ids.begin() + int64_t(b * T), ids.begin() + int64_t((b + 1) * T));
  }
  // Row b of a [B,...] reference.
  std::vector<double> part(const std::string& name, size_t b) const {
    const auto all = expected[name].values();
    const size_t n = all.size() / inputs.size();
    return {all.begin() + int64_t(b * n), all.begin() + int64_t((b + 1) * n)};
  }
  GoldenFile expected;
  std::vector<std::vector<int32_t>> inputs;
};

std::vector<double> normalised(const std::vector<float>& x, const Engine& e) {
  const size_t D = size_t(e.config().width);
  const float* w = e.weights().final_norm.v.as<float>();
  std::vector<double> out(x.size());
  for (size_t r = 0; r < x.size() / D; ++r) {
    double sum = 0;
    for (size_t d = 0; d < D; ++d) sum += double(x[r * D + d]) * x[r * D + d];
    for (size_t d = 0; d < D; ++d) out[r * D + d] = x[r * D + d] / std::sqrt(sum / double(D) + e.config().norm_eps) * w[d];
  }
  return out;
}

constexpr double kExact = 2e-5;

TEST_P(GoldenModel, ExactMatchesEveryLayer) {
  Engine e(GetParam(), options(Precision::exact));
  const size_t L = e.config().layers.size();
  for (size_t b = 0; b < inputs.size(); ++b) {
    const Scored got = score(e, inputs[b]);
    for (size_t l = 0; l <= L; ++l) {
      const std::string name = cat("hidden.", l);
      ASSERT_TRUE(expected.has(name));
      const auto want = part(name, b);
      double error = relative_max(got.hidden[l], want);
      // Some files hold the last one after the final norm; the two differ by far more than rounding.
      if (l == L) error = std::min(error, relative_max(normalised(got.hidden[l], e), want));
      EXPECT_LE(error, kExact) << name << ", sequence " << b;
    }
    EXPECT_LE(relative_max(got.logits, part("logits", b)), kExact) << "logits, sequence " << b;
    for (size_t l = 0; l < L; ++l) {
      const std::string name = cat("state.", l);
      const LayerSpec& s = e.config().layers[l];
      EXPECT_EQ(s.mixer == Mixer::kda, !got.states[l].empty());
      if (s.mixer != Mixer::kda) continue;
      ASSERT_TRUE(expected.has(name));
      const auto want = part(name, b);  // [H,K,V] there, [H,V,K] here
      std::vector<double> turned(want.size());
      for (int64_t h = 0; h < s.kda_heads; ++h)
        for (int64_t v = 0; v < s.V; ++v)
          for (int64_t k = 0; k < s.K; ++k)
            turned[size_t((h * s.V + v) * s.K + k)] = want[size_t((h * s.K + k) * s.V + v)];
      EXPECT_LE(relative_max(got.states[l], turned), kExact) << name << ", sequence " << b;
    }
  }
}

TEST_P(GoldenModel, FastKeepsLogitsAndTopTokens) {
  Engine e(GetParam(), options(Precision::fast));
  const size_t V = size_t(e.config().vocabulary);
  for (size_t b = 0; b < inputs.size(); ++b) {
    const Scored got = score(e, inputs[b]);
    const auto want = part("logits", b);
    EXPECT_LE(relative_l2(got.logits, want), 1e-2);
    int64_t clear = 0;
    for (size_t t = 0; t < inputs[b].size(); ++t) {
      const double* w = want.data() + t * V;
      const float* g = got.logits.data() + t * V;
      const size_t best = size_t(std::max_element(w, w + V) - w);
      double second = -1e300;
      for (size_t i = 0; i < V; ++i)
        if (i != best) second = std::max(second, w[i]);
      if (w[best] - second < 0.1) continue;
      ++clear;
      EXPECT_EQ(size_t(std::max_element(g, g + V) - g), best) << "position " << t;
    }
    RecordProperty(cat("clear_positions_", b), std::to_string(clear));
  }
}

TEST_P(GoldenModel, GreedyText) {
  if (!expected.has("greedy")) GTEST_SKIP() << "no greedy text in " << GetParam();
  const auto greedy = expected["greedy"].ids();
  Engine e(GetParam(), options(Precision::exact));
  GenerationRequest r{.prompt = {greedy.begin(), greedy.begin() + 16}, .params = {}};
  r.params.max_new_tokens = int64_t(greedy.size()) - 16;
  r.params.ignore_eos = true;
  const auto got = generate(e, {r});
  EXPECT_EQ(got.at(0).tokens, std::vector<int32_t>(greedy.begin() + 16, greedy.end()));
}

TEST_P(GoldenModel, AnySplitOfAPromptGivesTheSameLogits) {
  Engine e(GetParam(), options(Precision::exact));
  const Scored whole = score(e, inputs[0]);
  for (size_t n : {1, 2, 3, 15, 16, 17, 64}) {
    EXPECT_LE(relative_max(score(e, inputs[0], {n}).logits, whole.logits), 1e-5) << "pieces of " << n;
    Engine blocks(GetParam(), options(Precision::exact, 2, int64_t(n)));
    EXPECT_LE(relative_max(score(blocks, inputs[0]).logits, whole.logits), 1e-5) << "blocks of " << n;
  }
  EXPECT_LE(relative_max(score(e, inputs[0], {5, 1, 29}).logits, whole.logits), 1e-5);
}

TEST_P(GoldenModel, ThreadsAndBatchesChangeNothing) {
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    // Prompts of several lengths, alone and together, on 1, 2 and 3 threads: every bit the same.
    std::vector<GenerationRequest> requests;
    for (size_t n : {1, 3, 16, 17, 40}) {
      GenerationRequest r;
      r.prompt.assign(inputs[0].begin(), inputs[0].begin() + int64_t(std::min(n, inputs[0].size())));
      r.params.max_new_tokens = 6;
      r.params.ignore_eos = true;
      r.params.logprobs = 3;
      requests.push_back(r);
    }
    std::vector<std::vector<float>> first;
    for (int threads : {1, 2, 3}) {
      Engine e(GetParam(), options(precision, threads));
      std::vector<Session> together;
      generate(e, requests, {}, &together);
      std::vector<std::vector<float>> logits;
      for (const Session& s : together) {
        Session copy = s.fork();
        if (copy.pending()) {
          Session* p = &copy;
          e.decode({&p, 1});
        }
        logits.emplace_back(copy.logits().begin(), copy.logits().end());
      }
      if (first.empty()) first = logits;
      EXPECT_EQ(logits, first) << threads << " threads";
      for (size_t i = 0; i < requests.size(); ++i) {
        std::vector<Session> alone;
        generate(e, {requests[i]}, {}, &alone);
        if (alone[0].pending()) {
          Session* p = &alone[0];
          e.decode({&p, 1});
        }
        EXPECT_EQ(std::vector<float>(alone[0].logits().begin(), alone[0].logits().end()), first[i]) << "alone, prompt " << i;
        EXPECT_EQ(alone[0].tokens(), together[i].tokens());
      }
    }
  }
}

TEST_P(GoldenModel, SaveRestoreContinueEqualsNeverStopped) {
  const fs::path file = fs::path(testing::TempDir()) / cat("kda_session_", GetParam().filename().string(), ".safetensors");
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    Engine e(GetParam(), options(precision));
    GenerationRequest r;
    r.prompt.assign(inputs[0].begin(), inputs[0].begin() + 20);
    r.params.ignore_eos = true;
    r.params.do_sample = true;
    r.params.temperature = 1.1;
    r.params.seed = 7;
    r.params.repetition_penalty = 1.2;
    r.params.max_new_tokens = 16;
    std::vector<Session> never;
    const auto whole = generate(e, {r}, {}, &never);
    for (int64_t stop : {0, 1, 5}) {
      GenerationRequest begin = r;
      begin.params.max_new_tokens = stop;
      std::vector<Session> stopped;
      auto tokens = generate(e, {begin}, {}, &stopped).at(0).tokens;
      stopped[0].save(file);
      Engine other(GetParam(), options(precision, 1));
      std::vector<Session> sessions;
      sessions.push_back(Session::restore(other, file));
      GenerationRequest rest = r;
      rest.prompt.clear();
      rest.params.max_new_tokens = 16 - stop;
      const auto more = generate(other, {rest}, {}, &sessions).at(0).tokens;
      tokens.insert(tokens.end(), more.begin(), more.end());
      EXPECT_EQ(tokens, whole.at(0).tokens) << "stopped after " << stop;
      EXPECT_EQ(sessions[0].tokens(), never[0].tokens());
      for (size_t l = 0; l < e.config().layers.size(); ++l)
        EXPECT_EQ(sessions[0].kda_state(int64_t(l)), never[0].kda_state(int64_t(l)));
    }
  }
  fs::remove(file);
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GoldenModel);
INSTANTIATE_TEST_SUITE_P(Models, GoldenModel, testing::ValuesIn(model_folders()), name_of);

}  // namespace
}  // namespace kda::test
