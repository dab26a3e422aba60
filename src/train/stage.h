// train/stage.h — one stage of a run: what it trains, by which losses, on which batches; one optimizer step at a time.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "train/data.h"
#include "train/held_out.h"
#include "train/parameters.h"
#include "train/run_file.h"

namespace kda {

// What stages have in common; must outlive them.
struct StageInput {
  const RunFile* run = nullptr;
  Parameters* parameters = nullptr;
  const Weights* teacher = nullptr;  // live, or null
  // A teacher of stored log-probabilities for batches of so many tokens, or empty.
  std::function<std::unique_ptr<Teacher>(Context&, int64_t rows)> stored = {};
  std::vector<DataPart> data;
  std::shared_ptr<const Rows> held_out;  // or null
};

// One optimizer step, or a try at one.
struct StepResult {
  enum class Outcome { done, skipped, stopped, left };  // left: `stop` said so, nothing was changed
  Outcome outcome = Outcome::done;
  std::string why;            // skipped, stopped
  std::vector<int64_t> rows;  // skipped, stopped: the batch's rows
  LossSums sums;
  int64_t tokens = 0;
  double lr = 0, gradient_norm = 0;
};

class Stage {
 public:
  // Sets what is trainable; makes teacher, losses, buffers. `begin`: moments start from zero; not so when a checkpoint
  // will fill them. Throws Error.
  Stage(Context&, const StageInput&, const StageSpec&, const std::vector<DataCursor>& cursor, bool begin);
  ~Stage();

  int64_t steps() const;
  const std::vector<std::string>& terms() const;  // names of the losses, as in LossSums
  std::vector<DataCursor> cursor() const;
  // Memory by what it is for, in bytes, beside the stored weights.
  std::vector<std::pair<std::string, int64_t>> memory() const;
  int64_t trainable() const;

  // Step `step` of [0,steps()), the optimizer's `optimizer_step`th (from 1). `limit`: a loss above it is a spike.
  // What is not applied leaves the weights as they were; after `left` and `stopped` the data stand where they stood.
  StepResult step(Context&, int64_t step, int64_t optimizer_step, double limit, const std::function<bool()>& stop);

  bool has_held_out() const;
  HeldOutResult evaluate(Context&, const std::function<bool()>& stop);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// What a stage trains, as Parameters takes it: parameter_rules(), and with mixer_mse alone the KDA mixers if the stage
// does not say.
std::vector<ParameterRule> stage_rules(StageSpec, const ModelConfig&);

}  // namespace kda
