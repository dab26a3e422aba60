// Whole models on a GPU against reference files made by independent programs and against the CPU's exact products; that
// batches, blocks, stops and forks change nothing they must not.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "runtime/generate.h"
#include "tests/cuda.h"
#include "tests/golden.h"
#include "tests/model_folders.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;

EngineOptions on_gpu() {
  EngineOptions o;
  o.device = DeviceKind::cuda;
  o.threads = 2;
  return o;
}

std::vector<float> score(Engine& e, const std::vector<int32_t>& ids, size_t piece = 0) {
  std::vector<float> logits;
  Session s(e);
  for (size_t at = 0; at < ids.size();) {
    const size_t n = std::min(piece ? piece : ids.size(), ids.size() - at);
    e.score(s, std::span(ids).subspan(at, n), [&](int64_t, ConstView rows) {
      const float* p = rows.as<float>();
      logits.insert(logits.end(), p, p + rows.size());
    });
    at += n;
  }
  return logits;
}

struct Tops {
  int64_t clear = 0, other = 0;
};
// Where the two best of `want` differ by 0.1 or more, and how often `got` has another best there.
Tops compare_tops(const std::vector<float>& got, const std::vector<double>& want, size_t V) {
  Tops t;
  for (size_t r = 0; r < want.size() / V; ++r) {
    const double* w = want.data() + r * V;
    const float* g = got.data() + r * V;
    const size_t best = size_t(std::max_element(w, w + V) - w);
    double second = -1e300;
    for (size_t i = 0; i < V; ++i)
      if (i != best) second = std::max(second, w[i]);
    if (w[best] - second < 0.1) continue;
    ++t.clear;
    t.other += size_t(std::max_element(g, g + V) - g) != best;
  }
  return t;
}

