// train/objective.h — the losses of a stage: one shift and one mask (TrainBatch::labels) for all of them, so that every
// term counts the same tokens. total = sum(weight L) / sum(weight), as DistillKit @ a61c2e7 has it.
//
// The head and its losses run in chunks of tokens, forward and backward: memory does not grow with T x vocabulary.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/loss.h"
#include "train/teacher.h"

namespace kda {

enum class LossFunction { cross_entropy, kl, jsd, tvd, hinge, logistic_ranking, hs_mse, hs_cosine, mixer_mse };
const char* name_of(LossFunction);

struct LossSpec {
  LossFunction function;
  double weight = 1;
  double temperature = 1;                                 // kl, jsd, tvd
  MissingProbability missing = MissingProbability::zero;  // kl, jsd, tvd with a sparse teacher
  double margin = 0;                                      // hinge
};

// Which outputs hs_mse and hs_cosine compare: hidden_states indices, 0 the embedding, L the stream after layer L.
struct LayerPair {
  int64_t student, teacher;
};

// hs_mse: mean over tokens and channels; mixer_mse: the same of mixer outputs, over all KDA layers of the student;
// hs_cosine: mean over tokens of 1 - cos; each averaged over its layers. The others: means over counted tokens, hinge
// and logistic_ranking over all pairs of all counted tokens.
struct ObjectiveSpec {
  std::vector<LossSpec> losses;
  std::vector<LayerPair> layers;
  bool stored_teacher = false;  // a teacher of log-probabilities stored beforehand; else a model run beside the student
  // Live: the teacher is reduced to its so many likeliest ids, with log-probabilities over the whole vocabulary, and
  // every loss then takes it as it takes a stored one; 0: dense.
  int64_t top_k = 0;
};

// Sums over the counted tokens of one or more batches; add() them up, then divide.
struct LossSums {
  int64_t tokens = 0;
  double total = 0;                         // weighted mean, times tokens: what the gradients are of, times `scale`
  std::vector<double> terms;                // by spec.losses: mean, times tokens
  std::vector<std::vector<double>> layers;  // hs_*, mixer_mse: by layer pair or KDA layer; else empty
  void add(const LossSums&);
};

class Objective {
 public:
  // `student`: the model's weights (must outlive it; its tensors may change between calls). rows: most tokens in a
  // batch. chunk_rows: tokens of logits at once. Throws Error for a loss that this teacher cannot serve (hinge without
  // ids, hidden states from a stored teacher, ..) and for layers that are not there.
  Objective(Context&, const Weights& student, ObjectiveSpec, int64_t rows, int64_t chunk_rows = 512);
  ~Objective();

  const ObjectiveSpec& spec() const;
  TeacherWants wants() const;
  int64_t bytes() const;      // memory it allocates
  bool needs_stream() const;  // a loss besides mixer_mse: the student's forward pass is needed
  std::vector<Tap> taps();    // what the student's forward pass must keep for it
  // After the student's forward pass left its residual stream in x [T,D] (before the final norm; unused when only
  // mixer_mse is asked for): values, and with `gradients` the gradient of scale * total: into d_x [T,D] (written in
  // full), into gradients.final_norm and head.w where they are not empty (added), and cotangents() for backward().
  LossSums run(Context&, const TrainBatch&, const TeacherOutput&, ConstView x, double scale, View d_x,
               Weights* gradients);
  std::span<const Cotangent> cotangents() const;
  // mixer_mse: runs each KDA layer of the student on the teacher's input; gradients as above (nullptr: values only).
  // Beside other losses its sums hold no tokens, since run() counted them: add() both up.
  LossSums run_mixers(Context&, TrainPass&, const TrainBatch&, const TeacherOutput&, double scale, Weights* gradients);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kda
