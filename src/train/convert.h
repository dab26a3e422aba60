// train/convert.h — a full-attention teacher becomes the start of a KDA student: what can be copied is copied bit for
// bit, grouped key and value heads are repeated, the new parts are as fla starts them or follow from the teacher.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "train/calibrate.h"
#include "train/write_model.h"

namespace kda {

enum class StudentInit { fla, calibrated };

struct ConvertOptions {
  std::string kda = "all";                  // layers that become KDA: checkpoint/layer_pattern.h
  std::optional<bool> keep_positions = {};  // of layers that stay full attention; empty: not in a hybrid:.., else yes
  bool bounded_gate = false;                // else softplus
  double lower_bound = -5;                  // bounded gate
  StudentInit init = StudentInit::fla;
  uint64_t seed = 0;  // of the new parts that are random
};

// The student's config: which layers are KDA, with as many heads as the teacher has query heads and K = V = its head
// width. Throws Error for a layer that is KDA already, for biases KDA has no place for, for a model type that cannot
// say it (fla's own), for a second kind of gate.
ModelConfig student_config(const ModelConfig& teacher, const ConvertOptions&);

// The student's weights, made when asked for. `teacher` and `calibration` must outlive it; `calibration` is used with
// StudentInit::calibrated and must have every layer that becomes KDA.
TensorSource student_weights(const Checkpoint& teacher, const ModelConfig& student, const ConvertOptions&,
                             const std::map<int64_t, LayerCalibration>& calibration);

// README.md of the student: what was done, to which model.
std::string student_card(const Checkpoint& teacher, const ModelConfig& student, const ConvertOptions&,
                         int64_t sample_tokens);

}  // namespace kda
