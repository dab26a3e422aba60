// model/buffers.h — the memory of a forward pass: activations of one layer at a time, index arrays, op scratch.
#pragma once
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
  View take(Shape s);
  // Bytes that take(s) uses.
  static int64_t bytes(Shape s);

 private:
  Tensor memory_;
  int64_t used_ = 0;
};

// Sized by plan() for at most `rows` tokens a pass and `capacity` tokens of keys and values.
struct Buffers {
  int64_t rows = 0, capacity = 0;
  Tensor x;          // f32 [rows,D]  the residual stream
  Tensor ids;        // i32 [rows]
  Tensor position;   // i32 [rows]
  Tensor start;      // i32 [rows+1]
  Tensor slot_in, slot_out, past;  // i32 [rows]
  Arena arena;
  int64_t arena_bytes = 0;
  Tensor workspace;  // u8

  int64_t bytes() const;
};

Buffers plan_buffers(Context&, const Weights&, int64_t rows, int64_t capacity);

}  // namespace kda
