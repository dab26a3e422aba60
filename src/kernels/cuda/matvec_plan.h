// kernels/cuda/matvec_plan.h — how a mat-vec is cut: by shape and chip alone what decides the order of summation
// (`parts`), by the rows of x too what does not.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kda::cuda {

struct MatvecPlan {
  int parts = 1;             // of K, each summed on its own
  int row_blocks = 1;        // the grid is row_blocks x parts
  int warps = 1, turns = 1;  // a warp takes `turns` tasks of up to 16 rows
  int ring = 4;              // stages of 4 KB per warp
  int ahead = 0;             // stages more that are fetched into the second-level cache at the start
  int chunk = 0;             // k of x staged at a time by a warp of its own; 0: all of the part's at once
  int x_stride = 0;          // bytes between rows of x in shared memory
  int shared_bytes = 0;
};

inline constexpr int kMatvecWhole = 8;          // rows of x up to which all of a part's x lies in shared memory,
inline constexpr int kMatvecXBytes = 80 << 10;  // if it is no larger than this
inline constexpr int kMatvecParts = 16;

// Parts of K, by shape and chip alone. More until a block has 64 rows of W; none where W is too little to be worth it.
// Never so few that a part is longer than 4096.
inline int matvec_parts(int64_t rows, int64_t K, int stage_k, int sms) {
  const int64_t units = (K + stage_k - 1) / stage_k;
  const bool split = rows * K * (stage_k == 128 ? 2 : 1) / sms > 32 << 10;
  const auto more = [&](int64_t p) {
    return (split && rows * p < 64 * sms) || (units + p - 1) / p * stage_k > 4096 || units % p != 0;
  };
  int64_t p = 1;
  while (p < kMatvecParts && more(p) && units >= 2 * (p + 1)) ++p;
  while (p > 1 && units % p != 0 && units < 8 * p) --p;
  return int(p);
}

// A bound on parts x rows over all products of up to `rows` rows that are summed in parts.
inline int64_t matvec_partial_rows(int64_t rows, int64_t K, int sms) {
  const int64_t few =
      std::min<int64_t>(rows, 64 * sms) * std::min<int64_t>(kMatvecParts, std::max<int64_t>(1, K / 256));
  const int64_t many =
      std::max(matvec_parts(int64_t(1) << 40, K, 128, sms), matvec_parts(int64_t(1) << 40, K, 256, sms));
  return std::max(few, many > 1 ? many * rows : 0);
}

// rows: of all segments. stage_k: k of a stage (128 for bf16, 256 for 8 bits). inputs: different x, of equal segments.
inline MatvecPlan plan_matvec(int64_t rows, int64_t K, int R, int stage_k, int inputs, int sms, int block_bytes) {
  constexpr int64_t kTask = 16, kStage = 4096;
  const auto ceil = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  MatvecPlan p;
  const int64_t units = ceil(K, stage_k);
  p.parts = matvec_parts(rows, K, stage_k, sms);
  p.row_blocks = int(std::max<int64_t>(1, std::min(sms / p.parts, int(ceil(rows, kTask)))));
  if (inputs > 1) p.row_blocks = std::max(1, p.row_blocks / inputs) * inputs;  // no task across two inputs
  const int64_t tasks = ceil(ceil(rows, p.row_blocks), kTask);                 // of a block

  const int part_k = int(ceil(units, p.parts)) * stage_k, pad = stage_k == 128 ? 64 : 16;
  int width = part_k, buffers = 1;
  if (R > kMatvecWhole || int64_t(inputs) * R * (part_k * 2 + pad) > kMatvecXBytes) {
    p.chunk = std::max(256, 64 / std::max(8, (R + 7) / 8 * 8) * 256);
    width = p.chunk, buffers = 2;
  }
  p.x_stride = width * 2 + pad;
  const int x_bytes = buffers * inputs * R * p.x_stride;
  const auto rings = [&](int64_t warps, int budget) { return (budget - x_bytes) / (warps * kStage); };
  if (!p.chunk) {
    // Half of a multiprocessor at most, so that the next launch's blocks can fetch beside ours: few warps, deep rings.
    const int budget = std::max(block_bytes / 2 - 2048, x_bytes + 3 * int(kStage) * 4);
    int64_t best = -1;
    for (int w = std::min<int>(3, int(tasks)); w <= 6; ++w) {
      const int64_t t = ceil(tasks, w);
      if (best >= 0 && w * t >= best) continue;
      best = w * t, p.warps = w, p.turns = int(t);
    }
    p.ring = int(std::clamp<int64_t>(rings(p.warps, budget), 2, 8));
  } else {
    // x is staged once per turn: as few turns as rings of three stages allow.
    const int64_t most = std::clamp<int64_t>(rings(1, block_bytes) / 3, 1, 12);
    p.turns = int(ceil(tasks, most));
    p.warps = int(ceil(tasks, p.turns));
    p.ring = int(std::clamp<int64_t>(rings(p.warps, block_bytes), 2, 8));
  }
  p.shared_bytes = x_bytes + int(p.warps * p.ring * kStage);
  return p;
}

}  // namespace kda::cuda
