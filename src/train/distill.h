// train/distill.h — a whole run: stages, evaluation, checkpoints, metrics, the final model. docs/TRAINING.md.
#pragma once
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "train/run_file.h"
#include "train/train_state.h"

namespace kda {

struct DistillInput {
  RunFile run;
  std::filesystem::path student,
      teacher;                  // model folders, as run.model and run.teacher.path resolve; teacher: live only
  std::filesystem::path cache;  // folder for token caches
  bool resume = false;
};

// What the caller hears while a run goes on. Each may be empty.
struct DistillHooks {
  std::function<void(const std::string&)> note;                                       // a line for the user
  std::function<void(const std::string& what, int64_t done, int64_t total)> reading;  // of text being tokenized, bytes

  struct Progress {
    std::string stage;
    int64_t step = 0, steps = 0;         // of the whole run
    int64_t tokens = 0, all_tokens = 0;  // of the whole run
    double loss = 0, lr = 0, gradient_norm = 0, tok_per_s = 0, seconds_left = 0;
    std::map<std::string, double> terms;
  };
  std::function<void(const Progress&)> step;
  struct Evaluation {
    std::string stage;
    int64_t step = 0;
    std::map<std::string, double> terms, probes;
    std::optional<double> top1;
    bool best = false;
  };
  std::function<void(const Evaluation&)> evaluated;

  std::function<bool()> stop;  // asked between batches: true saves and leaves
  // Scores of the student, by name, for metrics.jsonl.
  std::function<std::map<std::string, double>(const Weights&)> probes;
};

enum class RunEnd { finished, left };

// Runs it to its end, or until `stop`. Throws Error; what the last checkpoint holds is never lost.
RunEnd distill(const DistillInput&, const DistillHooks&);

// A resumed run must be the one that was begun: throws Error naming the first line that differs, but for what cannot
// change the weights (threads, logging, evaluation, checkpoints, what to do in trouble, paths).
void check_same_run(const RunFile& begun, const RunFile& now, const std::string& where);

// Tensors of the student that hold the same bytes as the teacher's of that name share its memory from then on.
// Returns the bytes shared.
int64_t share_tensors(Checkpoint& student, const Checkpoint& teacher, ThreadPool&);

}  // namespace kda
