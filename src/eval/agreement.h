// eval/agreement.h — loss over known text, and how far two models agree on it.
#pragma once
#include <cstdint>
#include <span>

#include "base/parallel.h"
#include "base/tensor.h"

namespace kda {

class Agreement {
 public:
  // logits, others: f32 [R,vocabulary], others may be empty. ids: the tokens from the one that row 0 belongs to; row r
  // predicts ids[r + 1], where there is one. Throws Error for a non-finite loss, naming the row.
  void add(ConstView logits, ConstView others, std::span<const int32_t> ids, ThreadPool&);

  struct Result {
    int64_t predicted = 0;     // rows with a next token
    double loss = 0;           // nats per predicted token
    double other_loss = 0;
    int64_t positions = 0;     // rows compared
    double kl = 0;             // mean KL(other || this), nats
    double top1 = 0;           // share of rows whose likeliest token is the same
  };
  Result result() const;

 private:
  int64_t predicted_ = 0, positions_ = 0, same_ = 0;
  double loss_ = 0, other_loss_ = 0, kl_ = 0;
};

}  // namespace kda
