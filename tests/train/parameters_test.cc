#include "train/parameters.h"

#include <gtest/gtest.h>

#include "checkpoint/random.h"
#include "checkpoint/tensor_table.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/model/train_problem.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;

const fs::path kData = fs::path(KDA_SOURCE_DIR) / "tests/data";

Parameter& find(Parameters& p, const std::string& name) {
  for (Parameter& q : p.all())
    if (q.name == name) return q;
  throw std::runtime_error("no parameter " + name);
}

// The tensor of that name among weights or gradients.
Tensor among(Weights& w, const std::string& name) {
  Tensor out;
  each_parameter(w, [&](const std::string& n, Tensor& t) {
    if (n == name) out = t;
  });
  return out;
}

TEST(Parameters, EachParameterIsTheTensorTable) {
  CpuContext ctx;
  std::vector<fs::path> folders = {kData / "llama/plain", kData / "llama/linear", kData / "llama/llama3rope",
                                   kData / "llama/yarn", kData / "fla/swiglu"};
  TempFolder temporary;
  for (const char* name : {"tiny", "tiny-kda", "tiny-hybrid"}) {
    write_random_checkpoint(temporary / name, named_model(name), {}, *ctx.pool);
    folders.push_back(temporary / name);
  }
  for (const fs::path& folder : folders) {
    const Checkpoint c = load_checkpoint(folder);
    Weights w = arrange_weights(c);
    std::vector<std::pair<std::string, Shape>> got, want;
    each_parameter(w, [&](const std::string& name, Tensor& t) { got.emplace_back(name, t.shape()); });
    for (const TensorSpec& t : tensor_table(c.config)) want.emplace_back(t.name, t.shape);
    std::sort(got.begin(), got.end(), [](auto& a, auto& b) { return a.first < b.first; });
    std::sort(want.begin(), want.end(), [](auto& a, auto& b) { return a.first < b.first; });
    EXPECT_EQ(got, want) << folder;
  }
}

TEST(Parameters, NothingIsCopiedUntilItIsTrained) {
  CpuContext ctx(1, Precision::fast);
  const Checkpoint c = load_checkpoint(kData / "llama/plain");
  Parameters p(ctx, c);
  EXPECT_EQ(p.bytes(), 0);
  EXPECT_EQ(p.count(), 0);
  each_parameter(p.weights(),
                 [&](const std::string& name, Tensor& t) { EXPECT_EQ(t.v.data, c.at(name).v.data) << name; });
  p.set_trainable(ctx, {{.regex = "layers\\.1\\.self_attn"}});
  Weights teacher = arrange_weights(c);
  each_parameter(p.weights(), [&](const std::string& name, Tensor& t) {
    const bool trained = name.find("layers.1.self_attn") != std::string::npos;
    EXPECT_EQ(t.v.data != among(teacher, name).v.data, trained) << name;
    EXPECT_EQ(bool(among(p.gradients(), name)), trained) << name;
  });
  EXPECT_EQ(p.count(), 4 * 48 * 48);
  EXPECT_EQ(p.bytes(), p.count() * (4 * 4 + 2));
}

TEST(Parameters, RulesInOrder) {
  CpuContext ctx;
  const Checkpoint c = load_checkpoint(kData / "llama/linear");
  Parameters p(ctx, c);
  p.set_trainable(ctx, {{.regex = "^model\\.layers\\.0\\.", .trainable = false},
                        {.regex = "self_attn", .lr = 0.5, .decay = 0.25},
                        {.regex = "layers", .lr = 0.125}});
  for (const Parameter& q : p.all()) {
    const bool first = q.name.find("layers.0.") != std::string::npos;
    const bool layer = q.name.find("layers") != std::string::npos;
    const bool attention = q.name.find("self_attn") != std::string::npos;
    EXPECT_EQ(q.trainable, layer && !first) << q.name;
    if (!q.trainable) continue;
    EXPECT_EQ(q.lr, attention ? 0.5 : 0.125) << q.name;
    EXPECT_EQ(q.decay, attention ? 0.25 : -1) << q.name;
  }
  EXPECT_THROW(p.set_trainable(ctx, {{.regex = "layers"}, {.regex = "no_such_thing"}}), Error);
  EXPECT_THROW(p.set_trainable(ctx, {{.regex = "(unclosed"}}), Error);
}

struct Double {
  std::vector<double> p, m, v;
};

// AdamW as torch.optim has it, in double.
void adamw(Double& d, const std::vector<double>& g, double lr, double decay, const AdamWSettings& s, int step,
           double scale) {
  d.m.resize(g.size());
  d.v.resize(g.size());
  for (size_t i = 0; i < g.size(); ++i) {
    const double x = g[i] * scale;
    d.p[i] *= 1 - lr * decay;
    d.m[i] = s.beta1 * d.m[i] + (1 - s.beta1) * x;
    d.v[i] = s.beta2 * d.v[i] + (1 - s.beta2) * x * x;
    d.p[i] -=
        lr * (d.m[i] / (1 - std::pow(s.beta1, step))) / (std::sqrt(d.v[i] / (1 - std::pow(s.beta2, step))) + s.eps);
  }
}

