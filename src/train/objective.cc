#include "train/objective.h"

#include <algorithm>
#include <cmath>

#include "kernels/matmul.h"
#include "kernels/matmul_backward.h"
#include "kernels/norm.h"
#include "kernels/norm_backward.h"
#include "kernels/top_k.h"

namespace kda {

namespace {

bool of_logits(LossFunction f) { return f <= LossFunction::logistic_ranking; }
bool of_hidden(LossFunction f) { return f == LossFunction::hs_mse || f == LossFunction::hs_cosine; }
bool ranking(LossFunction f) { return f == LossFunction::hinge || f == LossFunction::logistic_ranking; }

LossKind kind_of(LossFunction f) {
  switch (f) {
    case LossFunction::cross_entropy: return LossKind::cross_entropy;
    case LossFunction::kl: return LossKind::kl;
    case LossFunction::jsd: return LossKind::jsd;
    case LossFunction::tvd: return LossKind::tvd;
    case LossFunction::hinge: return LossKind::hinge;
    default: return LossKind::logistic_ranking;
  }
}

// Rows [from, from + n) of a matrix.
ConstView rows_of(const ConstView& v, int64_t from, int64_t n) {
  const auto* p = static_cast<const std::byte*>(v.data) + size_t(from * v.dim(1)) * size_of(v.dtype);
  return {p, v.dtype, {n, v.dim(1)}};
}
View rows_of(const View& v, int64_t from, int64_t n) {
  auto* p = static_cast<std::byte*>(v.data) + size_t(from * v.dim(1)) * size_of(v.dtype);
  return {p, v.dtype, {n, v.dim(1)}};
}
View first_rows(const Tensor& t, int64_t n) { return rows_of(t.v, 0, n); }

// Pairs of a row that the teacher puts in an order.
int64_t ordered_pairs(std::span<float> logprobs) {
  if (!std::is_sorted(logprobs.begin(), logprobs.end(), std::greater<float>()))
    std::sort(logprobs.begin(), logprobs.end(), std::greater<float>());
  const int64_t k = int64_t(logprobs.size());
  int64_t pairs = k * (k - 1) / 2;
  for (int64_t i = 0, same = 0; i < k; ++i) {
    same = i && logprobs[size_t(i)] == logprobs[size_t(i) - 1] ? same + 1 : 0;
    pairs -= same;
  }
  return pairs;
}

}  // namespace

struct Objective::Impl {
  const Weights& student;
  const ObjectiveSpec spec;
  const int64_t rows, chunk, D, V;
  int64_t allocated = 0;              // bytes
  double weights = 0;                 // sum over all losses
  std::vector<size_t> logit_terms;    // indices into spec.losses
  std::vector<size_t> hidden_terms;   // ..
  std::vector<int64_t> mixer_layers;  // KDA layers of the student, where there is mixer_mse
  bool has_mixer = false, teacher_logits = false, has_ranking = false;

  Tensor labels;                     // i32 [rows]
  Tensor value;                      // [terms, chunk]
  Tensor h, d_h;                     // [chunk,D]  normed rows and their gradient
  Tensor logits;                     // [chunk,V]
  Tensor t_h, t_logits;              // [chunk,D], [chunk,V]  live teacher
  Tensor t_ids, t_logprobs;          // [chunk,k], or [rows,k] where pairs are counted beforehand
  std::map<int64_t, Tensor> hidden;  // by student index: [rows,D]  the activation, after run() its gradient
  Tensor mixer_out, d_mixer;         // [rows,D]
  Tensor scratch;                    // u8
  std::vector<Cotangent> cotangents;
  std::vector<float> zeros, host;

  Impl(Context& ctx, const Weights& w, ObjectiveSpec s, int64_t rows_, int64_t chunk_rows)
      : student(w),
        spec(std::move(s)),
        rows(rows_),
        chunk(std::min(rows_, chunk_rows)),
        D(w.config.width),
        V(w.config.vocabulary) {
    KDA_CHECK(rows >= 1 && chunk >= 1, "objective: needs room for at least one token, got rows ", rows, ", chunk_rows ",
              chunk_rows);
    KDA_CHECK(!spec.losses.empty(), "objective: no losses");
    KDA_CHECK(spec.top_k >= 0 && spec.top_k <= V, "objective: top_k must be 0..", V, " (the vocabulary), got ",
              spec.top_k);
    for (size_t i = 0; i < spec.losses.size(); ++i) check(i);
    KDA_CHECK(weights > 0, "objective: the weights of the losses add up to 0");
    plan(ctx);
  }

