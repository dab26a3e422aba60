// kernels/loss.h — distillation losses over rows of logits and over hidden states, with their gradients.
//
// With x student logits, t teacher logits, T temperature, q = softmax(x/T) over the whole vocabulary:
//   cross_entropy     -ln softmax(x)[label]
//   kl, jsd, tvd      of p = softmax(t/T) (dense) or of a teacher known by its k likeliest ids, times T^2
//   hinge, logistic_ranking   over pairs of the k ids; a row's value is the SUM over its pairs
// Sparse teachers: `zero` renormalises p over the k ids; `symmetric_uniform` adds one entry for all other ids. Values
// and gradients equal DistillKit's @ a61c2e7 (distillkit/lossfuncs), whose means over tokens or pairs are taken by the
// caller through `scale`. dtypes (cpu)  f32, ids and labels i32. Sums over a row in fp32 or better, in one order.
#pragma once
#include "kernels/backend.h"

namespace kda {

enum class LossKind { cross_entropy, kl, jsd, tvd, hinge, logistic_ranking };
enum class MissingProbability { zero, symmetric_uniform };

struct LossTerm {
  LossKind kind;
  float temperature = 1;
  MissingProbability missing = MissingProbability::zero;  // sparse teachers
  float margin = 0;                                       // hinge
  float scale = 1;                                        // the gradient's factor on the sum over rows
};

struct LogitsLoss {
  View logits;         // [R,V]  in: x; out: gradient of sum_i scale_i sum_r value[i,r]
  ConstView teacher;   // [R,V]  dense teacher logits, or data == nullptr
  ConstView ids;       // i32 [R,k]  sparse teacher, or data == nullptr
  ConstView logprobs;  // [R,k]      natural logs, made at temperature 1, falling
  ConstView labels;    // i32 [R]    the next token; -1: a masked row, values and gradient are zero
  std::span<const LossTerm> terms;
  View value;  // [terms,R]  written in full
};

enum class HiddenLossKind { mse, cosine };  // mean over channels of (a-b)^2; 1 - cos(a,b)

struct HiddenLoss {
  ConstView student, teacher;  // [R,D]
  ConstView labels;            // i32 [R]  -1: masked
  HiddenLossKind kind;
  float scale;
  View d_student;  // [R,D]  added to
  View value;      // [R]    written in full
};

void logits_loss(Context&, const LogitsLoss&);
void hidden_loss(Context&, const HiddenLoss&);
size_t logits_loss_workspace_bytes(const Context&, int64_t R, int64_t V, int64_t k);

}  // namespace kda
