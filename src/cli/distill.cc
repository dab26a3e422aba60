// cli/distill.cc — `kda distill RUN.yaml`: a student learns from a teacher. `kda train RUN.yaml`: from text alone.
#include "train/distill.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <iomanip>
#include <iostream>
#include <memory>
#include <sstream>

#include "base/file.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/probes.h"

namespace kda::cli {

namespace {
struct Options {
  std::string file;
  std::vector<std::string> settings;
  bool resume = false, keys = false;
  double minutes = 0;
};

// Set by Ctrl-C. The first one asks the run to save and leave, a second one ends the program at once, unless it comes
// within a second: then it is the same one, told twice, as `timeout` tells a program and then its group.
std::atomic<bool> interrupted{false};
std::atomic<int64_t> interrupted_at{0};  // milliseconds of the steady clock
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

void on_interrupt(int signal) {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t ms = int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
  if (!interrupted.exchange(true)) {
    interrupted_at = ms;
  } else if (ms - interrupted_at > 1000) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string number(double x) {
  std::ostringstream s;
  s << std::setprecision(4) << x;
  return s.str();
}

// Terms and scores as `kl 0.61  top1 0.8`.
std::string listed(const std::map<std::string, double>& values) {
  std::string out;
  for (const auto& [name, value] : values) out += cat(out.empty() ? "" : "  ", name, " ", number(value));
  return out;
}

// One line that is drawn over on a terminal; in a log a line every ten seconds. Notes stand on lines of their own.
class Display {
 public:
  Display() : style_(progress_style(stderr)) {}
  ~Display() { clear(); }

  void note(const std::string& line) {
    clear();
    std::cerr << line << '\n';
  }
  void reading(const std::string& what, int64_t done, int64_t total) {
    draw(cat(what, " ", total ? 100 * done / total : 100, "% of ", with_prefix(double(total), "B")), done == total);
  }
  void step(const DistillHooks::Progress& p) {
    const int width = 20, full = p.steps ? int(width * p.step / p.steps) : width;
    draw(
        cat(p.stage, " [", std::string(size_t(full), '#'), std::string(size_t(width - full), '.'), "] ", p.step, "/",
            p.steps, "  ", with_prefix(double(p.tokens), "tok"), "  ", with_prefix(p.tok_per_s, "tok/s"), "  ",
            clock_time(p.seconds_left), " left  loss ", number(p.loss),
            p.terms.size() > 1 ? "  " + listed(p.terms) : "", "  lr ", number(p.lr), "  |g| ", number(p.gradient_norm)),
        p.step == p.steps);
  }

 private:
  void draw(const std::string& line, bool last) {
    const double t = now_s();
    if (!last && t - drawn_at_ < (style_ == ProgressStyle::bar ? 0.1 : 10)) return;
    drawn_at_ = t;
    if (style_ != ProgressStyle::bar) {
      std::cerr << line << '\n';
      return;
    }
    const size_t before = drawn_;
    drawn_ = line.size();
    std::cerr << '\r' << line << std::string(before > drawn_ ? before - drawn_ : 0, ' ') << std::flush;
  }
  void clear() {
    if (drawn_) std::cerr << '\r' << std::string(drawn_, ' ') << '\r';
    drawn_ = 0;
  }
  ProgressStyle style_;
  double drawn_at_ = -1e9;
  size_t drawn_ = 0;
};

bool wants_probes(const ProbeSpec& p) { return !p.needles.empty() || !p.arithmetic.empty(); }

void run(const Options& o, bool only_text) {
  if (o.keys) {
    std::cout << describe_run_keys();
    return;
  }
  KDA_CHECK(!o.file.empty(), "needed a run file; `kda ", only_text ? "train" : "distill", " --keys` lists its keys");
  std::vector<std::string> notes;
  DistillInput in;
  in.run = read_run_file(read_file(o.file, size_t(1) << 20), o.file, o.settings, only_text, notes);
  for (const std::string& n : notes) std::cerr << "note: " << n << '\n';
  in.student = model_folder(in.run.model);
  if (in.run.teacher.kind == TeacherKind::live) in.teacher = model_folder(in.run.teacher.path);
  in.cache = in.run.cache.empty() ? user_cache() : std::filesystem::path(in.run.cache);
  in.resume = o.resume;

  Display display;
  DistillHooks hooks;
  hooks.note = [&](const std::string& line) { display.note(line); };
  hooks.reading = [&](const std::string& what, int64_t done, int64_t total) { display.reading(what, done, total); };
  hooks.step = [&](const DistillHooks::Progress& p) { display.step(p); };
  hooks.evaluated = [&](const DistillHooks::Evaluation& e) {
    display.note(cat("step ", e.step, " held out: ", listed(e.terms), e.top1 ? cat("  top1 ", number(*e.top1)) : "",
                     e.probes.empty() ? "" : "  " + listed(e.probes), e.best ? "  (best so far)" : ""));
  };
  const double end = o.minutes > 0 ? now_s() + 60 * o.minutes : 0;
  hooks.stop = [end] { return interrupted || (end > 0 && now_s() >= end); };
  const ProbeSpec& p = in.run.eval.probes;
  if (wants_probes(p)) {
    ProbeFiles files;
    files.needles = p.needles;
    files.needle_filter.keys = p.needle_keys;
    files.needle_filter.max_chars = p.needle_max_chars;
    files.needle_filter.limit = p.needle_limit;
    files.arithmetic = p.arithmetic;
    files.arithmetic_limit = p.arithmetic_limit;
    EngineOptions engine;
    engine.precision = in.run.precision;
    engine.threads = in.run.threads;
    hooks.probes = make_probes(files, in.student, engine);
  }

  interrupted = false;
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  const RunEnd how = distill(in, hooks);
  display.note(how == RunEnd::finished ? cat(in.run.output, "/final: done")
                                       : cat(in.run.output, ": saved; go on with --resume"));
}

void add(CLI::App& app, const char* name, const char* what, bool only_text) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(name, what);
  c->add_option("run", o->file, "run file (YAML)");
  c->add_option("--set", o->settings,
                "KEY=VALUE in place of the run file's: --set stages.0.tokens=1e6; may be repeated")
      ->allow_extra_args(false);
  c->add_flag("--resume", o->resume, "go on from the last checkpoint in output_path");
  c->add_option("--minutes", o->minutes, "save and leave after so many; 0: never")->check(at_least(0));
  c->add_flag("--keys", o->keys, "print every key of a run file and leave");
  c->callback([o, only_text] { run(*o, only_text); });
}
}  // namespace

void add_distill(CLI::App& app) { add(app, "distill", "Train a student on a teacher, as a run file says", false); }
void add_train(CLI::App& app) { add(app, "train", "Train a model on text, as a run file says", true); }

}  // namespace kda::cli
