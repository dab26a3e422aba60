// train/run_sources.h — what a run reads: student, teacher and data, opened and checked against each other.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "train/distill.h"
#include "train/stage.h"

namespace kda {

struct RunSources {
  Checkpoint student;
  std::unique_ptr<Checkpoint> teacher;  // live
  std::unique_ptr<Weights> teacher_weights;
  std::vector<DataPart> data;
  std::shared_ptr<const Rows> held_out;                                    // or null
  std::function<std::unique_ptr<Teacher>(Context&, int64_t rows)> stored;  // see StageInput
  std::string data_fingerprint;
};

// Throws Error.
RunSources open_sources(const DistillInput&, const DistillHooks&, ThreadPool&);

}  // namespace kda
