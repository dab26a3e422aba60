// A teacher turned into a student: what is copied, what is repeated, what is measured, what is refused.
#include "train/convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "checkpoint/random.h"
#include "model/transformer.h"
#include "tests/check.h"
#include "tests/checkpoint/errors.h"
#include "tests/golden.h"
#include "tests/ref/attention.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kNano = fs::path(KDA_SOURCE_DIR) / "assets/nano-teacher";
const std::map<int64_t, LayerCalibration> kNone;

std::vector<std::vector<int32_t>> some_text(int64_t sequences, int64_t length, int32_t vocabulary) {
  std::vector<std::vector<int32_t>> out;
  for (int64_t n = 0; n < sequences; ++n) {
    out.emplace_back();
    for (float x : values("ids" + std::to_string(n), length))
      out.back().push_back(int32_t((x + 1) / 2 * float(vocabulary)));
  }
  return out;
}

class Convert : public testing::Test {
 protected:
  fs::path write(const Checkpoint& teacher, const ConvertOptions& o,
                 const std::map<int64_t, LayerCalibration>& calibration = kNone, Dtype stored = Dtype::bf16) {
    const fs::path out = temp / cat("student", count++);
    const ModelConfig student = student_config(teacher.config, o);
    write_model_folder(out, student, student_weights(teacher, student, o, calibration), {.stored = stored},
                       teacher.folder, student_card(teacher, student, o, 0));
    return out;
  }
  TempFolder temp;
  int count = 0;
};

TEST_F(Convert, WhatCanBeCopiedIsCopiedBitForBit) {
  const Checkpoint teacher = load_checkpoint(kNano);
  const fs::path out = write(teacher, {.kda = "all"});
  const GoldenFile was(kNano), is(out / "model.safetensors");
  int grouped = 0;
  for (const auto& [name, t] : was.tensors) {
    ASSERT_TRUE(is.has(name)) << name;
    const GoldenTensor& s = is[name];
    EXPECT_EQ(s.dtype, t.dtype) << name;
    if (name.find("k_proj") == std::string::npos && name.find("v_proj") == std::string::npos) {
      EXPECT_EQ(s.shape, t.shape) << name;
      EXPECT_TRUE(s.bytes == t.bytes) << name;
      continue;
    }
    // query heads 0 and 1 read head 0, heads 2 and 3 head 1
    ++grouped;
    const std::string first = t.bytes.substr(0, t.bytes.size() / 2), second = t.bytes.substr(t.bytes.size() / 2);
    EXPECT_EQ(s.shape, (std::vector<int64_t>{256, 256}));
    EXPECT_TRUE(s.bytes == first + first + second + second) << name;
  }
  EXPECT_EQ(grouped, 16);
  const json config = json::parse(read_bytes(out / "config.json"));
  EXPECT_EQ(config["model_type"], "arcee_kda");
  EXPECT_EQ(config["architectures"], json{"ArceeKDAForCausalLM"});
  EXPECT_EQ(config["layer_types"], json(std::vector<std::string>(8, "linear_attention")));
  EXPECT_EQ(config["initializer_range"], 0.02);
  EXPECT_FALSE(config.contains("lower_bound"));
  EXPECT_EQ(read_bytes(out / "tokenizer.json"), read_bytes(kNano / "tokenizer.json"));
  EXPECT_NE(read_bytes(out / "README.md").find("| KDA layers | 0, 1, 2, 3, 4, 5, 6, 7 |"), std::string::npos);
  EXPECT_EQ(load_checkpoint(out).config.model_type, "arcee_kda");
}