// The logits of all rows of `ids` [B,T].
std::vector<float> score_rows(Engine& e, const std::vector<int32_t>& ids, size_t B) {
  const size_t T = ids.size() / B;
  std::vector<float> out;
  for (size_t b = 0; b < B; ++b) {
    const auto one = score(e, {ids.begin() + int64_t(b * T), ids.begin() + int64_t((b + 1) * T)});
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
}

// How far rounding the matrices to bf16 alone moves a model's logits: measured on the CPU, all else in fp32.
double moved_by_rounded_weights(const fs::path& folder, const GoldenFile& expected) {
  Checkpoint c = load_checkpoint(folder);
  for (auto& [name, t] : c.tensors) {
    if (t.shape().rank != 2 || t.dtype() != Dtype::f32 || !name.ends_with("weight")) continue;
    const Tensor r = host_tensor(Dtype::f32, t.shape());
    for (int64_t i = 0; i < t.v.size(); ++i) r.v.as<float>()[i] = float(bf16(t.v.as<float>()[i]));
    t = r;
  }
  EngineOptions o;
  o.device = DeviceKind::cpu, o.precision = Precision::exact, o.threads = 2;
  Engine e(arrange_weights(c), nullptr, c.generation, o);
  return relative_l2(score_rows(e, expected["input_ids"].ids(), size_t(expected["input_ids"].shape[0])),
                     expected["logits"].values());
}

// bf16 is 2^-9 a rounding. How much of that reaches the logits depends on the model (small random ones amplify it), and
// is measured: for every product its weights are rounded once, and up to five activations beside it (what goes in, what
// comes out, convolved, gated, normed), which as independent errors make sqrt(1 + 5) times as much.
double allowed_error(const fs::path& folder, const GoldenFile& expected) {
  return std::max(1.5e-2, 2.5 * moved_by_rounded_weights(folder, expected));
}

TEST(CudaEngine, WhatIsAllowedFollowsFromRoundedWeights) {
  int64_t seen = 0;
  for (const fs::path& folder : model_folders()) {
    const std::string name = folder.filename().string();
    const bool tiny = name == "tiny-kda" || name == "swiglu";  // of f32 files
    if (!tiny && name != "small-kda-bf16") continue;
    const double moved = moved_by_rounded_weights(folder, GoldenFile(folder / "expected.safetensors"));
    EXPECT_GT(moved, tiny ? 5e-3 : 0) << name;
    EXPECT_LT(moved, tiny ? 3e-2 : 1e-5) << name;
    ++seen;
  }
  if (seen == 0) GTEST_SKIP() << "no model folder";
}

TEST(CudaEngine, GoldenLogits) {
  KDA_NEEDS_CUDA();
  int64_t models = 0;
  for (const fs::path& folder : model_folders()) {
    const GoldenFile expected(folder / "expected.safetensors");
    const auto all = expected["logits"].values();
    Engine e(folder, on_gpu());
    const size_t V = size_t(e.config().vocabulary);
    const auto got = score_rows(e, expected["input_ids"].ids(), size_t(expected["input_ids"].shape[0]));
    const double error = relative_l2(got, all), allowed = allowed_error(folder, expected);
    const Tops tops = compare_tops(got, all, V);
    std::printf("%-24s logits off by %.2e of %.2e; %ld of %ld clear top tokens differ\n", folder.filename().c_str(),
                error, allowed, long(tops.other), long(tops.clear));
    EXPECT_LE(error, allowed) << folder;
    if (folder.filename() == "nano-teacher") {
      EXPECT_EQ(tops.other, 0);
      EXPECT_GT(tops.clear, 0);
    }
    ++models;
  }
  EXPECT_GT(models, 0);
  // A comparison that cannot fail proves nothing.
  EXPECT_EQ(compare_tops({1, 0}, {0, 1}, 2).other, 1);
}

// The first of the folders with a layer of this kind.
fs::path folder_with(Mixer mixer) {
  for (const fs::path& f : model_folders()) {
    const Checkpoint c = load_checkpoint(f);
    if (std::any_of(c.config.layers.begin(), c.config.layers.end(),
                    [&](const LayerSpec& l) { return l.mixer == mixer; }))
      return f;
  }
  return {};
}

std::vector<int32_t> some_ids(const Engine& e, int64_t n, uint32_t seed) {
  std::vector<int32_t> ids;
  uint32_t x = seed * 2654435761u + 12345u;
  for (int64_t i = 0; i < n; ++i) {
    x = x * 1664525u + 1013904223u;
    ids.push_back(int32_t((x >> 8) % uint32_t(e.config().vocabulary)));
  }
  return ids;
}

GenerationRequest greedy(std::vector<int32_t> prompt, int64_t n) {
  GenerationRequest r{.prompt = std::move(prompt), .params = {}};
  r.params.max_new_tokens = n;
  r.params.ignore_eos = true;
  return r;
}

// Tokens that were generated one by one are those that scoring the whole text finds, up to near ties.
TEST(CudaEngine, GeneratedTokensAreTheLikeliestOfTheScoredText) {
  KDA_NEEDS_CUDA();
  for (const Mixer mixer : {Mixer::kda, Mixer::full}) {
    const fs::path folder = folder_with(mixer);
    if (folder.empty()) GTEST_SKIP() << "no model folder";
    Engine e(folder, on_gpu());
    const size_t V = size_t(e.config().vocabulary);
    std::vector<GenerationRequest> requests;
    for (const int64_t n : {1, 5, 64, 65, 100}) requests.push_back(greedy(some_ids(e, n, uint32_t(n)), 40));
    const auto out = generate(e, requests);
    for (size_t i = 0; i < out.size(); ++i) {
      std::vector<int32_t> text = requests[i].prompt;
      text.insert(text.end(), out[i].tokens.begin(), out[i].tokens.end());
      const auto logits = score(e, text);
      for (size_t t = 0; t < out[i].tokens.size(); ++t) {
        const float* row = logits.data() + (requests[i].prompt.size() + t - 1) * V;
        const float best = *std::max_element(row, row + V);
        double size = 0;
        for (size_t v = 0; v < V; ++v) size = std::max(size, std::abs(double(row[v])));
        EXPECT_LE(best - row[out[i].tokens[t]], 3e-2 * size) << folder << " request " << i << " token " << t;
      }
    }
  }
}

TEST(CudaEngine, AFixedBatchMakesNeighboursIrrelevant) {
  KDA_NEEDS_CUDA();
  for (const Mixer mixer : {Mixer::kda, Mixer::full}) {
    const fs::path folder = folder_with(mixer);
    if (folder.empty()) GTEST_SKIP() << "no model folder";
    EngineOptions o = on_gpu();
    o.fixed_batch = 8;
    Engine e(folder, o);
    std::vector<GenerationRequest> requests;
    for (const int64_t n : {3, 17, 64, 70, 90}) {
      requests.push_back(greedy(some_ids(e, n, uint32_t(n)), 20));
      requests.back().params.do_sample = n != 17;
      requests.back().params.seed = uint64_t(n);
    }
    for (size_t i = 0; i < requests.size(); ++i) {
      // Prompts alone each time: what is compared is decoding. The sampler's sequence number is the place in the batch.
      std::vector<Session> alone, first;
      std::vector<GenerationRequest> one(requests.begin(), requests.begin() + int64_t(i) + 1);
      for (size_t j = 0; j + 1 < one.size(); ++j) one[j] = greedy(some_ids(e, 2 + int64_t(j), 77), 20);
      generate(e, one, {}, &alone);
      generate(e, requests, {}, &first);
      for (size_t l = 0; l < e.config().layers.size(); ++l)
        EXPECT_LE(relative_max(first[i].kda_state(int64_t(l)), alone[i].kda_state(int64_t(l))), 3e-2) << i;
    }
    // The same prompts, decoded with and without neighbours: the same bits.
    std::vector<Session> sessions;
    for (const GenerationRequest& r : requests) {
      sessions.emplace_back(e);
      const Prompt p{&sessions.back(), r.prompt};
      e.prefill({&p, 1});
    }
    std::vector<Session> others;
    for (const Session& s : sessions) others.push_back(s.fork());
    std::vector<Engine::Draw> together;
    for (size_t i = 0; i < sessions.size(); ++i) {
      sessions[i].push(1);
      others[i].push(1);
      together.push_back({&sessions[i], &requests[i].params, uint32_t(i)});
    }
    for (int step = 0; step < 12; ++step) {
      const auto a = e.step(together);
      for (size_t i = 0; i < others.size(); ++i) {
        const Engine::Draw d{&others[i], &requests[i].params, uint32_t(i)};
        EXPECT_EQ(e.step({&d, 1})[0].id, a[i].id) << folder << " step " << step << " sequence " << i;
      }
    }
    for (size_t i = 0; i < others.size(); ++i)
      for (size_t l = 0; l < e.config().layers.size(); ++l)
        EXPECT_EQ(others[i].kda_state(int64_t(l)), sessions[i].kda_state(int64_t(l)));
  }
}

TEST(CudaEngine, SaveRestoreContinueEqualsNeverStopped) {
  KDA_NEEDS_CUDA();
  const fs::path file = fs::path(testing::TempDir()) / "kda_cuda_session.safetensors";
  for (const Mixer mixer : {Mixer::kda, Mixer::full}) {
    const fs::path folder = folder_with(mixer);
    if (folder.empty()) GTEST_SKIP() << "no model folder";
    Engine e(folder, on_gpu());
    GenerationRequest r = greedy(some_ids(e, 70, 3), 24);
    r.params.do_sample = true;
    r.params.top_p = 0.9;
    r.params.seed = 11;
    const auto whole = generate(e, {r})[0].tokens;
    for (const double penalty : {1.0, 1.2}) {  // the device's sampler, and the host's
      r.params.repetition_penalty = penalty;
      const auto never = penalty == 1 ? whole : generate(e, {r})[0].tokens;
      GenerationRequest begin = r;
      begin.params.max_new_tokens = 9;
      std::vector<Session> stopped;
      auto tokens = generate(e, {begin}, {}, &stopped)[0].tokens;
      stopped[0].save(file);
      Engine other(folder, on_gpu());
      std::vector<Session> sessions;
      sessions.push_back(Session::restore(other, file));
      GenerationRequest rest = r;
      rest.prompt.clear();
      rest.params.max_new_tokens = 15;
      const auto more = generate(other, {rest}, {}, &sessions)[0].tokens;
      tokens.insert(tokens.end(), more.begin(), more.end());
      EXPECT_EQ(tokens, never) << folder;
    }
  }
  fs::remove(file);
}

TEST(CudaEngine, PiecesOfAPromptGiveTheSameLogitsUpToRounding) {
  KDA_NEEDS_CUDA();
  for (const Mixer mixer : {Mixer::kda, Mixer::full}) {
    const fs::path folder = folder_with(mixer);
    if (folder.empty()) GTEST_SKIP() << "no model folder";
    Engine e(folder, on_gpu());
    const auto ids = some_ids(e, 150, 9);
    const auto whole = score(e, ids);
    for (const size_t piece : {1, 17, 64, 100})
      EXPECT_LE(relative_l2(score(e, ids, piece), whole), 2e-2) << folder << piece;
  }
}

TEST(CudaEngine, EightBitWeightsStayClose) {
  KDA_NEEDS_CUDA();
  const fs::path folder = shared_path("nano-teacher");
  if (folder.empty()) GTEST_SKIP() << "needs ../shared/nano-teacher";
  Engine bf(folder, on_gpu());
  const auto ids = some_ids(bf, 100, 4);
  const auto want = score(bf, ids);
  for (const WeightKind kind : {WeightKind::int8, WeightKind::fp8}) {
    EngineOptions o = on_gpu();
    o.weights = kind;
    Engine e(folder, o);
    EXPECT_LE(relative_l2(score(e, ids), want), kind == WeightKind::int8 ? 3e-2 : 8e-2);
    EXPECT_LT(e.weights().decode_bytes(), bf.weights().decode_bytes() * 6 / 10);
  }
}

TEST(CudaEngine, RefusesWhatItCannotDo) {
  KDA_NEEDS_CUDA();
  const fs::path folder = folder_with(Mixer::kda);
  if (folder.empty()) GTEST_SKIP() << "no model folder";
  EngineOptions o = on_gpu();
  o.precision = Precision::exact;
  EXPECT_THROW(Engine(folder, o), Error);
  o = on_gpu();
  o.fixed_batch = 1;
  Engine e(folder, o);
  EXPECT_THROW(generate(e, {greedy({1, 2}, 3), greedy({1, 2}, 3)}), Error);
}

TEST(Device, WithoutAGpuTheErrorSaysSo) {
  if (no_cuda().empty()) GTEST_SKIP() << "a GPU answers here";
  EngineOptions o = on_gpu();
  try {
    Engine e(fs::path(KDA_SOURCE_DIR) / "assets/nano-student", o);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("device cuda: "), std::string::npos) << e.what();
  }
  o.device = DeviceKind::automatic;
  Engine e(fs::path(KDA_SOURCE_DIR) / "assets/nano-student", o);
  EXPECT_STREQ(e.backend().name, "cpu");
  o.weights = WeightKind::fp8;
  EXPECT_THROW(Engine(fs::path(KDA_SOURCE_DIR) / "assets/nano-student", o), Error);
}

}  // namespace
}  // namespace kda::test
