#include "train/held_out.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/top_k.h"

namespace kda {

namespace {
constexpr int64_t kChunk = 512;  // tokens of logits at once

ObjectiveSpec with_usual_terms(ObjectiveSpec s, bool has_teacher) {
  const auto has = [&](LossFunction f) {
    return std::any_of(s.losses.begin(), s.losses.end(), [&](const LossSpec& l) {
      return l.function == f && (f != LossFunction::kl || l.temperature == 1);
    });
  };
  if (!has(LossFunction::cross_entropy)) s.losses.push_back({.function = LossFunction::cross_entropy, .weight = 0});
  if (has_teacher && !has(LossFunction::kl)) s.losses.push_back({.function = LossFunction::kl, .weight = 0});
  return s;
}

ConstView rows_of(const ConstView& v, int64_t from, int64_t n) {
  return {static_cast<const float*>(v.data) + from * v.dim(1), v.dtype, {n, v.dim(1)}};
}
}  // namespace

std::vector<std::string> term_names(const std::vector<LossSpec>& losses) {
  std::vector<std::string> out;
  for (const LossSpec& l : losses) {
    std::string name = name_of(l.function);
    if (l.temperature != 1) name += cat("_t", l.temperature);
    std::string unique = name;
    for (int n = 2; std::find(out.begin(), out.end(), unique) != out.end(); ++n) unique = cat(name, "#", n);
    out.push_back(unique);
  }
  return out;
}

struct HeldOut::Impl {
  const Weights& student;
  std::vector<TrainBatch> batches;
  bool has_teacher;
  TrainSizes sizes;
  Objective objective;
  std::unique_ptr<TrainPass> own;  // where the training pass cannot run the whole model
  Tensor h, logits, ids, logprobs, scratch;
  int64_t allocated = 0;

  Impl(Context& ctx, const Weights& w, std::vector<TrainBatch> b, ObjectiveSpec spec, bool teacher,
       const TrainSizes& training)
      : student(w),
        batches(std::move(b)),
        has_teacher(teacher),
        sizes(sizes_of(batches)),
        objective(ctx, w, with_usual_terms(std::move(spec), teacher), sizes.rows, kChunk) {
    if (training.mixers_only) {
      sizes.recompute = true;
      own = std::make_unique<TrainPass>(ctx, w, sizes);
      allocated += TrainPass::plan(ctx, w, sizes).total();
    }
    if (!teacher) return;
    const int64_t n = std::min(sizes.rows, kChunk), D = w.config.width, V = w.config.vocabulary;
    const auto make = [&](Dtype t, Shape s) {
      Tensor out = ctx.backend->alloc(t, s);
      allocated += int64_t(out.v.bytes());
      return out;
    };
    h = make(Dtype::f32, {n, D});
    logits = make(Dtype::f32, {n, V});
    ids = make(Dtype::i32, {2, n});
    logprobs = make(Dtype::f32, {n, 1});
    scratch = make(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, n, D, V))});
  }

  // The likeliest tokens of rows [from, from + n).
  void likeliest(Context& ctx, const Weights& w, ConstView x, int64_t from, int64_t n, std::vector<int32_t>& out) {
    if (h.shape()[1] != w.config.width) {  // a teacher of another width
      allocated -= int64_t(h.v.bytes());
      h = ctx.backend->alloc(Dtype::f32, {h.shape()[0], w.config.width});
      allocated += int64_t(h.v.bytes());
    }
    const size_t bytes = matmul_workspace_bytes(ctx, n, w.config.width, w.config.vocabulary);
    if (bytes > scratch.v.bytes()) scratch = ctx.backend->alloc(Dtype::u8, {int64_t(bytes)});
    ctx.workspace = scratch;
    const View normed{h.v.data, Dtype::f32, {n, w.config.width}},
        y{logits.v.data, Dtype::f32, {n, w.config.vocabulary}};
    rms_norm(ctx, {.x = rows_of(x, from, n), .w = w.final_norm, .y = normed, .eps = float(w.config.norm_eps)});
    const MatmulSegment segment{w.head.view(), y};
    matmul(ctx, {.x = normed, .segments = {&segment, 1}});
    const View best{ids.v.data, Dtype::i32, {n, 1}};
    top_k(ctx, {.logits = y, .ids = best, .logprobs = {logprobs.v.data, Dtype::f32, {n, 1}}});
    out.resize(size_t(n));
    ctx.backend->copy(ctx, out.data(), best.data, best.bytes());
  }

  // Counted tokens of a batch where both say the same.
  int64_t agreeing(Context& ctx, const TrainBatch& b, ConstView x, const TeacherOutput& t) {
    int64_t same = 0;
    std::vector<int32_t> mine, theirs, stored;
    if (t.ids.data) {
      stored.resize(size_t(t.ids.size()));
      ctx.backend->copy(ctx, stored.data(), t.ids.data, t.ids.bytes());
    }
    for (int64_t from = 0; from < b.T(); from += kChunk) {
      const int64_t n = std::min(kChunk, b.T() - from);
      likeliest(ctx, student, x, from, n, mine);
      if (stored.empty()) likeliest(ctx, *t.weights, t.x, from, n, theirs);
      for (int64_t i = 0; i < n; ++i) {
        if (b.labels[size_t(from + i)] < 0) continue;
        same += mine[size_t(i)] == (stored.empty() ? theirs[size_t(i)] : stored[size_t((from + i) * t.ids.dim(1))]);
      }
    }
    return same;
  }
};

