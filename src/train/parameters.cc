#include "train/parameters.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/tensor_table.h"
#include "kernels/optimizer.h"
#include "text/regex.h"

namespace kda {

namespace {

constexpr int64_t kPiece = 1 << 16;  // elements of a task

// Pieces of n elements on all threads: f(from, count).
template <class F>
void in_pieces(Context& ctx, int64_t n, F f) {
  ctx.pool->run((n + kPiece - 1) / kPiece, [&](int64_t task, int) {
    const int64_t from = task * kPiece;
    f(from, std::min(kPiece, n - from));
  });
}

// f32 values of a stored tensor.
Tensor master_of(Context& ctx, const Tensor& stored) {
  std::vector<float> host(size_t(stored.shape().size()));
  if (stored.dtype() == Dtype::f32) {
    std::copy_n(stored.v.as<float>(), host.size(), host.begin());
  } else if (stored.dtype() == Dtype::bf16) {
    std::transform(stored.v.as<bf16>(), stored.v.as<bf16>() + host.size(), host.begin(),
                   [](bf16 x) { return float(x); });
  } else {
    std::transform(stored.v.as<f16>(), stored.v.as<f16>() + host.size(), host.begin(), [](f16 x) { return float(x); });
  }
  Tensor out = ctx.backend->alloc(Dtype::f32, stored.shape());
  ctx.backend->copy(ctx, out.v.data, host.data(), host.size() * sizeof(float));
  return out;
}

bool is_working(const TensorSpec& t) { return t.shape.rank == 2 && t.init != Init::conv; }

// Sets every tensor by its name; a tied head follows the embedding.
template <class F>
void assign(Weights& w, F value) {
  each_parameter(w, [&](const std::string& name, Tensor& t) { t = value(name, t); });
  if (w.config.tied_head) w.head.w = w.embedding;
}

}  // namespace

Parameters::Parameters(Context&, const Checkpoint& c) : weights_(arrange_weights(c)) {
  for (const TensorSpec& t : tensor_table(c.config)) {
    Parameter& p = parameters_.emplace_back();
    p.name = t.name;
    p.stored = c.at(t.name);
    p.decays = t.decay;
    p.matrix = is_working(t);
  }
  gradients_.config = weights_.config;
  for (const LayerWeights& l : weights_.layers) gradients_.layers.emplace_back().spec = l.spec;
}

void Parameters::set_trainable(Context& ctx, const std::vector<ParameterRule>& rules) {
  std::vector<text::Regex> regexes;
  for (const ParameterRule& r : rules) regexes.emplace_back(r.regex);
  text::RegexScratch scratch;
  std::vector<bool> used(rules.size());
  std::vector<const ParameterRule*> chosen;
  for (const Parameter& p : parameters_) {
    chosen.push_back(nullptr);
    for (size_t i = 0; i < rules.size(); ++i) {
      text::Regex::Match where;
      if (!regexes[i].search(p.name, 0, where, scratch)) continue;
      used[i] = true;
      if (!chosen.back()) chosen.back() = &rules[i];
    }
  }
  for (size_t i = 0; i < rules.size(); ++i)
    KDA_CHECK(used[i], "parameters: the expression `", rules[i].regex, "` matches none of the model's ",
              parameters_.size(), " parameters (the first is ", parameters_.front().name, ")");

  std::map<std::string, Parameter*> by_name;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    const ParameterRule* rule = chosen[i];
    by_name[p.name] = &p;
    p.trainable = rule && rule->trainable;
    p.lr = rule ? rule->lr : -1;
    p.decay = rule ? rule->decay : -1;
    p.grad = {};
    if (!p.trainable) continue;
    const Shape shape = p.stored.shape();
    p.grad = ctx.backend->alloc(Dtype::f32, shape);
    if (p.master) continue;
    p.master = master_of(ctx, p.stored);
    p.m = ctx.backend->alloc(Dtype::f32, shape);
    p.v = ctx.backend->alloc(Dtype::f32, shape);
    if (ctx.precision == Precision::fast && p.matrix) p.working = ctx.backend->alloc(Dtype::bf16, shape);
  }
  refresh(ctx);
  assign(weights_, [&](const std::string& name, const Tensor& now) {
    const Parameter& p = *by_name.at(name);
    return p.working ? p.working : p.master ? p.master : now;
  });
  assign(gradients_, [&](const std::string& name, const Tensor&) { return by_name.at(name)->grad; });
}

