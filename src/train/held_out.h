// train/held_out.h — how good the student is on text it does not learn from: every loss of the stage, and beside them,
// whatever the stage trains on, cross_entropy, kl at temperature 1 and the share of tokens where both models' likeliest
// token is the same, so that curves go on across stages.
#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "train/batch.h"
#include "train/objective.h"

namespace kda {

// "kl", or "kl_t2" where the temperature is not 1; what stands twice gets a number: "kl", "kl#2".
std::vector<std::string> term_names(const std::vector<LossSpec>&);

struct HeldOutResult {
  std::map<std::string, double> terms;  // by name; "loss": the stage's weighted mean
  std::map<std::string, std::vector<double>> layers;
  std::optional<double> top1;
  int64_t tokens = 0;  // counted
};

class HeldOut {
 public:
  // `spec`: the stage's. With a teacher (and a spec that lets it say so) kl and top1 are added. `mixers_only`: the
  // training pass has no room for a forward pass of the whole, so this makes its own.
  HeldOut(Context&, const Weights& student, std::vector<TrainBatch>, ObjectiveSpec spec, bool has_teacher,
          const TrainSizes& training);
  ~HeldOut();

  TeacherWants wants() const;
  int64_t bytes() const;
  int64_t rows() const;  // most tokens in one of its batches
  static TrainSizes sizes_of(const std::vector<TrainBatch>&);

  // `pass`: the training pass, whose activations are lost. teacher may be null. `stop` is asked between batches.
  HeldOutResult run(Context&, TrainPass& pass, Teacher* teacher, const std::function<bool()>& stop = {});

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kda