  void check(size_t i) {
    const LossSpec& l = spec.losses[i];
    const char* name = name_of(l.function);
    KDA_CHECK(std::isfinite(l.weight) && l.weight >= 0, "objective: ", name, ": weight must be 0 or more, got ",
              l.weight);
    weights += l.weight;
    if (of_logits(l.function)) {
      logit_terms.push_back(i);
      KDA_CHECK(std::isfinite(l.temperature) && l.temperature > 0, "objective: ", name,
                ": temperature must be above 0, got ", l.temperature);
      KDA_CHECK(std::isfinite(l.margin), "objective: ", name, ": margin must be a number, got ", l.margin);
      KDA_CHECK(!ranking(l.function) || spec.stored_teacher || spec.top_k, "objective: ", name,
                " compares the teacher's likeliest ids: it needs a stored teacher, or teacher.top_k for a live one");
      teacher_logits |= l.function != LossFunction::cross_entropy;
      has_ranking |= ranking(l.function);
    } else {
      KDA_CHECK(!spec.stored_teacher, "objective: ", name,
                " needs the teacher's activations: a live teacher, not stored log-probabilities");
      if (of_hidden(l.function)) {
        hidden_terms.push_back(i);
        KDA_CHECK(!spec.layers.empty(), "objective: ", name, " needs a mapping of layers");
      } else {
        KDA_CHECK(!has_mixer, "objective: mixer_mse given twice");
        has_mixer = true;
      }
    }
  }

  Tensor make(Context& ctx, Dtype t, Shape s) {
    Tensor out = ctx.backend->alloc(t, s);
    allocated += int64_t(out.v.bytes());
    return out;
  }
  void plan(Context& ctx) {
    const int64_t L = int64_t(student.layers.size());
    size_t bytes = 0;
    labels = make(ctx, Dtype::i32, {rows});
    value = make(ctx, Dtype::f32, {int64_t(std::max<size_t>(1, logit_terms.size())) * chunk});
    zeros.resize(static_cast<size_t>(chunk * D));
    host.resize(size_t(value.shape().size()));
    if (!logit_terms.empty()) {
      h = make(ctx, Dtype::f32, {chunk, D});
      logits = make(ctx, Dtype::f32, {chunk, V});
      const int64_t most_k = std::min<int64_t>(V, 4096);
      bytes = std::max({matmul_workspace_bytes(ctx, chunk, D, V), matmul_dx_workspace_bytes(ctx, chunk, D, V),
                        matmul_dw_workspace_bytes(ctx, chunk, D, V), rms_norm_backward_workspace_bytes(ctx, chunk, D),
                        logits_loss_workspace_bytes(ctx, chunk, V, most_k)});
    }
    if (!logit_terms.empty() || !hidden_terms.empty()) d_h = make(ctx, Dtype::f32, {chunk, D});
    if (teacher_logits && !spec.stored_teacher) {
      t_h = make(ctx, Dtype::f32, {chunk, D});
      t_logits = make(ctx, Dtype::f32, {chunk, V});
      if (spec.top_k) {
        const int64_t n = has_ranking ? rows : chunk;
        t_ids = make(ctx, Dtype::i32, {n, spec.top_k});
        t_logprobs = make(ctx, Dtype::f32, {n, spec.top_k});
      }
    }
    if (!hidden_terms.empty())
      for (const LayerPair& p : spec.layers) {
        KDA_CHECK(p.student >= 0 && p.student <= L, "objective: layer mapping: hidden state ", p.student,
                  " of the student, which has 0..", L);
        KDA_CHECK(p.teacher >= 0, "objective: layer mapping: hidden state ", p.teacher, " of the teacher");
        if (!hidden.count(p.student)) hidden[p.student] = {};
      }
    for (auto& [index, t] : hidden)
      if (index < L) {
        t = make(ctx, Dtype::f32, {rows, D});
      }
    if (has_mixer) {
      for (int64_t l = 0; l < L; ++l)
        if (student.layers[size_t(l)].spec.mixer == Mixer::kda) mixer_layers.push_back(l);
      KDA_CHECK(!mixer_layers.empty(), "objective: mixer_mse: the student has no KDA layers");
      mixer_out = make(ctx, Dtype::f32, {rows, D});
      d_mixer = make(ctx, Dtype::f32, {rows, D});
    }
    if (bytes) scratch = make(ctx, Dtype::u8, {int64_t(bytes)});
  }

