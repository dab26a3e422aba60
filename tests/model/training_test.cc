// The keeping forward pass and the backward pass: whole models' gradients against independent programs, and that
// neither threads, packing, checkpointing nor what is frozen changes them.
#include "model/training.h"

#include <gtest/gtest.h>

#include <random>

#include "model/transformer.h"
#include "tests/model/train_problem.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;

// A model with its text, and the file with its gradients.
struct Case {
  fs::path folder, gradients;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.folder; }

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const char* name : {"tiny-kda", "tiny-hybrid", "small-kda-bf16"})
    if (const fs::path p = golden_path(name); !p.empty()) out.push_back({p, p / "expected.safetensors"});
  const fs::path data = fs::path(KDA_SOURCE_DIR) / "tests/data", made = data / "training";
  for (const char* name : {"plain", "linear", "llama3rope", "yarn"})
    out.push_back({data / "llama" / name, made / (name + std::string(".safetensors"))});
  out.push_back({data / "fla/swiglu", made / "swiglu.safetensors"});
  out.push_back({fs::path(KDA_SOURCE_DIR) / "tests/golden/tiny-teacher", made / "tiny-teacher.safetensors"});
  return out;
}

std::string name_of(const testing::TestParamInfo<Case>& info) {
  std::string s = info.param.folder.filename().string();
  for (char& c : s)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return s;
}

std::vector<int32_t> random_ids(int64_t n, int64_t vocabulary, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> out(static_cast<size_t>(n));
  for (int32_t& id : out) id = int32_t(random() % uint32_t(vocabulary));
  return out;
}

// Of several lengths, empty ones first, between and last.
Text ragged(int64_t vocabulary) {
  Text out;
  out.add({});
  for (int64_t n : {5, 1, 33, 0, 2, 64, 17}) out.add(random_ids(n, vocabulary, uint32_t(n)));
  out.add({});
  return out;
}

class TrainingModel : public testing::TestWithParam<Case> {
 protected:
  TrainingModel()
      : checkpoint(load_checkpoint(GetParam().folder)), expected(GetParam().folder / "expected.safetensors") {}

  Parameters trainable(Context& ctx, const std::string& regex = ".") const {
    Parameters p(ctx, checkpoint);
    p.set_trainable(ctx, {{.regex = regex}});
    return p;
  }
  static TrainSizes sizes(const Text& t, bool recompute = false) {
    return {.rows = t.T(), .sequences = int64_t(t.start.size()) - 1, .recompute = recompute};
  }

  Checkpoint checkpoint;
  GoldenFile expected;
};

constexpr double kGolden = 1e-4;  // relative L2; two chains of fp32 sums through the depth of the model and back

TEST_P(TrainingModel, GradientsEqualIndependentOnes) {
  CpuContext ctx(2, Precision::exact);
  const GoldenFile want(GetParam().gradients);
  const Text text = golden_text(expected);
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), sizes(text));
  const Gradients got = loss_gradients(ctx, p, pass, text);
  const double loss = want["loss"].values().at(0);
  EXPECT_NEAR(got.loss, loss, 1e-5 * loss);
  int compared = 0;
  for (const auto& [name, t] : want.tensors) {
    if (!name.starts_with("grad.")) continue;
    ASSERT_TRUE(got.of.contains(name.substr(5))) << name;
    EXPECT_LE(relative_l2(got.of.at(name.substr(5)), t.values()), kGolden) << name;
    ++compared;
  }
  EXPECT_GE(compared, 13);
}

TEST_P(TrainingModel, OtherTextHasOtherGradients) {  // the comparison above can fail
  CpuContext ctx(2, Precision::exact);
  const GoldenFile want(GetParam().gradients);
  Text text = golden_text(expected);
  text.ids[3] = (text.ids[3] + 1) % int32_t(checkpoint.config.vocabulary);
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), sizes(text));
  const Gradients got = loss_gradients(ctx, p, pass, text);
  for (const auto& [name, g] : got.of)
    if (want.has("grad." + name)) {
      EXPECT_GT(relative_l2(g, want["grad." + name].values()), kGolden) << name;
    }
}

