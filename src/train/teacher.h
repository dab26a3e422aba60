// train/teacher.h — what the student learns from: a model run beside it, or log-probabilities stored beforehand.
#pragma once
#include <map>
#include <memory>
#include <vector>

#include "train/batch.h"

namespace kda {

// What a stage's losses need of the teacher; nothing else is computed.
struct TeacherWants {
  bool logits = false;
  std::vector<int64_t>
      hidden;  // indices as in transformers' hidden_states: 0 the embedding, L the stream after layer L
  std::vector<int64_t> mixers;  // layers from 0: mixer input (after the norm) and mixer output
};

// Of one batch; valid until the next run(). Empty views: not wanted or not there.
struct TeacherOutput {
  const Weights* weights =
      nullptr;              // live: logits = head(rms_norm(x, final_norm)), computed in chunks by whoever needs them
  ConstView x;              // live: f32 [T,D]  residual stream after the last layer
  ConstView ids, logprobs;  // stored: i32 [T,k], f32 [T,k] natural logs, falling
  std::map<int64_t, ConstView> hidden;               // f32 [T,D]
  std::map<int64_t, ConstView> mixer_in, mixer_out;  // f32 [T,D]
};

class Teacher {
 public:
  virtual ~Teacher() = default;
  virtual const TeacherOutput& run(Context&, const TrainBatch&) = 0;
  virtual int64_t bytes() const = 0;  // memory it holds besides weights
};

// `weights` must outlive it. rows: most tokens in a batch; longest: most in a sequence. Runs in blocks of tokens with
// the state carried over, so that memory beyond the outputs does not grow with the length (keys and values excepted).
std::unique_ptr<Teacher> live_teacher(Context&, const Weights&, const TeacherWants&, int64_t rows, int64_t longest);

}  // namespace kda