TEST_F(Convert, HybridsAndLists) {
  const Checkpoint teacher = load_checkpoint(kNano);
  const auto layers = [&](const ConvertOptions& o) { return load_checkpoint(write(teacher, o)).config.layers; };
  const auto is_full = [](const LayerSpec& s, bool rope) { return s.mixer == Mixer::full && s.rope == rope; };
  const auto hybrid = layers({.kda = "hybrid:3:1"});
  for (size_t l = 0; l < 8; ++l) {
    if (l % 4 == 3)
      EXPECT_TRUE(is_full(hybrid[l], false)) << l;
    else
      EXPECT_TRUE(hybrid[l].mixer == Mixer::kda && hybrid[l].kda_heads == 4 && hybrid[l].K == 64 && hybrid[l].V == 64);
  }
  EXPECT_TRUE(is_full(layers({.kda = "hybrid:3:1", .keep_positions = true})[7], true));
  const auto list = layers({.kda = "0,2-3"});
  for (size_t l : {0u, 2u, 3u}) EXPECT_TRUE(list[l].mixer == Mixer::kda) << l;
  for (size_t l : {1u, 4u, 7u}) EXPECT_TRUE(is_full(list[l], true)) << l;
  EXPECT_TRUE(is_full(layers({.kda = "0", .keep_positions = false})[1], false));
  const auto bounded = layers({.kda = "0-6", .bounded_gate = true, .lower_bound = -3});
  EXPECT_TRUE(bounded[4].bounded_gate && bounded[4].lower_bound == -3);

  // The rest of a hybrid, later; with the same gate only.
  const Checkpoint half = load_checkpoint(write(teacher, {.kda = "hybrid:1:1"}));
  const auto all = load_checkpoint(write(half, {.kda = "1,3,5,7"})).config.layers;
  for (const LayerSpec& s : all) EXPECT_TRUE(s.mixer == Mixer::kda);
  EXPECT_TRUE(fails_with("layer 0 is KDA already", [&] { student_config(half.config, {.kda = "all"}); }));
  EXPECT_TRUE(fails_with("one kind of gate", [&] { student_config(half.config, {.kda = "1", .bounded_gate = true}); }));
}

TEST_F(Convert, FlaStartsAsFlaDoes) {
  const Checkpoint teacher = load_checkpoint(kNano);
  const ConvertOptions o{.kda = "all", .seed = 7};
  const GoldenFile a(write(teacher, o) / "model.safetensors"), b(write(teacher, o) / "model.safetensors"),
      c(write(teacher, {.kda = "all", .seed = 8}) / "model.safetensors");
  const auto range = [&](const std::string& part, double low, double high, double mean, double slack) {
    double sum = 0, n = 0;
    for (int l = 0; l < 8; ++l) {
      const std::string name = cat("model.layers.", l, ".self_attn.", part);
      EXPECT_TRUE(a[name].bytes == b[name].bytes) << name;
      if (high > low) {
        EXPECT_FALSE(a[name].bytes == c[name].bytes) << name;
      }
      for (double x : a[name].values()) {
        EXPECT_GE(x, low) << name;
        EXPECT_LE(x, high) << name;
        sum += x, ++n;
      }
    }
    EXPECT_NEAR(sum / n, mean, slack) << part;
  };
  range("q_conv1d.weight", -0.5, 0.5, 0, 0.02);
  range("f_proj.0.weight", -1 / 16., 1 / 16., 0, 0.001);
  range("g_proj.1.weight", -1 / 8., 1 / 8., 0, 0.001);
  range("b_proj.weight", -1 / 16., 1 / 16., 0, 0.004);
  range("g_proj.1.bias", 0, 0, 0, 0);
  range("o_norm.weight", 1, 1, 1, 0);
  range("A_log", 0, std::log(16.), std::log(16.) * 16 / 15 - 1, 0.5);
  EXPECT_EQ(a["model.layers.0.self_attn.A_log"].dtype, "F32");
  // softplus(dt_bias) lies in [0.001, 0.1], evenly in its logarithm
  double sum = 0, n = 0;
  for (double x : a["model.layers.3.self_attn.dt_bias"].values()) {
    const double step = std::log(std::log1p(std::exp(x)));
    EXPECT_GE(step, std::log(0.001) - 1e-4);
    EXPECT_LE(step, std::log(0.1) + 1e-4);
    sum += step, ++n;
  }
  EXPECT_NEAR(sum / n, std::log(0.01), 0.3);
}