TEST_P(TrainingModel, ForwardEqualsTheInferencePass) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  const Weights w = arrange_weights(checkpoint);
  TrainPass pass(ctx, w, sizes(text));
  const int64_t D = w.config.width, T = text.T(), N = int64_t(text.start.size()) - 1;
  std::vector<std::vector<float>> memory;
  const auto taps = [&] {
    std::vector<Tap> out;
    memory.clear();
    for (int64_t l = -1; l < int64_t(w.layers.size()); ++l)
      for (TapPoint p : {TapPoint::mixer_in, TapPoint::mixer_out, TapPoint::layer_out}) {
        if (l < 0 && p != TapPoint::layer_out) continue;
        memory.emplace_back(size_t(T * D));
        out.push_back({l, p, {}});
      }
    for (size_t i = 0; i < out.size(); ++i) out[i].to = view(memory[i].data(), {T, D});
    return out;
  };
  pass.forward(ctx, text.view(), taps());
  const auto got = memory;

  Transformer model(w);
  StatePool states(ctx, w.config, N);
  states.reserve(ctx, N, 64);
  Buffers buffers = plan_buffers(ctx, w, T, T, 64);
  std::vector<int32_t> none(size_t(N), -1), slot(static_cast<size_t>(N)), zero(static_cast<size_t>(N));
  for (size_t n = 0; n < slot.size(); ++n) slot[n] = int32_t(n);
  model.prefill(ctx, buffers, states,
                {.ids = text.ids, .start = text.start, .slot_in = none, .slot_out = slot, .past = zero}, taps());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(relative_max(got[i], memory[i]), 1e-5) << "tap " << i;
}

TEST_P(TrainingModel, ThreadsAndCheckpointingChangeNoBit) {
  const Text text = ragged(checkpoint.config.vocabulary);
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    Gradients first;
    for (int threads : {1, 2, 3})
      for (bool recompute : {false, true}) {
        CpuContext ctx(threads, precision);
        Parameters p = trainable(ctx);
        TrainPass pass(ctx, p.weights(), sizes(text, recompute));
        for (int round = 0; round < 2; ++round) {  // the second finds the memory as the first left it
          Gradients got = loss_gradients(ctx, p, pass, text);
          if (first.of.empty()) first = got;
          EXPECT_EQ(got.of, first.of) << threads << " threads, recompute " << recompute << ", round " << round;
        }
      }
  }
}

TEST_P(TrainingModel, FastStaysNearExact) {
  const Text text = golden_text(expected);
  Gradients by[2];
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    CpuContext ctx(2, precision);
    Parameters p = trainable(ctx);
    TrainPass pass(ctx, p.weights(), sizes(text));
    by[precision == Precision::fast] = loss_gradients(ctx, p, pass, text);
  }
  // Operands in bf16 are off by 2^-9 each, and these small random models turn that into up to a sixth of their
  // gradient.
  double error = 0, norm = 0;
  for (const auto& [name, exact] : by[0].of)
    for (size_t i = 0; i < exact.size(); ++i) {
      const double d = double(by[1].of.at(name)[i]) - double(exact[i]);
      error += d * d;
      norm += double(exact[i]) * double(exact[i]);
    }
  EXPECT_LE(std::sqrt(error / norm), 0.25);
}

TEST_P(TrainingModel, APackIsTheSumOfItsSequences) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), sizes(text));
  const Gradients whole = loss_gradients(ctx, p, pass, text, 0.01);
  std::map<std::string, std::vector<double>> sum;
  for (size_t n = 0; n + 1 < text.start.size(); ++n) {
    Text one;
    one.add(std::span(text.ids).subspan(size_t(text.start[n]), size_t(text.start[n + 1] - text.start[n])));
    for (const auto& [name, g] : loss_gradients(ctx, p, pass, one, 0.01).of) {
      auto& to = sum[name];
      to.resize(g.size());
      for (size_t i = 0; i < g.size(); ++i) to[i] += double(g[i]);
    }
  }
  for (const auto& [name, g] : whole.of) EXPECT_LE(relative_l2(g, sum.at(name)), 1e-5) << name;
}

TEST_P(TrainingModel, GradientsAreAddedTo) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), sizes(text));
  const Gradients once = loss_gradients(ctx, p, pass, text);
  const View x = pass.forward(ctx, text.view());
  HeadLoss head = head_loss(p.weights(), x, text, 1 / double(text.T() - int64_t(text.start.size()) + 1));
  pass.backward(ctx, view(head.d_x.data(), x.shape), {}, p.gradients());
  const Gradients twice = fetch_gradients(p);
  for (const auto& [name, g] : once.of) {
    if (name == "model.norm.weight" || name == "lm_head.weight" || p.weights().config.tied_head) continue;
    std::vector<double> want(g.begin(), g.end());
    for (double& v : want) v *= 2;
    EXPECT_LE(relative_l2(twice.of.at(name), want), 1e-5) << name;
  }
}

