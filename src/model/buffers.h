// model/buffers.h — the memory of a forward pass: activations of one layer at a time, index arrays, op scratch.
#pragma once
#include <vector>

#include "base/tensor.h"
#include "kernels/backend.h"
#include "model/weights.h"

namespace kda {

// Hands out consecutive pieces of one block of memory; a layer starts again from its beginning.
class Arena {
 public:
  Arena() = default;
  explicit Arena(Tensor memory) : memory_(std::move(memory)) {}
  void reset() { used_ = 0; }
  View take(Dtype, Shape);
  // Bytes that take() uses.
  static int64_t bytes(Dtype, Shape);

 private:
  Tensor memory_;
  int64_t used_ = 0;
};

// Sized by plan() for at most `rows` tokens and `sequences` sequences a pass, and `capacity` tokens of keys and values.
struct Buffers {
  int64_t rows = 0, sequences = 0, capacity = 0;
  Dtype activation = Dtype::f32;
  Tensor x;          // f32 [rows,D]  the residual stream
  Tensor ids;        // i32 [rows]
  Tensor position;   // i32 [rows]
  Tensor start;      // i32 [sequences+1]
  Tensor slot_in, slot_out, past;  // i32 [sequences]
  // What start, slot_in and slot_out hold: from token to token they seldom change, and are not sent again.
  std::vector<int32_t> start_there, slot_in_there, slot_out_there;
  Tensor picked;     // i32 [sequences]  rows whose logits are wanted
  Arena arena;
  int64_t arena_bytes = 0;
  Tensor workspace;  // u8

  int64_t bytes() const;
};

Buffers plan_buffers(Context&, const Weights&, int64_t rows, int64_t sequences, int64_t capacity);

}  // namespace kda