TEST(Parameters, StepsAreAdamW) {
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    CpuContext ctx(2, precision);
    const Checkpoint c = load_checkpoint(kData / "fla/swiglu");
    Parameters p(ctx, c);
    p.set_trainable(ctx, {{.regex = "q_proj", .lr = 2e-3}, {.regex = "A_log", .decay = 0.5}, {.regex = "."}});
    std::map<std::string, Double> want;
    for (const Parameter& q : p.all()) want[q.name].p = doubles(q.stored);
    for (int step = 1; step <= 3; ++step) {
      const AdamWSettings s{
          .lr = 1e-3, .beta2 = 0.95, .decay = 0.1, .lr_scale = 1.0 / step, .clip_norm = step == 2 ? 0 : 1.5};
      p.zero_gradients(ctx);
      double square = 0;
      std::map<std::string, std::vector<double>> gradients;
      for (Parameter& q : p.all()) {
        const auto g = values(cat(q.name, step), q.grad.shape().size(), 0.1f);
        std::copy(g.begin(), g.end(), q.grad.v.as<float>());
        gradients[q.name] = {g.begin(), g.end()};
        for (float x : g) square += double(x) * double(x);
      }
      const double norm = p.gradient_norm(ctx);
      EXPECT_NEAR(norm, std::sqrt(square), 1e-6 * norm);
      const double scale = s.clip_norm > 0 && norm > s.clip_norm ? s.clip_norm / norm : 1;
      EXPECT_EQ(scale < 1, step != 2);
      p.step(ctx, s, step, norm);
      for (const Parameter& q : p.all()) {
        const bool rate = q.name.find("q_proj") != std::string::npos, log = q.name.find("A_log") != std::string::npos;
        const double decay = log                                                                      ? 0.5
                             : q.stored.shape().rank == 2 && q.name.find("conv") == std::string::npos ? 0.1
                                                                                                      : 0;
        adamw(want[q.name], gradients[q.name], (rate ? 2e-3 : 1e-3) / step, decay, s, step, scale);
        // Each step moves a number by about lr, known to a few epsilon; the numbers themselves are below 4.
        EXPECT_LE(relative_l2(doubles(q.master), want[q.name].p), 1e-6) << q.name << ", step " << step;
        EXPECT_EQ(bool(q.working), precision == Precision::fast && q.stored.shape().rank == 2 &&
                                       q.name.find("conv") == std::string::npos)
            << q.name;
        const Tensor used = among(p.weights(), q.name);
        EXPECT_EQ(used.v.data, q.working ? q.working.v.data : q.master.v.data) << q.name;
        for (int64_t i = 0; q.working && i < q.working.shape().size(); ++i)
          ASSERT_EQ(q.working.v.as<bf16>()[i].bits, bf16(q.master.v.as<float>()[i]).bits) << q.name;
      }
    }
    std::vector<double> other = want["lm_head.weight"].p;  // the comparison can fail
    for (double& x : other) x += 1e-4;
    EXPECT_GT(relative_l2(doubles(find(p, "lm_head.weight").master), other), 1e-6);
  }
}

TEST(Parameters, ATiedHeadIsTheEmbedding) {
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    CpuContext ctx(1, precision);
    const Checkpoint c = load_checkpoint(kData / "llama/linear");
    Parameters p(ctx, c);
    const auto tied = [&] {
      return p.weights().head.w.v.data == p.weights().embedding.v.data &&
             p.gradients().head.w.v.data == p.gradients().embedding.v.data;
    };
    EXPECT_TRUE(tied());
    p.set_trainable(ctx, {{.regex = "embed"}});
    EXPECT_TRUE(tied());
    EXPECT_TRUE(p.gradients().head.w);
    p.set_trainable(ctx, {{.regex = "self_attn"}});
    EXPECT_TRUE(tied());
    EXPECT_FALSE(p.gradients().head.w);
  }
}

TEST(Parameters, StagesKeepWhatWasLearned) {
  for (const Precision precision : {Precision::exact, Precision::fast}) {
    CpuContext ctx(2, precision);
    const Checkpoint c = load_checkpoint(kData / "fla/swiglu");
    Parameters p(ctx, c);
    const std::string name = "model.layers.0.self_attn.o_proj.weight", other = "model.layers.1.mlp.up_proj.weight";
    p.set_trainable(ctx, {{.regex = "layers\\.0\\.self_attn"}});
    Parameter& q = find(p, name);
    std::fill_n(q.grad.v.as<float>(), q.grad.shape().size(), 1.0f);
    const double first = q.master.v.as<float>()[0];
    p.step(ctx, {.lr = 0.01}, 1, 0);
    const auto learned = doubles(q.master), moment = doubles(q.m);
    EXPECT_NEAR(learned[0], first - 0.01, 1e-6);
    p.set_trainable(ctx, {{.regex = "layers\\.1\\.mlp"}});
    EXPECT_FALSE(q.grad);
    EXPECT_FALSE(among(p.gradients(), name));
    EXPECT_TRUE(among(p.gradients(), other));
    EXPECT_EQ(among(p.weights(), name).v.data, q.working ? q.working.v.data : q.master.v.data);
    p.step(ctx, {.lr = 0.01, .decay = 0.1}, 2, 0);
    EXPECT_EQ(doubles(q.master), learned);
    EXPECT_EQ(doubles(p.values().at(name)), learned);
    p.set_trainable(ctx, {{.regex = "."}});
    EXPECT_EQ(doubles(q.master), learned);
    EXPECT_EQ(doubles(q.m), moment);
    for (double g : doubles(q.grad)) ASSERT_EQ(g, 0);
  }
}

TEST(Parameters, ValuesAndRefresh) {
  CpuContext ctx(1, Precision::fast);
  const Checkpoint c = load_checkpoint(kData / "fla/swiglu");
  Parameters p(ctx, c);
  p.set_trainable(ctx, {{.regex = "mlp"}});
  for (const auto& [name, v] : p.values()) EXPECT_EQ(doubles(v), doubles(c.at(name))) << name;
  Parameter& q = find(p, "model.layers.2.mlp.gate_proj.weight");
  q.master.v.as<float>()[7] = 3.14159f;
  p.refresh(ctx);
  EXPECT_EQ(q.working.v.as<bf16>()[7].bits, bf16(3.14159f).bits);
}

}  // namespace
}  // namespace kda::test