TEST_P(TrainingModel, WhatIsFrozenChangesNothingElse) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  Parameters all = trainable(ctx);
  TrainPass pass(ctx, all.weights(), sizes(text));
  const Gradients whole = loss_gradients(ctx, all, pass, text);
  std::vector<std::string> sets = {"layers\\.1\\.",      "self_attn",           "mlp\\.down_proj", "o_proj",
                                   "input_layernorm",    "layers\\.1.*k_proj",  "embed_tokens",    "post_attention",
                                   "layers\\.0.*o_proj", "layers\\.0.*up_proj", "model\\.norm"};
  for (const std::string& regex : sets)
    for (bool recompute : {false, true}) {
      Parameters p = trainable(ctx, regex);
      TrainPass some(ctx, p.weights(), sizes(text, recompute));
      const Gradients got = loss_gradients(ctx, p, some, text);
      ASSERT_FALSE(got.of.empty()) << regex;
      for (const auto& [name, g] : got.of) {
        // One product of several matrices may sum otherwise than one of a few.
        EXPECT_LE(relative_l2(g, whole.of.at(name)), 1e-6) << regex << ": " << name;
      }
    }
}

TEST_P(TrainingModel, NothingBelowTheLowestGradientIsComputed) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  Parameters p = trainable(ctx, "layers\\.1\\.mlp\\.up_proj");
  Weights w = p.weights();
  TrainPass pass(ctx, w, sizes(text));
  const View x = pass.forward(ctx, text.view());
  // From here on, whoever goes through layer 1's mixer or below it meets NaNs.
  const auto poison = [](Tensor& t) {
    const Shape s = t.shape();
    t = host_tensor(Dtype::f32, s);
    std::fill_n(t.v.as<float>(), s.size(), std::numeric_limits<float>::quiet_NaN());
  };
  poison(w.layers[1].mixer_norm);
  poison(w.layers[1].full.o.w ? w.layers[1].full.o.w : w.layers[1].kda.o.w);
  poison(w.layers[0].mlp.down.w);
  std::vector<float> d_x = values("d_x", x.size());
  pass.backward(ctx, view(d_x.data(), x.shape), {}, p.gradients());
  for (float v : d_x) ASSERT_FALSE(std::isnan(v));
  for (const auto& [name, g] : fetch_gradients(p).of)
    for (float v : g) ASSERT_FALSE(std::isnan(v)) << name;
}

TEST_P(TrainingModel, CotangentsOfLayersEqualAShorterModel) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  const int64_t D = checkpoint.config.width, T = text.T();
  const std::vector<float> c = values("cotangent", T * D);
  for (int64_t l = -1; l < 2; ++l) {
    Parameters p = trainable(ctx), q = trainable(ctx);
    Weights shorter = q.weights();
    shorter.layers.resize(size_t(l + 1));
    Weights gradients = q.gradients();
    gradients.layers.resize(size_t(l + 1));
    TrainPass a(ctx, p.weights(), sizes(text, true)), b(ctx, shorter, sizes(text));
    a.forward(ctx, text.view());
    b.forward(ctx, text.view());
    std::vector<float> zero(c.size()), d_x = c;
    const Cotangent cotangent{l, TapPoint::layer_out, view(c.data(), {T, D})};
    a.backward(ctx, view(zero.data(), {T, D}), {&cotangent, 1}, p.gradients());
    b.backward(ctx, view(d_x.data(), {T, D}), {}, gradients);
    const Gradients got = fetch_gradients(p), want = fetch_gradients(q);
    for (const auto& [name, g] : want.of) EXPECT_EQ(got.of.at(name), g) << name << ", layer " << l;
  }
}

// A mixer alone, on the input that the whole pass gave it: same output, same gradients of its weights. And the
// cotangent of a mixer's output goes on below it: a step of the embedding against the difference it makes.
TEST_P(TrainingModel, MixersAlone) {
  CpuContext ctx(2, Precision::exact);
  const Text text = ragged(checkpoint.config.vocabulary);
  const int64_t D = checkpoint.config.width, T = text.T();
  const std::vector<float> c = values("cotangent", T * D);
  for (int64_t l = 0; l < int64_t(checkpoint.config.layers.size()); ++l) {
    Parameters p = trainable(ctx), q = trainable(ctx);
    TrainSizes only = sizes(text);
    only.mixers_only = true;
    TrainPass whole(ctx, p.weights(), sizes(text)), alone(ctx, q.weights(), only);
    std::vector<float> in(c.size()), out(c.size()), again(c.size()), zero(c.size());
    const std::vector<Tap> taps = {{l, TapPoint::mixer_in, view(in.data(), {T, D})},
                                   {l, TapPoint::mixer_out, view(out.data(), {T, D})}};
    whole.forward(ctx, text.view(), taps);
    const Cotangent cotangent{l, TapPoint::mixer_out, view(c.data(), {T, D})};
    whole.backward(ctx, view(zero.data(), {T, D}), {&cotangent, 1}, p.gradients());
    const ConstView given = view(std::as_const(in).data(), {T, D});
    alone.mixer_forward(ctx, text.view(), size_t(l), given, view(again.data(), {T, D}));
    alone.mixer_backward(ctx, view(c.data(), {T, D}), q.gradients());
    EXPECT_EQ(again, out);
    const Gradients got = fetch_gradients(q), want = fetch_gradients(p);
    const std::string mixer = cat("layers.", l, ".self_attn");
    for (const auto& [name, g] : got.of) {
      if (name.find(mixer) != std::string::npos)
        EXPECT_EQ(g, want.of.at(name)) << name;
      else
        EXPECT_EQ(std::count(g.begin(), g.end(), 0.0f), int64_t(g.size())) << name;
    }

    // d/ds of sum c . out along the embedding's gradient, by a central difference
    const std::string embedding = "model.embed_tokens.weight";
    const std::vector<float>& direction = want.of.at(embedding);
    Tensor& table = p.all().front().master;
    double square = 0, size = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      square += double(direction[i]) * double(direction[i]);
      size += double(table.v.as<float>()[i]) * double(table.v.as<float>()[i]);
    }
    const double step = 3e-5 * std::sqrt(size / square);
    const std::vector<float> before(table.v.as<float>(), table.v.as<float>() + direction.size());
    double sums[2] = {};
    for (int side : {0, 1}) {
      for (size_t i = 0; i < direction.size(); ++i)
        table.v.as<float>()[i] = before[i] + float((side ? step : -step) * double(direction[i]));
      whole.forward(ctx, text.view(), taps);
      for (size_t i = 0; i < c.size(); ++i) sums[side] += double(c[i]) * double(out[i]);
    }
    EXPECT_NEAR((sums[1] - sums[0]) / (2 * step) / square, 1, 5e-3) << "layer " << l;
  }
}

