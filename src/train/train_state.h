// train/train_state.h — what a run needs to go on exactly where it stood, and the folder that a run writes:
//   run.yaml            the resolved run file
//   metrics.jsonl       docs/TRAINING.md
//   checkpoint-STEP/    run.yaml, state.json, masters.safetensors, moments.safetensors
//   best/, final/       Hugging Face model folders; final/ marks a finished run
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "train/data.h"
#include "train/parameters.h"

namespace kda {

struct TrainState {
  int64_t step = 0, tokens = 0;       // done, over all stages
  int64_t stage = 0, stage_step = 0;  // steps done of this stage
  int64_t optimizer_step = 0;         // of this stage, skipped ones not counted
  double seconds = 0;                 // of training and evaluation
  double usual_loss = 0;              // running mean for spikes, of `usual_count` losses
  int64_t usual_count = 0, skipped_in_a_row = 0;
  std::optional<double> best;  // held-out value
  int64_t best_step = 0;
  int64_t metrics_bytes = 0;  // of metrics.jsonl
  std::vector<DataCursor> cursor;
  std::string data, model, teacher;  // fingerprints of what the run reads

  bool operator==(const TrainState&) const = default;
};

std::string write_state(const TrainState&);
// Throws Error beginning with `where`.
TrainState read_state(std::string_view json, const std::string& where);

// Appends lines to a file. What does not fit on a full disk is kept and tried again with the next line, so the file
// always ends with a whole line.
class LineLog {
 public:
  explicit LineLog(const std::filesystem::path&);
  ~LineLog();
  LineLog(const LineLog&) = delete;
  LineLog& operator=(const LineLog&) = delete;

  bool append(std::string_view line);  // without its line break; false: nothing could be written now
  int64_t bytes() const { return bytes_; }
  // Cuts the file back. Throws Error when it is shorter.
  void cut(int64_t bytes);

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  int64_t bytes_ = 0;
  std::string waiting_;
};

class RunFolder {
 public:
  // Makes the folder and takes its lock, which ends with the process: one run at a time. Removes what a killed run left
  // half written. Throws Error for a finished run; without `resume` also for one that was begun.
  RunFolder(const std::filesystem::path&, bool resume);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path final_model() const { return path_ / "final"; }
  std::filesystem::path best_model() const { return path_ / "best"; }
  std::optional<std::filesystem::path> last_checkpoint() const;

  // Writes checkpoint-STEP beside its name, then renames it; afterwards only the last `keep` stay. Throws Error when it
  // cannot be written; then all that was there is there still.
  void save(const TrainState&, Parameters&, const std::string& run_yaml, int64_t keep);
  // Of the last checkpoint. Parameters must have the masters it holds (set_trainable was called for the stages so far);
  // they are filled, with their moments, and refreshed by the caller.
  TrainState load_state() const;
  void load_parameters(Context&, Parameters&) const;
  std::string load_run_file() const;

  // A folder to write a model into, and to put into the place of `best` in one go.
  std::filesystem::path best_draft() const;
  void keep_best() const;

 private:
  std::vector<std::pair<int64_t, std::filesystem::path>> checkpoints() const;  // rising steps
  std::filesystem::path path_;
  int lock_ = -1;
};

}  // namespace kda