  double share(size_t i) const { return spec.losses[i].weight / weights; }

  LossSums start(Context& ctx, const TrainBatch& batch) {
    const int64_t T = batch.T();
    KDA_CHECK(T <= rows && int64_t(batch.labels.size()) == T, "objective: a batch of ", T, " tokens and ",
              batch.labels.size(), " labels, planned for ", rows);
    ctx.workspace = scratch;
    if (T) ctx.backend->copy(ctx, labels.v.data, batch.labels.data(), size_t(T) * sizeof(int32_t));
    LossSums sums;
    sums.tokens = batch.counted();
    sums.terms.resize(spec.losses.size());
    sums.layers.resize(spec.losses.size());
    for (const size_t i : hidden_terms) sums.layers[i].resize(spec.layers.size());
    for (size_t i = 0; i < spec.losses.size(); ++i)
      if (spec.losses[i].function == LossFunction::mixer_mse) sums.layers[i].resize(mixer_layers.size());
    return sums;
  }

  // sum of the first n values of `value`, from row `term` on
  double sum_values(Context& ctx, int64_t term, int64_t n) {
    if (!n) return 0;
    ctx.backend->copy(ctx, host.data(), value.v.as<float>() + term * n, size_t(n) * sizeof(float));
    double sum = 0;
    for (int64_t r = 0; r < n; ++r) sum += double(host[size_t(r)]);
    return sum;
  }

  void clear(Context& ctx, View v) {
    for (int64_t from = 0; from < v.dim(0); from += chunk) {
      const View part = rows_of(v, from, std::min(chunk, v.dim(0) - from));
      ctx.backend->copy(ctx, part.data, zeros.data(), part.bytes());
    }
  }

  ConstView labels_of(int64_t from, int64_t n) const { return {labels.v.as<int32_t>() + from, Dtype::i32, {n}}; }

  // ---- the live teacher's part

  void check_teacher(const TeacherOutput& t, int64_t T) const {
    if (!teacher_logits) return;
    if (spec.stored_teacher) {
      KDA_CHECK(t.ids.data && t.logprobs.data, "objective: no stored log-probabilities came from the teacher");
      KDA_CHECK(t.ids.dim(0) == T && t.logprobs.shape == t.ids.shape && t.ids.dim(1) <= std::min<int64_t>(V, 4096),
                "objective: stored log-probabilities must be [", T, ",k], k at most ", std::min<int64_t>(V, 4096),
                ", got ids ", t.ids.shape, ", values ", t.logprobs.shape);
    } else {
      KDA_CHECK(t.weights && t.x.data, "objective: needs a live teacher's last hidden states");
      KDA_CHECK(t.weights->config.vocabulary == V, "objective: the teacher's vocabulary is ",
                t.weights->config.vocabulary, ", the student's ", V);
      KDA_CHECK((t.x.shape == Shape{T, t.weights->config.width}), "objective: teacher's x must be [", T, ",",
                t.weights->config.width, "], got ", t.x.shape);
    }
  }

  // Its width may be another than the student's: then its buffers and scratch are made anew, once.
  void fit_teacher(Context& ctx, const Weights& w) {
    const int64_t width = w.config.width;
    if (t_h.shape()[1] == width) return;
    allocated -= int64_t(t_h.v.bytes());
    t_h = make(ctx, Dtype::f32, {chunk, width});
    const size_t bytes = matmul_workspace_bytes(ctx, chunk, width, V);
    if (bytes > scratch.v.bytes()) {
      allocated -= int64_t(scratch.v.bytes());
      scratch = make(ctx, Dtype::u8, {int64_t(bytes)});
      ctx.workspace = scratch;
    }
  }

