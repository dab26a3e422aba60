#include "train/stage.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "train/schedule.h"

namespace kda {

namespace {
bool mixers_alone(const StageSpec& s) {
  return std::all_of(s.losses.begin(), s.losses.end(),
                     [](const LossSpec& l) { return l.function == LossFunction::mixer_mse || l.weight == 0; });
}

ObjectiveSpec objective_spec(const StageSpec& s, const RunFile& run, const ModelConfig& c) {
  ObjectiveSpec o;
  o.losses = s.losses;
  if (s.all_layers)
    for (int64_t l = 1; l <= int64_t(c.layers.size()); ++l) o.layers.push_back({l, l});
  else
    o.layers = s.layers;
  o.stored_teacher = run.teacher.kind == TeacherKind::stored;
  o.top_k = run.teacher.top_k;
  return o;
}

void add(TeacherWants& to, const TeacherWants& more) {
  to.logits |= more.logits;
  const auto join = [](std::vector<int64_t>& a, const std::vector<int64_t>& b) {
    a.insert(a.end(), b.begin(), b.end());
    std::sort(a.begin(), a.end());
    a.erase(std::unique(a.begin(), a.end()), a.end());
  };
  join(to.hidden, more.hidden);
  join(to.mixers, more.mixers);
}

// The regex of the mixers of a model's KDA layers.
std::string kda_mixers(const ModelConfig& c) {
  std::string layers;
  for (size_t l = 0; l < c.layers.size(); ++l)
    if (c.layers[l].mixer == Mixer::kda) layers += cat(layers.empty() ? "" : "|", l);
  KDA_CHECK(!layers.empty(), "the student has no KDA layers to train by mixer_mse alone");
  return cat("^model\\.layers\\.(?:", layers, ")\\.self_attn\\.");
}

bool wants_anything(const TeacherWants& w) { return w.logits || !w.hidden.empty() || !w.mixers.empty(); }
}  // namespace

std::vector<ParameterRule> stage_rules(StageSpec s, const ModelConfig& c) {
  if (s.trainable.empty() && mixers_alone(s)) s.trainable = {kda_mixers(c)};
  return parameter_rules(s);
}

struct Stage::Impl {
  const StageInput& in;
  StageSpec spec;
  Parameters& parameters;
  TrainData data;
  int64_t steps = 0;
  std::vector<std::string> names;
  bool mixers = false, stream = false;
  TrainSizes sizes;
  std::unique_ptr<Objective> objective;
  std::unique_ptr<HeldOut> held_out;
  std::unique_ptr<Teacher> teacher;
  std::unique_ptr<TrainPass> pass;
  TrainBytes bytes_of_pass;
  Tensor d_x;                       // f32 [rows,D]
  std::vector<TrainBatch> batches;  // of one step