TEST_P(TrainingModel, AllEmptyTextIsNothing) {
  CpuContext ctx(2, Precision::exact);
  Text text;
  text.add({});
  text.add({});
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), {.rows = 8, .sequences = 2});
  const View x = pass.forward(ctx, text.view());
  EXPECT_EQ(x.shape, Shape({0, checkpoint.config.width}));
  float nothing = 0;
  pass.backward(ctx, {&nothing, Dtype::f32, x.shape}, {}, p.gradients());
  for (const auto& [name, g] : fetch_gradients(p).of)
    EXPECT_EQ(std::count(g.begin(), g.end(), 0.0f), int64_t(g.size())) << name;
}

int64_t allocated_bytes = 0;

TEST_P(TrainingModel, ThePlanIsWhatIsAllocated) {
  CpuContext ctx(2, Precision::exact);
  const Weights w = arrange_weights(checkpoint);
  Backend counting = cpu_backend();
  counting.alloc = [](Dtype d, Shape s) {
    allocated_bytes += s.size() * int64_t(size_of(d));
    return host_tensor(d, s);
  };
  ctx.backend = &counting;
  for (int64_t rows : {1, 63, 200})
    for (bool recompute : {false, true})
      for (bool mixers_only : {false, true}) {
        const TrainSizes s{.rows = rows, .sequences = 3, .recompute = recompute, .mixers_only = mixers_only};
        allocated_bytes = 0;
        const TrainPass pass(ctx, w, s);
        EXPECT_EQ(TrainPass::plan(ctx, w, s).total(), allocated_bytes) << rows << recompute << mixers_only;
      }
}

TEST_P(TrainingModel, Refusals) {
  CpuContext ctx(2, Precision::exact);
  Parameters p = trainable(ctx);
  TrainPass pass(ctx, p.weights(), {.rows = 8, .sequences = 1});
  const std::vector<int32_t> ids{1, 2, 3}, two{0, 1, 3}, one{0, 3}, falling{0, 5, 3}, wrong{1, 2, 99999};
  std::vector<float> d(3 * size_t(checkpoint.config.width));
  const View d_x = view(d.data(), {3, checkpoint.config.width});
  EXPECT_THROW(pass.backward(ctx, d_x, {}, p.gradients()), Error);
  EXPECT_THROW(pass.forward(ctx, {ids, two}), Error);
  EXPECT_THROW(pass.forward(ctx, {ids, falling}), Error);
  EXPECT_THROW(pass.forward(ctx, {wrong, one}), Error);
  pass.forward(ctx, {ids, one});
  EXPECT_THROW(pass.backward(ctx, view(d.data(), {2, checkpoint.config.width}), {}, p.gradients()), Error);
  pass.backward(ctx, d_x, {}, p.gradients());
  EXPECT_THROW(pass.backward(ctx, d_x, {}, p.gradients()), Error);
  EXPECT_THROW(pass.mixer_backward(ctx, d_x, p.gradients()), Error);
  EXPECT_THROW(TrainPass(ctx, p.weights(), {.rows = 0}), Error);
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TrainingModel);
INSTANTIATE_TEST_SUITE_P(Models, TrainingModel, testing::ValuesIn(cases()), name_of);

}  // namespace
}  // namespace kda::test
