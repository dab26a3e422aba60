// kernels/cpu/tile.h — square tiles of queries and keys (attention_train.cc).
#pragma once
#include <cstdint>

namespace kda::cpu {

constexpr int64_t kTile = 64;  // queries, and keys; a multiple of 4 vectors

inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// Rows of a tile, padded to whole vectors.
struct Rows {
  const float* at;
  int64_t stride;
};

}  // namespace kda::cpu