  Impl(Context& ctx, const StageInput& input, const StageSpec& s, const std::vector<DataCursor>& cursor, bool begin)
      : in(input),
        spec(s),
        parameters(*input.parameters),
        data(input.data, {s.sequence_length, s.batch_tokens(), int32_t(config().vocabulary)}, input.run->seed),
        steps(steps_of(s, data.tokens())),
        names(term_names(s.losses)) {
    data.seek(cursor);
    parameters.set_trainable(ctx, stage_rules(spec, config()));
    KDA_CHECK(parameters.count() > 0, "stage '", spec.name, "': nothing is trainable");
    if (begin) begin_moments(ctx);
    batches.resize(size_t(spec.accumulate));

    const int64_t rows = spec.batch_tokens();
    const ObjectiveSpec losses = objective_spec(spec, *in.run, config());
    objective = std::make_unique<Objective>(ctx, parameters.weights(), losses, rows);
    stream = objective->needs_stream();
    mixers = std::any_of(spec.losses.begin(), spec.losses.end(),
                         [](const LossSpec& l) { return l.function == LossFunction::mixer_mse; });
    sizes = {.rows = rows,
             .sequences = data.most_sequences(steps * spec.accumulate),
             .recompute = spec.recompute,
             .mixers_only = !stream};
    TeacherWants wants = objective->wants();
    int64_t longest = spec.sequence_length, teacher_rows = rows;
    if (in.held_out) {
      auto held = held_out_part();
      const TrainSizes of_held = HeldOut::sizes_of(held.batches);
      sizes.rows = std::max(sizes.rows, of_held.rows);
      sizes.sequences = std::max(sizes.sequences, of_held.sequences);
      held_out = std::make_unique<HeldOut>(ctx, parameters.weights(), std::move(held.batches), losses,
                                           in.teacher != nullptr || in.stored != nullptr, sizes);
      add(wants, held_out->wants());
      if (in.teacher) wants.logits = true;  // for top1
      longest = std::max(longest, held.length);
      teacher_rows = std::max(teacher_rows, of_held.rows);
    }
    if (in.stored && wants_anything(wants))
      teacher = in.stored(ctx, teacher_rows);
    else if (in.teacher && wants_anything(wants))
      teacher = live_teacher(ctx, *in.teacher, wants, teacher_rows, longest);
    bytes_of_pass = TrainPass::plan(ctx, parameters.weights(), sizes);
    pass = std::make_unique<TrainPass>(ctx, parameters.weights(), sizes);
    if (stream) d_x = ctx.backend->alloc(Dtype::f32, {rows, config().width});
  }

  const ModelConfig& config() const { return parameters.weights().config; }

  struct HeldOutPart {
    std::vector<TrainBatch> batches;
    int64_t length;
  };
  HeldOutPart held_out_part() const {
    const EvalSpec& e = in.run->eval;
    const int64_t length = e.sequence_length ? e.sequence_length : spec.sequence_length;
    return {
        held_out_batches(*in.held_out, {length, std::max(length, spec.batch_tokens()), int32_t(config().vocabulary)},
                         e.tokens, e.only_first),
        length};
  }

  void begin_moments(Context& ctx) {
    for (Parameter& p : parameters.all()) {
      if (!p.trainable) continue;
      p.m = ctx.backend->alloc(Dtype::f32, p.master.shape());
      p.v = ctx.backend->alloc(Dtype::f32, p.master.shape());
    }
  }

