#include "train/distill.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "base/memory.h"
#include "train/metrics.h"
#include "train/run_sources.h"
#include "train/stage.h"
#include "train/write_model.h"

namespace kda {

namespace {
namespace fs = std::filesystem;
constexpr int64_t kUsualAfter = 20;   // losses before a spike can be told
constexpr double kUsualOver = 50;     // losses in the running mean
constexpr int64_t kMostSkipped = 20;  // in a row, then the run stops

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The run with all that cannot change the weights left out.
RunFile what_counts(RunFile r) {
  const RunFile fresh;
  r.project_name = r.model = r.output = r.cache = "";
  r.teacher.path = r.teacher.kind == TeacherKind::live ? "teacher" : "";
  for (DatasetSpec& d : r.datasets) d.path = "data";
  const int64_t rows = r.eval.rows;  // these are taken out of the training data
  r.eval = fresh.eval;
  r.eval.rows = rows;
  r.save_every = fresh.save_every, r.keep_last = fresh.keep_last, r.log_every = fresh.log_every,
  r.best_by = fresh.best_by;
  r.on_nan = fresh.on_nan, r.on_spike = fresh.on_spike, r.spike_factor = fresh.spike_factor;
  r.threads = fresh.threads;
  r.dtype = fresh.dtype;
  return r;
}
}  // namespace

void check_same_run(const RunFile& begun, const RunFile& now, const std::string& where) {
  std::istringstream a(write_run_file(what_counts(begun))), b(write_run_file(what_counts(now)));
  std::string line_a, line_b;
  for (;;) {
    const bool more_a = bool(std::getline(a, line_a)), more_b = bool(std::getline(b, line_b));
    if (!more_a && !more_b) return;
    KDA_CHECK(more_a && more_b && line_a == line_b, where, ": the run was begun with `", more_a ? line_a : "",
              "`, the run file now says `", more_b ? line_b : "",
              "`; resume it as it was, or give another output_path");
  }
}

namespace {
class Run {
 public:
  Run(const DistillInput& in, const DistillHooks& hooks)
      : run_(in.run), hooks_(hooks), folder_(in.run.output, in.resume), pool_(in.run.threads), source_(in.student) {
    ctx_.backend = &cpu_backend();
    ctx_.pool = &pool_;
    ctx_.precision = in.run.precision;
    if (in.resume && folder_.last_checkpoint()) {
      state_ = folder_.load_state();
      std::vector<std::string> ignored;
      check_same_run(read_run_file(folder_.load_run_file(), (*folder_.last_checkpoint() / "run.yaml").string(), {},
                                   run_.teacher.kind == TeacherKind::none, ignored),
                     run_, folder_.last_checkpoint()->string());
      resumed_ = true;
    }
    sources_ = open_sources(in, hooks, pool_);
    check_fingerprints();
    parameters_ = std::make_unique<Parameters>(ctx_, sources_.student);
    input_ = {.run = &run_,
              .parameters = parameters_.get(),
              .teacher = sources_.teacher_weights.get(),
              .stored = sources_.stored,
              .data = sources_.data,
              .held_out = sources_.held_out};
    for (const StageSpec& s : run_.stages) {
      int64_t epoch = 0;
      for (const DataPart& p : sources_.data) epoch += yield_of(p, s.sequence_length).tokens;
      all_steps_ += steps_of(s, epoch);
      all_tokens_ += steps_of(s, epoch) * s.step_tokens();
    }
    check_best_by();
    metrics_ = std::make_unique<LineLog>(folder_.path() / "metrics.jsonl");
    metrics_->cut(resumed_ ? state_.metrics_bytes : 0);
    AtomicFile yaml(folder_.path() / "run.yaml");
    yaml.write(write_run_file(run_));
    yaml.commit();
  }

  RunEnd go() {
    const int64_t first = state_.stage;
    for (int64_t i = 0; i < first; ++i)  // makes the masters of what was trained before
      parameters_->set_trainable(ctx_, rules_of(size_t(i)));
    for (; state_.stage < int64_t(run_.stages.size()); next_stage())
      if (!run_stage(resumed_ && state_.stage == first)) return RunEnd::left;
    write_final();
    return RunEnd::finished;
  }