int64_t Parameters::count() const {
  int64_t n = 0;
  for (const Parameter& p : parameters_)
    if (p.trainable) n += p.stored.shape().size();
  return n;
}

void Parameters::zero_gradients(Context& ctx) {
  static constexpr size_t kZeros = 4096;
  static constexpr float zeros[kZeros] = {};
  for (Parameter& p : parameters_) {
    if (!p.trainable) continue;
    float* grad = p.grad.v.as<float>();
    in_pieces(ctx, p.grad.shape().size(), [&](int64_t from, int64_t n) {
      for (int64_t i = 0; i < n; i += int64_t(kZeros))
        ctx.backend->copy(ctx, grad + from + i, zeros, size_t(std::min(n - i, int64_t(kZeros))) * sizeof(float));
    });
  }
}

double Parameters::gradient_norm(Context& ctx) {
  const Tensor sums = ctx.backend->alloc(Dtype::f32, {int64_t(parameters_.size())});
  size_t bytes = 0;
  for (const Parameter& p : parameters_)
    if (p.trainable) bytes = std::max(bytes, sum_squares_workspace_bytes(ctx, p.grad.shape().size()));
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(bytes)});
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    if (!p.trainable) continue;
    sum_squares(ctx, {.x = p.grad, .sum = {sums.v.as<float>() + i, Dtype::f32, {1}}});
  }
  std::vector<float> host(parameters_.size());
  ctx.backend->copy(ctx, host.data(), sums.v.data, host.size() * sizeof(float));
  double sum = 0;
  for (float s : host) sum += double(s);
  return std::sqrt(sum);
}

void Parameters::step(Context& ctx, const AdamWSettings& s, int64_t step, double norm) {
  // As torch.nn.utils.clip_grad_norm_.
  const double scale = s.clip_norm > 0 ? std::min(1.0, s.clip_norm / (norm + 1e-6)) : 1.0;
  for (Parameter& p : parameters_) {
    if (!p.trainable) continue;
    adamw(ctx, {.p = p.master,
                .g = p.grad,
                .m = p.m,
                .v = p.v,
                .working = p.working,
                .lr = float((p.lr >= 0 ? p.lr : s.lr) * s.lr_scale),
                .beta1 = float(s.beta1),
                .beta2 = float(s.beta2),
                .eps = float(s.eps),
                .decay = float(p.decay >= 0 ? p.decay
                               : p.decays   ? s.decay
                                            : 0),
                .step = step,
                .grad_scale = float(scale)});
  }
}

void Parameters::refresh(Context& ctx) {
  std::vector<float> from(static_cast<size_t>(kPiece));
  std::vector<bf16> to(static_cast<size_t>(kPiece));
  for (Parameter& p : parameters_) {
    if (!p.working) continue;
    const int64_t n = p.master.shape().size();
    for (int64_t i = 0; i < n; i += kPiece) {
      const size_t count = size_t(std::min(kPiece, n - i));
      ctx.backend->copy(ctx, from.data(), p.master.v.as<float>() + i, count * sizeof(float));
      for (size_t j = 0; j < count; ++j) to[j] = bf16(from[j]);
      ctx.backend->copy(ctx, p.working.v.as<bf16>() + i, to.data(), count * sizeof(bf16));
    }
  }
}

int64_t Parameters::bytes() const {
  int64_t n = 0;
  for (const Parameter& p : parameters_)
    for (const Tensor* t : {&p.master, &p.grad, &p.m, &p.v, &p.working})
      if (*t) n += int64_t(t->v.bytes());
  return n;
}

std::map<std::string, ConstView> Parameters::values() const {
  std::map<std::string, ConstView> out;
  for (const Parameter& p : parameters_) out[p.name] = p.master ? p.master : p.stored;
  return out;
}

}  // namespace kda
