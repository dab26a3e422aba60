// train/run_file.h — what a run is: DistillKit's YAML keys where they exist, and stages. docs/RUN_FILE.md lists every
// key; it is made from the same table that reads them (run_keys.cc).
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"
#include "train/objective.h"
#include "train/parameters.h"

namespace kda {

struct DatasetSpec {
  std::string path;  // file or folder: JSONL, text, token shards, or one written by kda capture
  std::string text_key = "text";
  double weight = 0;       // in a mixture; 0 everywhere: by size
  bool drop_long = false;  // rows longer than the sequence are left out, the others never cut
};

enum class TeacherKind { none, live, stored };
struct TeacherSpec {
  TeacherKind kind = TeacherKind::none;
  std::string path =
      {};  // live: a model folder; stored: empty, the rows of the training data carry its log-probabilities
  std::string codec = {};  // stored, Parquet: DistillKit's logprob_compressor as one JSON object
  int64_t top_k = 0;       // live: only so many of its likeliest ids count; 0: all
};

enum class ScheduleKind { constant, linear, cosine, wsd };
struct ScheduleSpec {
  ScheduleKind kind = ScheduleKind::linear;
  double min_ratio = 0;      // of the peak rate, at the end (linear, cosine, wsd)
  double decay_ratio = 0.2;  // wsd: share of the steps that fall
  double warmup_ratio = 0;   // share of the steps
  int64_t warmup_steps = 0;  // above 0: instead of the share
};

struct RateSpec {
  std::string match;           // regex, found anywhere in a parameter's name
  double lr = -1, decay = -1;  // < 0: the stage's
};

struct StageSpec {
  std::string name = "train";
  std::vector<LossSpec> losses;
  bool all_layers = true;                      // hs_*: every layer's output
  std::vector<LayerPair> layers;               // hs_*, when not all
  std::vector<std::string> trainable, frozen;  // regexes; frozen goes first, trainable empty: all
  std::vector<RateSpec> rates;
  int64_t sequence_length = 0, batch_size = 1, accumulate = 1;
  int64_t tokens = 0, steps = 0;  // one of the two, else epochs
  double epochs = 0;
  double lr = 1e-5, decay = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, clip = 1;
  ScheduleSpec schedule;
  bool recompute = false;

  int64_t batch_tokens() const { return batch_size * sequence_length; }
  int64_t step_tokens() const { return batch_tokens() * accumulate; }
};

struct ProbeSpec {
  std::string needles, arithmetic;  // files of questions; empty: not asked
  int64_t needle_keys = 1, needle_max_chars = 3000, needle_limit = 0, arithmetic_limit = 0;
};

struct EvalSpec {
  std::optional<DatasetSpec> dataset;
  int64_t rows = 0;             // without a data set of its own: rows held out from the training data
  int64_t every = 0;            // steps; 0: only at the ends of stages
  int64_t tokens = 65536;       // at most; 0: all
  int64_t sequence_length = 0;  // 0: each stage's
  bool only_first = false;      // of each row only the first sequence_length tokens
  ProbeSpec probes;
  int64_t probes_every = 0;  // steps; 0: only at the ends of stages
};

enum class OnTrouble { stop, skip, ignore };

struct RunFile {
  std::string project_name, model, output;
  std::vector<DatasetSpec> datasets;
  int64_t dataset_rows = 0;  // at most so many of the training rows; 0: all
  std::string cache;         // folder for token caches; empty: the caller's
  TeacherSpec teacher;
  EvalSpec eval;
  std::vector<StageSpec> stages;
  int64_t save_every = 0, keep_last = 2, log_every = 1;
  std::string best_by = "kl";  // a held-out term, `loss` or `top1`
  OnTrouble on_nan = OnTrouble::stop, on_spike = OnTrouble::ignore;
  double spike_factor = 4;
  Precision precision = Precision::fast;
  int threads = 0;
  uint64_t seed = 42;
  std::string dtype;  // of the final model: bf16, f32, or empty: as the model was stored
};

// Throws Error naming file and line: an unknown key (with the nearest known one), a value of the wrong kind, a key that
// cannot be honoured. `notes`: keys that were accepted and have no effect here, one sentence each. With `only_text` the
// run is `kda train`'s: cross-entropy without a teacher.
RunFile read_run_file(std::string_view text, const std::string& name, const std::vector<std::string>& settings,
                      bool only_text, std::vector<std::string>& notes);

// Every key with its value, defaults included; read_run_file gives the same run again.
std::string write_run_file(const RunFile&);

// docs/RUN_FILE.md.
std::string describe_run_keys();

// What a stage trains, as Parameters takes it.
std::vector<ParameterRule> parameter_rules(const StageSpec&);

// The stage's optimizer steps; `epoch_tokens`: the training data once, for stages that are given in epochs.
int64_t steps_of(const StageSpec&, int64_t epoch_tokens);

}  // namespace kda