 private:
  const StageSpec& spec() const { return run_.stages[size_t(state_.stage)]; }
  MetricsPlace place() const { return {spec().name, state_.step, state_.tokens, state_.seconds}; }
  void note(const std::string& line) const {
    if (hooks_.note) hooks_.note(line);
  }
  bool stop_wanted() const { return hooks_.stop && hooks_.stop(); }

  std::vector<ParameterRule> rules_of(size_t stage) const {
    return stage_rules(run_.stages[stage], sources_.student.config);
  }

  void check_fingerprints() {
    const std::string teacher = sources_.teacher ? sources_.teacher->fingerprint : "";
    for (const auto& [what, begun, now] : {std::tuple{"training data", state_.data, sources_.data_fingerprint},
                                           std::tuple{"student", state_.model, sources_.student.fingerprint},
                                           std::tuple{"teacher", state_.teacher, teacher}})
      KDA_CHECK(!resumed_ || begun == now, folder_.last_checkpoint().value_or("").string(), ": the ", what,
                " is not the one this run began with");
    state_.data = sources_.data_fingerprint;
    state_.model = sources_.student.fingerprint;
    state_.teacher = teacher;
  }

  // The term that the best checkpoint is chosen by must be there in every stage.
  void check_best_by() {
    if (!sources_.held_out) return;
    const bool teacher = run_.teacher.kind != TeacherKind::none;
    best_by_ = run_.best_by == "kl" && !teacher ? "cross_entropy" : run_.best_by;
    if (best_by_ == "loss" || best_by_ == "cross_entropy" || ((best_by_ == "kl" || best_by_ == "top1") && teacher))
      return;
    for (const StageSpec& s : run_.stages) {
      const auto names = term_names(s.losses);
      KDA_CHECK(std::find(names.begin(), names.end(), best_by_) != names.end(), "checkpoints.best_by: stage '", s.name,
                "' has no held-out term '", best_by_, "'");
    }
  }

  void next_stage() {
    const int64_t length = spec().sequence_length;
    ++state_.stage;
    state_.stage_step = state_.optimizer_step = 0;
    state_.usual_loss = 0;
    state_.usual_count = 0;
    if (state_.stage < int64_t(run_.stages.size()))
      state_.cursor = TrainData::carry_over(state_.cursor, spec().sequence_length == length);
  }

  // Returns false when the run was told to stop.
  bool run_stage(bool from_checkpoint) {
    if (state_.cursor.empty()) state_.cursor.resize(sources_.data.size());
    const int64_t before = resident_bytes();
    stage_.reset();
    stage_ = std::make_unique<Stage>(ctx_, input_, spec(), state_.cursor, !from_checkpoint);
    if (from_checkpoint) {
      folder_.load_parameters(ctx_, *parameters_);
      parameters_->refresh(ctx_);
    }
    print_plan(before);
    mark_ = now_s();
    interval_ = {};
    if (state_.step == 0 && !resumed_ && !evaluate(true, true)) return leave();
    while (state_.stage_step < stage_->steps()) {
      if (stop_wanted()) return leave();
      if (!one_step()) return leave();
      const bool last = state_.stage_step == stage_->steps();
      const auto due = [&](int64_t every) { return last || (every && state_.step % every == 0); };
      if (!evaluate(due(run_.eval.every), due(run_.eval.probes_every))) return leave();
      if (last || (run_.save_every && state_.step % run_.save_every == 0)) save();
    }
    return true;
  }

  // A checkpoint where the run stands; always false.
  bool leave() {
    count_seconds();
    save();
    return false;
  }

  void count_seconds() {
    const double t = now_s();
    state_.seconds += t - mark_;
    mark_ = t;
  }