TrainSizes HeldOut::sizes_of(const std::vector<TrainBatch>& batches) {
  TrainSizes s{.rows = 1, .sequences = 1};
  for (const TrainBatch& b : batches) {
    s.rows = std::max(s.rows, b.T());
    s.sequences = std::max(s.sequences, int64_t(b.rows.size()));
  }
  return s;
}

HeldOut::HeldOut(Context& ctx, const Weights& w, std::vector<TrainBatch> b, ObjectiveSpec spec, bool has_teacher,
                 const TrainSizes& training)
    : impl_(std::make_unique<Impl>(ctx, w, std::move(b), std::move(spec), has_teacher, training)) {}
HeldOut::~HeldOut() = default;

TeacherWants HeldOut::wants() const { return impl_->objective.wants(); }
int64_t HeldOut::bytes() const { return impl_->allocated + impl_->objective.bytes(); }
int64_t HeldOut::rows() const { return impl_->sizes.rows; }

HeldOutResult HeldOut::run(Context& ctx, TrainPass& training, Teacher* teacher, const std::function<bool()>& stop) {
  Impl& o = *impl_;
  TrainPass& whole = o.own ? *o.own : training;
  const auto& losses = o.objective.spec().losses;
  const bool mixers = std::any_of(losses.begin(), losses.end(),
                                  [](const LossSpec& l) { return l.function == LossFunction::mixer_mse; });
  LossSums sums;
  int64_t same = 0;
  const TeacherOutput nothing;
  for (const TrainBatch& b : o.batches) {
    if (stop && stop()) break;
    const TeacherOutput& t = teacher ? teacher->run(ctx, b) : nothing;
    std::vector<Tap> taps = o.objective.taps();
    for (Tap& tap : taps) tap.to.shape.dim[0] = b.T();
    const ConstView x = whole.forward(ctx, b.view(), taps);
    sums.add(o.objective.run(ctx, b, t, x, 0, {}, nullptr));
    if (o.has_teacher) same += o.agreeing(ctx, b, x, t);
    if (mixers) sums.add(o.objective.run_mixers(ctx, training, b, t, 0, nullptr));
  }
  HeldOutResult r;
  r.tokens = sums.tokens;
  if (!r.tokens) return r;
  const double n = double(sums.tokens);
  const auto names = term_names(losses);
  for (size_t i = 0; i < names.size(); ++i) {
    r.terms[names[i]] = sums.terms[i] / n;
    for (double layer : sums.layers[i]) r.layers[names[i]].push_back(layer / n);
  }
  r.terms["loss"] = sums.total / n;
  if (o.has_teacher) r.top1 = double(same) / n;
  return r;
}

}  // namespace kda
