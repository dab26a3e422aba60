// kernels/sample.h — the next token of each row of logits, chosen where the logits are.
//
// What runtime/sampler.h does for the fields below and in its order: temperature, top_k (ties of the k-th stay), top_p
// (the token that crosses stays, of equals the lowest ids), min_p (relative to the largest), then one draw by
// Philox(key = seed, counter = (sequence, position, 0, 0)), as there. Sums are fp32 here, double there: a draw that
// falls within rounding of a border between two tokens may differ.
// dtypes  logits f32.
#pragma once
#include "kernels/backend.h"

namespace kda {

struct SampleRow {
  float temperature;  // 0: the likeliest token, of equals the lowest id; the rest is then ignored
  float top_p;        // 1: off
  float min_p;        // 0: off
  int32_t top_k;      // 0: off
  uint64_t seed;
  uint32_t sequence;
  uint32_t position;  // of the token to be chosen, in its sequence
};

struct Sample {
  ConstView logits;       // [R,vocabulary]
  const SampleRow* rows;  // [R]  in the backend's memory
  int32_t* ids;           // [R]  in the backend's memory; -1: the row holds a NaN or +inf, or nothing above -inf
};

void sample(Context&, const Sample&);
size_t sample_workspace_bytes(const Context&, int64_t R, int64_t vocabulary);

}  // namespace kda