  bool one_step() {
    const double limit = state_.usual_count >= kUsualAfter ? state_.usual_loss * run_.spike_factor
                                                           : std::numeric_limits<double>::infinity();
    const double began = now_s();
    const StepResult r = stage_->step(ctx_, state_.stage_step, state_.optimizer_step + 1, limit, hooks_.stop);
    if (r.outcome == StepResult::Outcome::left) return false;
    interval_seconds_ += now_s() - began;
    count_seconds();
    if (r.outcome == StepResult::Outcome::stopped) {
      event("stopped", r.why, r.rows);
      save();
      std::string rows;
      for (size_t i = 0; i < r.rows.size(); ++i) rows += cat(i ? "," : "", r.rows[i]);
      throw Error(
          cat("step ", state_.step + 1, " (stage '", spec().name, "'): ", r.why, "; rows of the data: ", rows,
              ". The run was saved before that step; --resume with on_nan: skip or on_spike: skip goes on without it"));
    }
    state_.cursor = stage_->cursor();
    ++state_.step;
    ++state_.stage_step;
    state_.tokens += r.tokens;
    if (r.outcome == StepResult::Outcome::skipped) {
      event("skipped", r.why, r.rows);
      note(cat("step ", state_.step, " was skipped: ", r.why));
      KDA_CHECK(++state_.skipped_in_a_row < kMostSkipped, "step ", state_.step, ": ", kMostSkipped,
                " steps in a row were skipped, the last because ", r.why, "; the last checkpoint is from before");
      return true;
    }
    state_.skipped_in_a_row = 0;
    ++state_.optimizer_step;
    const double loss = r.sums.total / double(r.sums.tokens);
    ++state_.usual_count;
    state_.usual_loss += (loss - state_.usual_loss) / std::min(double(state_.usual_count), kUsualOver);
    interval_.add(r.sums);
    interval_tokens_ += r.tokens;
    report(r, loss);
    return true;
  }

  void report(const StepResult& r, double loss) {
    const double rate = double(interval_tokens_) / std::max(interval_seconds_, 1e-9);
    rate_ = rate_ == 0 ? rate : 0.9 * rate_ + 0.1 * rate;
    if (hooks_.step) {
      DistillHooks::Progress p{.stage = spec().name,
                               .step = state_.step,
                               .steps = all_steps_,
                               .tokens = state_.tokens,
                               .all_tokens = all_tokens_,
                               .loss = loss,
                               .lr = r.lr,
                               .gradient_norm = r.gradient_norm,
                               .tok_per_s = rate_,
                               .seconds_left = double(all_tokens_ - state_.tokens) / std::max(rate_, 1e-9),
                               .terms = {}};
      for (size_t i = 0; i < stage_->terms().size(); ++i)
        p.terms[stage_->terms()[i]] = r.sums.terms[i] / double(r.sums.tokens);
      hooks_.step(p);
    }
    const bool last = state_.stage_step == stage_->steps();  // the next stage has other losses
    if (state_.step % run_.log_every != 0 && state_.step != 1 && !last) return;
    write(train_line(place(), interval_, stage_->terms(), r.lr, r.gradient_norm, rate));
    interval_ = {};
    interval_tokens_ = 0;
    interval_seconds_ = 0;
  }

  // Returns false when told to stop. A part of an evaluation would be a wrong one and is left out of the metrics; the
  // weights do not depend on it.
  bool evaluate(bool held_out, bool probes) {
    held_out = held_out && stage_->has_held_out();
    probes = probes && hooks_.probes;
    if (!held_out && !probes) return true;
    DistillHooks::Evaluation e{
        .stage = spec().name, .step = state_.step, .terms = {}, .probes = {}, .top1 = {}, .best = false};
    HeldOutResult h;
    if (held_out) {
      h = stage_->evaluate(ctx_, hooks_.stop);
      if (stop_wanted()) return false;
      e.terms = h.terms;
      e.top1 = h.top1;
    }
    if (probes) {
      e.probes = hooks_.probes(parameters_->weights());
      if (stop_wanted()) return false;
    }
    count_seconds();
    write(eval_line(place(), h.terms, h.layers, h.top1, e.probes));
    if (held_out && state_.step > 0) e.best = is_best(h);
    if (hooks_.evaluated) hooks_.evaluated(e);
    return true;
  }

