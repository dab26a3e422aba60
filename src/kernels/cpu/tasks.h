// kernels/cpu/tasks.h — how memory-bound ops are cut into tasks.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/parallel.h"

namespace kda::cpu {

// Calls f(from, to) over [0,n) in pieces of about 64 KiB of floats, `width` floats for each of the n. The pieces come
// from the sizes alone. What fits one piece runs on the caller: waking a worker costs more than it saves.
template <class F>
void in_pieces(ThreadPool& pool, int64_t n, int64_t width, const F& f) {
  constexpr int64_t kPiece = 16384;
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, width));
  const int64_t tasks = (n + step - 1) / step;
  if (tasks <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  pool.run(tasks, [&](int64_t t, int) { f(t * step, std::min(n, (t + 1) * step)); });
}

}  // namespace kda::cpu