// The inputs of every mixer, by the model itself.
std::vector<std::vector<float>> mixer_inputs(Context& ctx, const Weights& w, const std::vector<int32_t>& ids) {
  const int64_t T = int64_t(ids.size()), D = w.config.width;
  const Transformer model(w);
  StatePool pool(ctx, w.config, 1);
  pool.reserve(ctx, 1, T);
  Buffers buffers = plan_buffers(ctx, w, T, T, pool.capacity());
  std::vector<std::vector<float>> x(w.layers.size(), std::vector<float>(size_t(T * D)));
  std::vector<Tap> taps;
  for (size_t l = 0; l < x.size(); ++l) taps.push_back({int64_t(l), TapPoint::mixer_in, view(x[l].data(), {T, D})});
  const int32_t start[] = {0, int32_t(T)}, in[] = {-1}, out[] = {0}, past[] = {0};
  model.prefill(ctx, buffers, pool, {ids, start, in, out, past}, taps);
  return x;
}

// Attention of every head in doubles, straight from the stored weights, rotated as transformers does.
TEST_F(Convert, MeasuresAttention) {
  CpuContext ctx;
  const Checkpoint teacher = load_checkpoint(kNano);
  const Weights w = arrange_weights(teacher);
  const int64_t T = 96, H = 4, G = 2, d = 64, D = 256;
  const auto text = some_text(1, T, 4096);
  std::vector<bool> layers(8);
  layers[1] = layers[5] = true;
  const auto found = calibrate(ctx, w, layers, text, {});
  ASSERT_EQ(found.size(), 2u);
  const auto inputs = mixer_inputs(ctx, w, text[0]);
  const GoldenFile file(kNano);
  for (const auto& [l, c] : found) {
    const std::vector<float>& x = inputs[size_t(l)];
    const auto project = [&](const char* part, int64_t heads, bool rotate) {
      const auto m = file[cat("model.layers.", l, ".self_attn.", part, "_proj.weight")].values();
      std::vector<double> y(size_t(T * heads * d));
      for (int64_t t = 0; t < T; ++t)
        for (int64_t r = 0; r < heads * d; ++r)
          for (int64_t i = 0; i < D; ++i) y[size_t(t * heads * d + r)] += m[size_t(r * D + i)] * x[size_t(t * D + i)];
      for (int64_t t = 0; rotate && t < T; ++t)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t i = 0; i < d / 2; ++i) {
            double &a = y[size_t((t * heads + h) * d + i)], &b = y[size_t((t * heads + h) * d + i + d / 2)];
            const double angle = double(t) * std::pow(10000., -2. * double(i) / double(d)), a0 = a, b0 = b;
            a = a0 * std::cos(angle) - b0 * std::sin(angle);
            b = b0 * std::cos(angle) + a0 * std::sin(angle);
          }
      return y;
    };
    const auto q = project("q", H, true), k = project("k", G, true);
    std::vector<double> mean(size_t(D), 0);
    for (int64_t i = 0; i < T * D; ++i) mean[size_t(i % D)] += double(x[size_t(i)]) / double(T);
    for (int64_t h = 0; h < H; ++h) {
      double distance = 0, typical = 0, entropy = 0, queries = 0;
      for (int64_t t = 63; t < T; t += 8, ++queries) {
        std::vector<double> p;
        double all = 0, far = 0, far_log = 0, even = 0;
        for (int64_t i = 0; i <= t; ++i) {
          double s = 0;
          for (int64_t j = 0; j < d; ++j) s += q[size_t((t * H + h) * d + j)] * k[size_t((i * G + h / 2) * d + j)];
          p.push_back(std::exp(s / 8));
          all += p.back();
        }
        for (int64_t i = 0; i <= t; ++i) {
          const double weight = p[size_t(i)] / all;
          even -= weight * std::log(weight);
          if (i == 0) continue;
          far += weight / (1 - p[0] / all) * double(t - i);
          far_log += weight / (1 - p[0] / all) * std::log(double(t - i + 1));
        }
        distance += far;
        typical += far_log;
        entropy += even / std::log(double(t + 1));
      }
      const double want = distance / queries;
      EXPECT_NEAR(c.distance[size_t(h)], want, 1e-3 * want) << l << " " << h;
      typical = std::exp(typical / queries);
      EXPECT_NEAR(c.typical[size_t(h)], typical, 1e-3 * typical) << l << " " << h;
      EXPECT_NEAR(c.entropy[size_t(h)], entropy / queries, 1e-4) << l << " " << h;
      // Half-lives: one radian of the channel's rotation (channels i and i + d/2 turn together), within bounds.
      for (int64_t i = 0; i < d; ++i) {
        const double rate = std::log1p(std::exp(double(c.dt_bias[size_t(h * d + i)])));
        const double radian = std::pow(10000., 2. * double(i % (d / 2)) / double(d));
        const double half_life = std::max(1.5, std::min(radian, 4 * want));
        EXPECT_NEAR(std::log(2.) / rate, half_life, 2e-3 * half_life) << l << " " << h << " " << i;
      }
      double beta = 0;
      for (int64_t i = 0; i < D; ++i) beta += double(c.b_proj[size_t(h * D + i)]) * mean[size_t(i)];
      EXPECT_NEAR(1 / (1 + std::exp(-beta)), 0.6 - 0.3 * c.entropy[size_t(h)], 1e-3);
    }
  }
}