  bool is_best(const HeldOutResult& h) {
    if (h.tokens == 0) return false;
    const double value = best_by_ == "top1" ? h.top1.value_or(0) : h.terms.at(best_by_);
    if (!std::isfinite(value)) return false;
    if (state_.best && (best_by_ == "top1" ? value <= *state_.best : value >= *state_.best)) return false;
    try {
      write_model(folder_.best_draft());
      folder_.keep_best();
    } catch (const Error& error) {
      event("best not kept", error.what(), {});
      note(cat("warning: the best model so far could not be kept: ", error.what()));
      return false;
    }
    state_.best = value;
    state_.best_step = state_.step;
    return true;
  }

  // A checkpoint that cannot be written (a full disk) costs no more than itself.
  void save() {
    state_.cursor = stage_->cursor();
    state_.metrics_bytes = metrics_->bytes();
    try {
      folder_.save(state_, *parameters_, write_run_file(run_), run_.keep_last);
    } catch (const Error& error) {
      event("not saved", error.what(), {});
      note(cat("warning: no checkpoint at step ", state_.step, ": ", error.what()));
    }
  }

  void write_model(const fs::path& to) {
    const ModelConfig& config = sources_.student.config;
    const Dtype stored = run_.dtype == "f32" ? Dtype::f32 : run_.dtype == "bf16" ? Dtype::bf16 : config.dtype;
    write_model_folder(to, config, parameters_->values(), stored, source_, card());
  }

  std::string card() const {
    std::string out =
        cat("# ", run_.project_name.empty() ? "A model trained by kda.cpp" : run_.project_name, "\n\nTrained from `",
            source_.string(), "`",
            run_.teacher.kind == TeacherKind::live ? cat(" after the teacher `", run_.teacher.path, "`") : "", ", ",
            state_.step, " steps, ", state_.tokens, " tokens.\n\nThe run file:\n\n```yaml\n");
    return out + write_run_file(run_) + "```\n";
  }

  void write_final() {
    note(cat("writing ", folder_.final_model().string()));
    write_model(folder_.final_model());
  }

  void write(const std::string& line) {
    if (!metrics_->append(line))
      note("warning: metrics.jsonl cannot be written now (disk full?); lines are kept for later");
  }
  void event(const std::string& what, const std::string& why, const std::vector<int64_t>& rows) {
    write(event_line({spec().name, state_.step, state_.tokens, state_.seconds}, what, why, rows));
  }

  void print_plan(int64_t before) {
    note(cat("stage '", spec().name, "': ", stage_->steps() - state_.stage_step, " of ", stage_->steps(), " steps of ",
             spec().step_tokens(), " tokens, ", stage_->trainable(), " trainable parameters"));
    for (size_t i = 0; i < sources_.data.size(); ++i) {
      const DataYield y = yield_of(sources_.data[i], spec().sequence_length);
      if (y.dropped_rows)
        note(cat("  ", run_.datasets[i].path, ": ", y.dropped_rows, " of ", sources_.data[i].rows->count(),
                 " rows are dropped, being longer than ", spec().sequence_length, " tokens: ", y.dropped_tokens, " of ",
                 y.tokens + y.dropped_tokens, " tokens"));
    }
    int64_t sum = 0;
    for (const auto& [what, bytes] : stage_->memory()) {
      note(cat("  ", what, ": ", bytes, " bytes"));
      sum += bytes;
    }
    note(cat("  in all ", sum, " bytes, beside ", before, " resident before"));
  }

  const RunFile& run_;
  const DistillHooks& hooks_;
  RunFolder folder_;
  ThreadPool pool_;
  Context ctx_;
  fs::path source_;
  TrainState state_;
  bool resumed_ = false;
  RunSources sources_;
  std::unique_ptr<Parameters> parameters_;
  StageInput input_;
  std::unique_ptr<Stage> stage_;
  std::unique_ptr<LineLog> metrics_;
  std::string best_by_;
  int64_t all_steps_ = 0, all_tokens_ = 0;
  LossSums interval_;  // since the last line of metrics
  int64_t interval_tokens_ = 0;
  double interval_seconds_ = 0, mark_ = 0, rate_ = 0;
};
}  // namespace

RunEnd distill(const DistillInput& in, const DistillHooks& hooks) { return Run(in, hooks).go(); }

}  // namespace kda
