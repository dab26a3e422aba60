// kernels/cpu/row_sums.h — sums over rows: pieces of rows into partial sums, then those in order. The pieces come from
// the sizes alone.
#pragma once
#include "kernels/backend.h"
#include "kernels/cpu/tasks.h"

namespace kda::cpu {

// About 64 KiB of rows each, and at most 256 pieces.
inline int64_t row_sums_step(int64_t R, int64_t D) {
  return std::max<int64_t>({1, 16384 / std::max<int64_t>(1, D), (R + 255) / 256});
}

inline size_t row_sums_bytes(int64_t R, int64_t D) {
  const int64_t step = row_sums_step(R, D);
  return size_t((R + step - 1) / step * D) * sizeof(float);
}

// out[0..D) += what f(from, to, sum) adds to sum [D] for all rows.
template <class F>
void add_row_sums(Context& ctx, int64_t R, int64_t D, float* out, const char* op, const F& f) {
  const int64_t step = row_sums_step(R, D), pieces = (R + step - 1) / step;
  auto* partial = static_cast<float*>(workspace(ctx, row_sums_bytes(R, D), op));
  ctx.pool->run(pieces, [&](int64_t p, int) {
    float* sum = partial + p * D;
    std::fill_n(sum, D, 0.0f);
    f(p * step, std::min(R, (p + 1) * step), sum);
  });
  in_pieces(*ctx.pool, D, pieces, [&](int64_t from, int64_t to) {
    for (int64_t p = 0; p < pieces; ++p)
      for (int64_t i = from; i < to; ++i) out[i] += partial[p * D + i];
  });
}

}  // namespace kda::cpu