// Without positions there are no wavelengths: around one that halves over the geometric mean of distances, from 7.4
// times slower to 7.4 times faster.
TEST_F(Convert, SpreadsDecaysWhereThereAreNoPositions) {
  CpuContext ctx;
  Weights w = arrange_weights(load_checkpoint(kNano));
  for (LayerSpec& s : w.config.layers) s.rope = false;
  for (LayerWeights& l : w.layers) l.spec.rope = false;
  const auto found = calibrate(ctx, w, std::vector<bool>(8, true), some_text(1, 96, 4096), {});
  for (const auto& [l, c] : found)
    for (size_t h = 0; h < 4; ++h) {
      double logs = 0, least = 1e9, most = -1e9;
      for (size_t i = 0; i < 64; ++i) {
        const double rate = std::log(std::log1p(std::exp(double(c.dt_bias[h * 64 + i]))));
        logs += rate / 64, least = std::min(least, rate), most = std::max(most, rate);
      }
      EXPECT_NEAR(logs, std::log(std::log(2.) / c.typical[h]), 0.05) << l << " " << h;
      EXPECT_NEAR(most - least, 2 * std::log(7.4), 0.2) << l << " " << h;
    }
}

// How far mixers of a student are from the teacher's on the teacher's inputs, relative to the teacher's power.
double mixer_error(Context& ctx, const Weights& teacher, const Weights& student, const std::vector<int32_t>& ids) {
  const int64_t T = int64_t(ids.size()), D = teacher.config.width;
  double error = 0, power = 0;
  // One layer of the student at a time within the teacher, so that its input is the teacher's.
  for (size_t l = 1; l < teacher.layers.size(); l += 3) {
    std::vector<float> outputs[2];
    for (int which = 0; which < 2; ++which) {
      Weights w = teacher;
      if (which) w.layers[l] = student.layers[l], w.config.layers[l] = student.config.layers[l];
      const Transformer model(w);
      StatePool pool(ctx, w.config, 1);
      pool.reserve(ctx, 1, T);
      Buffers buffers = plan_buffers(ctx, w, T, T, pool.capacity());
      outputs[which].resize(size_t(T * D));
      const Tap tap{int64_t(l), TapPoint::mixer_out, view(outputs[which].data(), {T, D})};
      const int32_t start[] = {0, int32_t(T)}, in[] = {-1}, out[] = {0}, past[] = {0};
      model.prefill(ctx, buffers, pool, {ids, start, in, out, past}, {&tap, 1});
    }
    for (size_t i = 0; i < outputs[0].size(); ++i) {
      error += std::pow(double(outputs[1][i]) - double(outputs[0][i]), 2);
      power += std::pow(double(outputs[0][i]), 2);
    }
  }
  return error / power;
}