  View teacher_chunk(Context& ctx, const TeacherOutput& t, int64_t from, int64_t n) {
    const Weights& w = *t.weights;
    fit_teacher(ctx, w);
    const View normed = first_rows(t_h, n), out = first_rows(t_logits, n);
    rms_norm(ctx, {.x = rows_of(t.x, from, n), .w = w.final_norm, .y = normed, .eps = float(w.config.norm_eps)});
    const MatmulSegment segment{w.head.view(), out};
    matmul(ctx, {.x = normed, .segments = {&segment, 1}});
    return out;
  }

  struct Sparse {
    ConstView ids, logprobs;
  };
  Sparse reduce(Context& ctx, const TeacherOutput& t, int64_t from, int64_t n, int64_t to) {
    const View dense = teacher_chunk(ctx, t, from, n);
    const View ids = rows_of(t_ids.v, to, n), logprobs = rows_of(t_logprobs.v, to, n);
    top_k(ctx, {.logits = dense, .ids = ids, .logprobs = logprobs});
    return {ids, logprobs};
  }

  // Pairs of the counted tokens. Leaves a live teacher's ids of the whole batch in t_ids, t_logprobs.
  int64_t count_pairs(Context& ctx, const TrainBatch& batch, const TeacherOutput& t) {
    const int64_t T = batch.T();
    if (!spec.stored_teacher)
      for (int64_t from = 0; from < T; from += chunk) reduce(ctx, t, from, std::min(chunk, T - from), from);
    const ConstView all = spec.stored_teacher ? t.logprobs : ConstView(t_logprobs);
    const int64_t k = all.dim(1);
    std::vector<float> part(static_cast<size_t>(chunk * k));
    int64_t pairs = 0;
    for (int64_t from = 0; from < T; from += chunk) {
      const ConstView v = rows_of(all, from, std::min(chunk, T - from));
      ctx.backend->copy(ctx, part.data(), v.data, v.bytes());
      for (int64_t r = 0; r < v.dim(0); ++r)
        if (batch.labels[size_t(from + r)] >= 0) pairs += ordered_pairs({part.data() + r * k, size_t(k)});
    }
    return pairs;
  }

  // ---- losses

  void logit_losses(Context& ctx, const TrainBatch& batch, const TeacherOutput& t, ConstView x, double scale, View d_x,
                    Weights* gradients, LossSums& sums) {
    const int64_t T = batch.T();
    check_teacher(t, T);
    const int64_t pairs = has_ranking ? count_pairs(ctx, batch, t) : 0;
    const double per_pair = pairs ? double(sums.tokens) / double(pairs) : 0;
    std::vector<LossTerm> terms;
    for (const size_t i : logit_terms) {
      const LossSpec& l = spec.losses[i];
      terms.push_back({.kind = kind_of(l.function),
                       .temperature = float(l.temperature),
                       .missing = l.missing,
                       .margin = float(l.margin),
                       .scale = float(scale * share(i) * (ranking(l.function) ? per_pair : 1))});
    }
    const float eps = float(student.config.norm_eps);
    for (int64_t from = 0; from < T; from += chunk) {
      const int64_t n = std::min(chunk, T - from);
      LogitsLoss loss{.logits = first_rows(logits, n),
                      .teacher = {},
                      .ids = {},
                      .logprobs = {},
                      .labels = labels_of(from, n),
                      .terms = terms,
                      .value = {value.v.data, Dtype::f32, {int64_t(terms.size()), n}}};
      if (teacher_logits && spec.stored_teacher) {
        loss.ids = rows_of(t.ids, from, n);
        loss.logprobs = rows_of(t.logprobs, from, n);
      } else if (teacher_logits && spec.top_k) {
        const Sparse s = has_ranking ? Sparse{rows_of(t_ids.v, from, n), rows_of(t_logprobs.v, from, n)}
                                     : reduce(ctx, t, from, n, 0);
        loss.ids = s.ids;
        loss.logprobs = s.logprobs;
      } else if (teacher_logits) {
        loss.teacher = teacher_chunk(ctx, t, from, n);
      }
      const View normed = first_rows(h, n);
      const ConstView part = rows_of(x, from, n);
      rms_norm(ctx, {.x = part, .w = student.final_norm, .y = normed, .eps = eps});
      const MatmulSegment segment{student.head.view(), loss.logits};
      matmul(ctx, {.x = normed, .segments = {&segment, 1}});
      logits_loss(ctx, loss);
      for (size_t j = 0; j < terms.size(); ++j) {
        const double sum = sum_values(ctx, int64_t(j), n);
        sums.terms[logit_terms[j]] += ranking(spec.losses[logit_terms[j]].function) ? sum * per_pair : sum;
      }
      if (!gradients) continue;
      const MatmulDxSegment dx{student.head.view(), loss.logits};
      const View back = first_rows(d_h, n);
      matmul_dx(ctx, {.segments = {&dx, 1}, .dx = back});
      if (gradients->head.w) {
        const MatmulDwSegment dw{loss.logits, gradients->head.w};
        matmul_dw(ctx, {.x = normed, .segments = {&dw, 1}});
      }
      rms_norm_backward(ctx, {.x = part,
                              .w = student.final_norm,
                              .dy = back,
                              .dx = rows_of(d_x, from, n),
                              .dw = gradients->final_norm ? View(gradients->final_norm) : View{},
                              .eps = eps});
    }
  }

