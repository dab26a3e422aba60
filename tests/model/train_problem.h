// tests/model/train_problem.h — a model, text for it and a loss: what tests of the training pass run.
#pragma once
#include <filesystem>
#include <map>

#include "checkpoint/checkpoint.h"
#include "model/training.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "train/parameters.h"

namespace kda::test {

// Values of a weight of any stored type.
inline std::vector<double> doubles(const ConstView& t) {
  std::vector<double> out(static_cast<size_t>(t.size()));
  for (size_t i = 0; i < out.size(); ++i) {
    if (t.dtype == Dtype::bf16)
      out[i] = double(float(t.as<bf16>()[i]));
    else if (t.dtype == Dtype::f16)
      out[i] = double(float(t.as<f16>()[i]));
    else
      out[i] = double(t.as<float>()[i]);
  }
  return out;
}

struct Text {
  std::vector<int32_t> ids, start{0};

  void add(std::span<const int32_t> sequence) {
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    start.push_back(int32_t(ids.size()));
  }
  Batch view() const { return {ids, start}; }
  int64_t T() const { return int64_t(ids.size()); }
};

// The input_ids of an expected.safetensors, a sequence for each row.
inline Text golden_text(const GoldenFile& file) {
  const auto ids = file["input_ids"].ids();
  const size_t B = size_t(file["input_ids"].shape[0]), T = ids.size() / B;
  Text out;
  for (size_t b = 0; b < B; ++b) out.add(std::span(ids).subspan(b * T, T));
  return out;
}

struct HeadLoss {
  double loss = 0;  // sum of `weight` times each token's cross-entropy with the next of its sequence
  std::vector<float> d_x;
  std::vector<double> d_norm, d_head;
};

// The final norm, the head and next-token cross-entropy in double, and their gradients; x f32 [T,D].
inline HeadLoss head_loss(const Weights& w, ConstView x, const Text& text, double weight) {
  const size_t T = size_t(text.T()), D = size_t(w.config.width), V = size_t(w.config.vocabulary);
  const auto norm = doubles(w.final_norm), head = doubles(w.head.w);
  const float* rows = x.as<float>();
  HeadLoss out{
      .d_x = std::vector<float>(T * D), .d_norm = std::vector<double>(D), .d_head = std::vector<double>(V * D)};
  for (size_t n = 0; n + 1 < text.start.size(); ++n)
    for (int32_t t = text.start[n]; t + 1 < text.start[n + 1]; ++t) {
      const float* row = rows + size_t(t) * D;
      double sum = 0;
      for (size_t d = 0; d < D; ++d) sum += double(row[d]) * row[d];
      const double r = 1 / std::sqrt(sum / double(D) + w.config.norm_eps);
      std::vector<double> y(D), p(V), dy(D);
      for (size_t d = 0; d < D; ++d) y[d] = row[d] * r * norm[d];
      double most = -1e300, total = 0;
      for (size_t v = 0; v < V; ++v) {
        for (size_t d = 0; d < D; ++d) p[v] += head[v * D + d] * y[d];
        most = std::max(most, p[v]);
      }
      for (double& l : p) total += l = std::exp(l - most);
      const size_t label = size_t(text.ids[size_t(t) + 1]);
      out.loss -= weight * std::log(p[label] / total);
      for (size_t v = 0; v < V; ++v) {
        const double dl = weight * (p[v] / total - (v == label ? 1 : 0));
        for (size_t d = 0; d < D; ++d) {
          dy[d] += dl * head[v * D + d];
          out.d_head[v * D + d] += dl * y[d];
        }
      }
      double mean = 0;
      for (size_t d = 0; d < D; ++d) mean += norm[d] * dy[d] * row[d] / double(D);
      for (size_t d = 0; d < D; ++d) {
        out.d_norm[d] += dy[d] * row[d] * r;
        out.d_x[size_t(t) * D + d] = float(r * (norm[d] * dy[d] - row[d] * r * r * mean));
      }
    }
  return out;
}

struct Gradients {
  double loss = 0;
  std::map<std::string, std::vector<float>> of;  // of trainable parameters
};

inline Gradients fetch_gradients(Parameters& p) {
  Gradients out;
  for (const Parameter& q : p.all())
    if (q.trainable) {
      const float* g = q.grad.v.as<float>();
      out.of[q.name] = {g, g + q.grad.shape().size()};
    }
  return out;
}

// One forward and backward pass of `text` with the head's loss above. With a tied head the embedding's gradient is the
// sum of both uses. weight < 0: 1 / (tokens that have a next one).
inline Gradients loss_gradients(Context& ctx, Parameters& p, TrainPass& pass, const Text& text, double weight = -1) {
  if (weight < 0) weight = 1 / double(text.T() - int64_t(text.start.size()) + 1);
  p.zero_gradients(ctx);
  const View x = pass.forward(ctx, text.view());
  HeadLoss head = head_loss(p.weights(), x, text, weight);
  const auto add = [](const Tensor& to, const std::vector<double>& from) {
    if (!to) return;
    float* g = to.v.as<float>();
    for (size_t i = 0; i < from.size(); ++i) g[i] = float(g[i] + from[i]);
  };
  pass.backward(ctx, view(head.d_x.data(), x.shape), {}, p.gradients());
  add(p.gradients().final_norm, head.d_norm);
  add(p.gradients().head.w, head.d_head);
  Gradients out = fetch_gradients(p);
  out.loss = head.loss;
  return out;
}

}  // namespace kda::test