TEST_F(Convert, CalibratedStartsNearer) {
  CpuContext ctx;
  const Checkpoint teacher = load_checkpoint(kNano);
  const Weights w = arrange_weights(teacher);
  const auto sample = some_text(2, 160, 4096), held_out = some_text(5, 160, 4096);
  const std::vector<bool> layers(8, true);
  double fla = 0;
  for (const bool bounded : {false, true}) {
    const auto found = calibrate(ctx, w, layers, sample, {.bounded_gate = bounded});
    ConvertOptions o{.kda = "all", .bounded_gate = bounded};
    const Checkpoint start = load_checkpoint(write(teacher, o));
    o.init = StudentInit::calibrated;
    const Checkpoint measured = load_checkpoint(write(teacher, o, found, Dtype::f32));
    EXPECT_EQ(measured.config.dtype, Dtype::f32);
    fla = mixer_error(ctx, w, arrange_weights(start), held_out[4]);
    const double calibrated = mixer_error(ctx, w, arrange_weights(measured), held_out[4]);
    EXPECT_LT(calibrated, 0.9) << "of the teacher's power";  // 1 is what a mixer of zeros has
    EXPECT_LT(calibrated, 0.5 * fla);
    // Thread counts change nothing.
    CpuContext one(1);
    const auto again = calibrate(one, w, layers, sample, {.bounded_gate = bounded});
    for (const auto& [l, c] : found) {
      EXPECT_EQ(c.dt_bias, again.at(l).dt_bias);
      EXPECT_EQ(c.b_proj, again.at(l).b_proj);
      EXPECT_EQ(c.g_bias, again.at(l).g_bias);
      EXPECT_EQ(c.o_norm, again.at(l).o_norm);
    }
  }
}

TEST_F(Convert, GatedAndTiedTeachers) {
  const fs::path from = fs::path(KDA_SOURCE_DIR) / "tests/data/llama/plain";
  const Checkpoint teacher = load_checkpoint(from);
  if (teacher.config.layers[0].qkv_bias) {
    EXPECT_TRUE(fails_with("biases", [&] { student_config(teacher.config, {.kda = "all"}); }));
    return;
  }
  const Checkpoint student = load_checkpoint(write(teacher, {.kda = "0"}));
  EXPECT_EQ(student.config.activation, teacher.config.activation);
  EXPECT_EQ(student.config.norm_eps, teacher.config.norm_eps);
  EXPECT_EQ(student.config.tied_head, teacher.config.tied_head);
}

TEST_F(Convert, Refuses) {
  const Checkpoint teacher = load_checkpoint(kNano);
  const auto refuses = [&](const std::string& why, const ConvertOptions& o) {
    return fails_with(why, [&] { student_config(teacher.config, o); });
  };
  EXPECT_TRUE(refuses("8-8 is not within the 8 layers 0-7", {.kda = "0,8"}));
  EXPECT_TRUE(refuses("3-2", {.kda = "3-2"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "0,,1"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "everything"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = ""}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "-1"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "hybrid:3"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "hybrid:0:0"}));
  EXPECT_TRUE(refuses("needed all, none, hybrid", {.kda = "99999999999999999999"}));
  EXPECT_TRUE(refuses("names no layer", {.kda = "none"}));
  EXPECT_TRUE(refuses("names no layer", {.kda = "hybrid:0:1"}));
  EXPECT_TRUE(refuses("lower bound", {.kda = "all", .bounded_gate = true, .lower_bound = -6}));
  ModelConfig biased = teacher.config;
  biased.layers[2].qkv_bias = biased.layers[2].o_bias = true;
  EXPECT_TRUE(fails_with("layer 2 has attention biases", [&] { student_config(biased, {.kda = "all"}); }));
  ModelConfig fla = teacher.config;
  fla.model_type = "kda";
  EXPECT_TRUE(fails_with("type kda", [&] { student_config(fla, {.kda = "all"}); }));

  CpuContext ctx;
  const Weights w = arrange_weights(teacher);
  EXPECT_TRUE(fails_with("longest sample text has 63",
                         [&] { calibrate(ctx, w, std::vector<bool>(8, true), some_text(3, 63, 4096), {}); }));
  EXPECT_TRUE(fails_with("needed 64", [&] { calibrate(ctx, w, std::vector<bool>(8, true), {}, {}); }));
  const ConvertOptions o{.kda = "all", .init = StudentInit::calibrated};
  EXPECT_TRUE(fails_with("was not measured", [&] { write(teacher, o); }));
  EXPECT_TRUE(temp.names().empty());
}

}  // namespace
}  // namespace kda::test
