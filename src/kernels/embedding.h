// kernels/embedding.h — rows of a table by token id.
// dtypes        table f32 | bf16 | f16; ids i32; y f32.
// Ids are not checked here: whoever takes ids from outside refuses those outside [0, vocabulary).
#pragma once
#include "kernels/backend.h"

namespace kda {

struct Embedding {
  ConstView table;  // [vocabulary,D]
  ConstView ids;    // [T]
  View y;           // [T,D]
};

void embedding(Context&, const Embedding&);

}  // namespace kda
