// kernels/cpu/partial_sums.h — sums over tokens in an order that sizes alone decide: a partial sum for every block of
// tokens, then the blocks in their order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/parallel.h"
#include "base/tensor.h"
#include "kernels/cpu/flush.h"

namespace kda::cpu {

inline constexpr int64_t kSumBlock = 64;  // tokens

inline int64_t sum_blocks(int64_t T) { return (T + kSumBlock - 1) / kSumBlock; }

// Calls f(from, to, sums) for every block of tokens; `sums` is the block's own row of `partial` [blocks,n].
template <class F>
void each_sum_block(ThreadPool& pool, int64_t T, int64_t n, float* partial, const F& f) {
  pool.run(sum_blocks(T), [&](int64_t b, int) {
    const FlushTiny flush;
    f(b * kSumBlock, std::min(T, (b + 1) * kSumBlock), partial + b * n);
  });
}

// to[i] += partial[0,i] + partial[1,i] + .. for i < n; rows of `partial` are `stride` floats apart.
inline void add_partials(const float* partial, int64_t blocks, int64_t stride, int64_t n, const View& to) {
  if (!to.data) return;
  float* y = to.as<float>();
  constexpr int64_t kPiece = 256;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
    float sum[kPiece] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < m; ++j) sum[j] += partial[b * stride + i + j];
    for (int64_t j = 0; j < m; ++j) y[i + j] += sum[j];
  }
}

}  // namespace kda::cpu
