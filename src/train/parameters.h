// train/parameters.h — the student's weights while they are trained. Frozen tensors stay the checkpoint's own (mapped,
// shared with the teacher where both hold the same memory). A trainable one has an f32 master, a gradient, AdamW's two
// moments, and under `fast` a bf16 working copy that the products read; under `exact` they read the master.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "model/weights.h"

namespace kda {

// The first rule whose regex (PCRE, found anywhere in the canonical name) matches a parameter decides; a parameter that
// none matches is frozen.
struct ParameterRule {
  std::string regex;
  bool trainable = true;
  double lr = -1;     // < 0: the stage's
  double decay = -1;  // < 0: the stage's where the tensor table says decay, else 0
};

struct AdamWSettings {
  double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0;
  double lr_scale = 1;   // the schedule's factor, for every rate
  double clip_norm = 0;  // 0: none
};

struct Parameter {
  std::string name;
  Tensor stored;                       // as loaded
  Tensor master, grad, m, v, working;  // empty while it was never trainable; working: `fast` and a matrix
  bool trainable = false;
  double lr = -1, decay = -1;  // < 0: the stage's
  bool decays = true;          // the tensor table's word
  bool matrix = false;         // a product's weight, the embedding or the head
};

class Parameters {
 public:
  // Nothing is trainable yet.
  Parameters(Context&, const Checkpoint&);

  // Sets what is trainable; what was keeps its master and moments, and gets a new gradient of zeros. Throws Error for
  // a rule that matches nothing.
  void set_trainable(Context&, const std::vector<ParameterRule>&);

  Weights& weights() { return weights_; }      // what the passes read
  Weights& gradients() { return gradients_; }  // f32; empty where frozen
  std::vector<Parameter>& all() { return parameters_; }
  int64_t count() const;  // trainable numbers

  void zero_gradients(Context&);
  double gradient_norm(Context&);
  // One AdamW step of every trainable tensor; `norm` is gradient_norm()'s, for clipping. step counts from 1.
  void step(Context&, const AdamWSettings&, int64_t step, double norm);
  // After masters were replaced from outside (resume): refreshes the working copies.
  void refresh(Context&);
  int64_t bytes() const;  // masters, gradients, moments, working copies
  // name -> the f32 master, or the stored tensor of one never trainable: what a checkpoint of the student is written from.
  std::map<std::string, ConstView> values() const;

 private:
  std::vector<Parameter> parameters_;
  Weights weights_, gradients_;
};

}  // namespace kda