  // One loss between two matrices over rows [from, from+n); its sum over these rows.
  double compare(Context& ctx, HiddenLossKind kind, ConstView student_rows, ConstView teacher_rows, int64_t from,
                 double scale, View d) {
    const int64_t n = student_rows.dim(0);
    hidden_loss(ctx, {.student = student_rows,
                      .teacher = teacher_rows,
                      .labels = labels_of(from, n),
                      .kind = kind,
                      .scale = float(scale),
                      .d_student = d,
                      .value = {value.v.data, Dtype::f32, {n}}});
    return sum_values(ctx, 0, n);
  }

  void hidden_losses(Context& ctx, const TeacherOutput& t, ConstView x, double scale, View d_x, LossSums& sums) {
    const int64_t T = x.dim(0), L = int64_t(student.layers.size());
    const double layers = double(spec.layers.size());
    cotangents.clear();
    for (auto& [index, kept] : hidden) {
      const View mine = index == L ? View{} : rows_of(kept.v, 0, T);
      const ConstView activation = index == L ? x : ConstView(mine);
      for (int64_t from = 0; from < T; from += chunk) {
        const int64_t n = std::min(chunk, T - from);
        // The last layer's goes straight into d_x; the others take the place of what they are gradients of.
        View to = first_rows(d_h, n);
        if (index == L && d_x.data)
          to = rows_of(d_x, from, n);
        else
          ctx.backend->copy(ctx, to.data, zeros.data(), to.bytes());
        for (size_t p = 0; p < spec.layers.size(); ++p) {
          if (spec.layers[p].student != index) continue;
          const auto theirs = t.hidden.find(spec.layers[p].teacher);
          KDA_CHECK(theirs != t.hidden.end() && theirs->second.shape == activation.shape, "objective: hidden state ",
                    spec.layers[p].teacher, " of the teacher must be ", activation.shape, " as the student's ", index,
                    " is",
                    theirs == t.hidden.end() ? std::string(", it did not come") : cat(", got ", theirs->second.shape));
          for (const size_t i : hidden_terms) {
            const auto kind =
                spec.losses[i].function == LossFunction::hs_mse ? HiddenLossKind::mse : HiddenLossKind::cosine;
            const double sum = compare(ctx, kind, rows_of(activation, from, n), rows_of(theirs->second, from, n), from,
                                       scale * share(i) / layers, to);
            sums.layers[i][p] += sum;
            sums.terms[i] += sum / layers;
          }
        }
        if (index != L) {
          const View over = rows_of(mine, from, n);
          ctx.backend->copy(ctx, over.data, to.data, over.bytes());
        }
      }
      if (index != L) cotangents.push_back({.layer = index - 1, .point = TapPoint::layer_out, .value = mine});
    }
  }
};

Objective::Objective(Context& ctx, const Weights& student, ObjectiveSpec spec, int64_t rows, int64_t chunk_rows)
    : impl_(std::make_unique<Impl>(ctx, student, std::move(spec), rows, chunk_rows)) {}
Objective::~Objective() = default;

const ObjectiveSpec& Objective::spec() const { return impl_->spec; }
int64_t Objective::bytes() const { return impl_->allocated; }
bool Objective::needs_stream() const { return !impl_->logit_terms.empty() || !impl_->hidden_terms.empty(); }
std::span<const Cotangent> Objective::cotangents() const { return impl_->cotangents; }

TeacherWants Objective::wants() const {
  TeacherWants w;
  w.logits = impl_->teacher_logits;
  if (!impl_->hidden_terms.empty())
    for (const LayerPair& p : impl_->spec.layers)
      if (std::find(w.hidden.begin(), w.hidden.end(), p.teacher) == w.hidden.end()) w.hidden.push_back(p.teacher);
  w.mixers = impl_->mixer_layers;
  return w;
}

std::vector<Tap> Objective::taps() {
  std::vector<Tap> out;
  for (auto& [index, t] : impl_->hidden)
    if (t) out.push_back({.layer = index - 1, .point = TapPoint::layer_out, .to = t});
  return out;
}

LossSums Objective::run(Context& ctx, const TrainBatch& batch, const TeacherOutput& teacher, ConstView x, double scale,
                        View d_x, Weights* gradients) {
  Impl& o = *impl_;
  LossSums sums = o.start(ctx, batch);
  o.cotangents.clear();
  if (!needs_stream()) return sums;
  const Shape shape{batch.T(), o.D};
  KDA_CHECK(x.shape == shape, "objective: x must be ", shape, ", got ", x.shape);
  if (gradients) {
    KDA_CHECK(d_x.data && d_x.shape == shape, "objective: d_x must be ", shape, ", got ", d_x.shape);
    o.clear(ctx, d_x);
  } else {
    d_x = {};
  }
  if (!o.hidden_terms.empty()) o.hidden_losses(ctx, teacher, x, scale, d_x, sums);
  if (!o.logit_terms.empty()) o.logit_losses(ctx, batch, teacher, x, scale, d_x, gradients, sums);
  for (size_t i = 0; i < sums.terms.size(); ++i) sums.total += o.share(i) * sums.terms[i];
  return sums;
}

LossSums Objective::run_mixers(Context& ctx, TrainPass& pass, const TrainBatch& batch, const TeacherOutput& teacher,
                               double scale, Weights* gradients) {
  Impl& o = *impl_;
  LossSums sums = o.start(ctx, batch);
  if (needs_stream()) sums.tokens = 0;
  const auto which = std::find_if(o.spec.losses.begin(), o.spec.losses.end(),
                                  [](const LossSpec& l) { return l.function == LossFunction::mixer_mse; });
  if (which == o.spec.losses.end()) return sums;
  const size_t i = size_t(which - o.spec.losses.begin());
  const int64_t T = batch.T();
  const double layers = double(o.mixer_layers.size());
  for (size_t j = 0; j < o.mixer_layers.size(); ++j) {
    const int64_t l = o.mixer_layers[j];
    const auto in = teacher.mixer_in.find(l), out = teacher.mixer_out.find(l);
    const Shape shape{T, o.D};
    KDA_CHECK(in != teacher.mixer_in.end() && out != teacher.mixer_out.end() && in->second.shape == shape &&
                  out->second.shape == shape,
              "objective: mixer_mse needs input and output ", shape, " of the teacher's mixer in layer ", l);
    const View mine = first_rows(o.mixer_out, T), d = first_rows(o.d_mixer, T);
    pass.mixer_forward(ctx, batch.view(), size_t(l), in->second, mine);
    ctx.workspace = o.scratch;
    o.clear(ctx, d);
    for (int64_t from = 0; from < T; from += o.chunk) {
      const int64_t n = std::min(o.chunk, T - from);
      sums.layers[i][j] += o.compare(ctx, HiddenLossKind::mse, rows_of(mine, from, n), rows_of(out->second, from, n),
                                     from, scale * o.share(i) / layers, rows_of(d, from, n));
    }
    sums.terms[i] += sums.layers[i][j] / layers;
    if (gradients) pass.mixer_backward(ctx, d, *gradients);
  }
  sums.total = o.share(i) * sums.terms[i];
  return sums;
}

}  // namespace kda