  // Adds the gradient of scale * the batch's sums.
  LossSums run(Context& ctx, const TrainBatch& b, double scale) {
    static const TeacherOutput kNothing;
    const TeacherOutput& t = teacher ? teacher->run(ctx, b) : kNothing;
    LossSums sums;
    if (stream) {
      const View x = pass->forward(ctx, b.view(), objective->taps());
      const View d{d_x.v.data, Dtype::f32, {b.T(), config().width}};
      sums.add(objective->run(ctx, b, t, x, scale, d, &parameters.gradients()));
      pass->backward(ctx, d, objective->cotangents(), parameters.gradients());
    }
    if (mixers) sums.add(objective->run_mixers(ctx, *pass, b, t, scale, &parameters.gradients()));
    return sums;
  }
};

Stage::Stage(Context& ctx, const StageInput& in, const StageSpec& spec, const std::vector<DataCursor>& cursor,
             bool begin)
    : impl_(std::make_unique<Impl>(ctx, in, spec, cursor, begin)) {}
Stage::~Stage() = default;

int64_t Stage::steps() const { return impl_->steps; }
const std::vector<std::string>& Stage::terms() const { return impl_->names; }
std::vector<DataCursor> Stage::cursor() const { return impl_->data.cursor(); }
int64_t Stage::trainable() const { return impl_->parameters.count(); }
bool Stage::has_held_out() const { return impl_->held_out != nullptr; }

std::vector<std::pair<std::string, int64_t>> Stage::memory() const {
  const Impl& s = *impl_;
  std::vector<std::pair<std::string, int64_t>> out;
  int64_t masters = 0, gradients = 0, moments = 0, working = 0;
  const auto bytes = [](const Tensor& t) { return t ? int64_t(t.v.bytes()) : 0; };
  for (const Parameter& p : s.parameters.all()) {
    masters += bytes(p.master);
    gradients += bytes(p.grad);
    moments += bytes(p.m) + bytes(p.v);
    working += bytes(p.working);
  }
  out.emplace_back("fp32 masters", masters);
  if (working) out.emplace_back("bf16 working copies", working);
  out.emplace_back("gradients", gradients);
  out.emplace_back("AdamW moments", moments);
  out.emplace_back("activations", s.bytes_of_pass.activations);
  out.emplace_back("scratch of the passes", s.bytes_of_pass.scratch);
  out.emplace_back("losses", s.objective->bytes() + bytes(s.d_x));
  if (s.teacher) out.emplace_back("teacher's activations", s.teacher->bytes());
  if (s.held_out) out.emplace_back("held-out evaluation", s.held_out->bytes());
  return out;
}

StepResult Stage::step(Context& ctx, int64_t step, int64_t optimizer_step, double limit,
                       const std::function<bool()>& stop) {
  Impl& s = *impl_;
  StepResult r;
  const std::vector<DataCursor> before = s.data.cursor();
  int64_t counted = 0;
  for (TrainBatch& b : s.batches) {
    s.data.next(b);
    counted += b.counted();
    r.tokens += b.T();
  }
  const double factor = schedule_factor(s.spec.schedule, step, s.steps);
  r.lr = s.spec.lr * factor;
  const auto trouble = [&](OnTrouble what, std::string why) {
    r.outcome = what == OnTrouble::stop ? StepResult::Outcome::stopped : StepResult::Outcome::skipped;
    r.why = std::move(why);
    for (const TrainBatch& b : s.batches) r.rows.insert(r.rows.end(), b.rows.begin(), b.rows.end());
    std::sort(r.rows.begin(), r.rows.end());
    r.rows.erase(std::unique(r.rows.begin(), r.rows.end()), r.rows.end());
    if (r.outcome == StepResult::Outcome::stopped) s.data.seek(before);
    return r;
  };
  if (counted == 0) return trouble(OnTrouble::skip, "no sequence of the batch has a second token");

  s.parameters.zero_gradients(ctx);
  for (const TrainBatch& b : s.batches) {
    if (stop && stop()) {
      s.data.seek(before);
      r.outcome = StepResult::Outcome::left;
      return r;
    }
    r.sums.add(s.run(ctx, b, 1.0 / double(counted)));
  }
  r.gradient_norm = s.parameters.gradient_norm(ctx);
  const double loss = r.sums.total / double(counted);
  const RunFile& run = *s.in.run;
  if (!std::isfinite(loss)) return trouble(run.on_nan, cat("the loss is ", loss));
  if (!std::isfinite(r.gradient_norm)) return trouble(run.on_nan, cat("the gradient's norm is ", r.gradient_norm));
  if (run.on_spike != OnTrouble::ignore && loss > limit)
    return trouble(run.on_spike, cat("loss ", loss, " is a spike over ", limit / run.spike_factor));
  s.parameters.step(ctx,
                    {.lr = s.spec.lr,
                     .beta1 = s.spec.beta1,
                     .beta2 = s.spec.beta2,
                     .eps = s.spec.eps,
                     .decay = s.spec.decay,
                     .lr_scale = factor,
                     .clip_norm = s.spec.clip},
                    optimizer_step, r.gradient_norm);
  return r;
}

HeldOutResult Stage::evaluate(Context& ctx, const std::function<bool()>& stop) {
  KDA_CHECK(impl_->held_out, "stage '", impl_->spec.name, "': there is no held-out text");
  return impl_->held_out->run(ctx, *impl_->pass, impl_->teacher.get(), stop);
}

}  // namespace kda
