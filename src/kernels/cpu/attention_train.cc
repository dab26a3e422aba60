// kernels/cpu/attention_train.cc — softmax attention and its gradient in square tiles of queries and keys.
//
// Forward: a task is a tile of queries of one key head; it walks the tiles of keys with a running maximum. Backward: a
// task is a tile of keys of one key head; it keeps dk and dv, walks the tiles of queries at and after it, recomputes
// their probabilities and adds its part to dq. The parts of one tile of dq come in the order of the keys: a counter for
// each says how many tiles of keys have been added, and a task waits for its turn. Tasks start in that order, so the
// one that is waited for has always started. Every sum therefore runs in the order of positions, on any number of
// threads.
//
// Scores are taken times log2 e: k is scaled by d^-1/2 log2 e where it is transposed, and exponentials are powers of 2.
// Where d is a whole number of vectors and the tile is full, rows are read where they lie; otherwise they are copied
// and padded by zeros. A padded key gets probability zero; a padded query has zeros for do, so it adds nothing.
#include "kernels/attention_train.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numbers>
#include <thread>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"
#include "kernels/cpu/tile.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_train.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include "kernels/cpu/tile-inl.h"

#ifndef KDA_ATTENTION_TRAIN_ONCE
#define KDA_ATTENTION_TRAIN_ONCE
namespace kda::cpu {
constexpr float kLog2e = std::numbers::log2e_v<float>, kLn2 = std::numbers::ln2_v<float>;

// One key head of one sequence. Strides are floats from a token to the next; query heads lie d apart.
struct Head {
  int64_t L, d, group, q_stride, k_stride, lse_stride;
  float scale;
  const float *q, *k, *v;
  float *o, *lse;            // forward: written; backward: read
  const float *d_o, *along;  // along [T,H]: do . o
  float *dq, *dk, *dv;
  std::atomic<int32_t>* added;  // [tiles of the sequence, H] at this head: tiles of keys that dq has
};

struct TrainScratch {
  float *q, *d_o, *k, *v;  // [kTile][dp] copies, where they are needed
  float *kT, *vT;          // [dp][kTile] transposed; k times scale log2 e
  float *s, *p;            // [kTile][kTile]
  float *b, *c;            // [kTile][dp]
  float* a;                // [group][kTile][dp]
  float *most, *sum;       // [group][kTile]

  static int64_t floats(int64_t d, int64_t group) {
    const int64_t tile = kTile * padded(d);
    return 8 * tile + 2 * kTile * kTile + group * (tile + 2 * kTile);
  }
  TrainScratch(float* at, int64_t d, int64_t group) {
    const int64_t tile = kTile * padded(d);
    q = at, d_o = q + tile, k = d_o + tile, v = k + tile, kT = v + tile, vT = kT + tile, b = vT + tile, c = b + tile;
    s = c + tile, p = s + kTile * kTile, a = p + kTile * kTile;
    most = a + group * tile, sum = most + group * kTile;
  }
};

}  // namespace kda::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
// n rows of x, as they lie where that is `full` rows of whole vectors; otherwise a copy with zeros around.
Rows rows_of(const float* x, int64_t stride, int64_t n, int64_t full, int64_t d, float* copy) {
  const int64_t dp = padded(d);
  if (n == full && d == dp) return {x, stride};
  for (int64_t r = 0; r < n; ++r) {
    std::copy_n(x + r * stride, d, copy + r * dp);
    std::fill(copy + r * dp + d, copy + (r + 1) * dp, 0.0f);
  }
  std::fill(copy + n * dp, copy + kTile * dp, 0.0f);
  return {copy, dp};
}

// One query's scores become exponentials against the new running maximum; zeros from key n on. Returns by what earlier
// sums shrink.
HWY_INLINE float exponentials(float* s, int64_t n, float& most, float& sum) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f));
  const auto low = hn::Set(f, -std::numeric_limits<float>::infinity());
  auto top = low;
  for (int64_t j = 0; j < n; j += L) {
    const auto x = hn::Load(f, s + j);
    top = hn::Max(top, j + L > n ? hn::IfThenElse(hn::FirstN(f, size_t(n - j)), x, low) : x);
  }
  const float before = most;
  most = std::max(before, hn::GetLane(hn::MaxOfLanes(f, top)));
  const auto shift = hn::Set(f, most);
  auto total = hn::Zero(f);
  for (int64_t j = 0; j < kTile; j += L) {
    auto e = hn::Zero(f);
    if (j < n) {
      e = power_of_2(hn::Sub(hn::Load(f, s + j), shift));
      if (j + L > n) e = hn::IfThenElseZero(hn::FirstN(f, size_t(n - j)), e);
      total = hn::Add(total, e);
    }
    hn::Store(e, f, s + j);
  }
  const float shrink = before == most ? 1.0f : std::exp2(before - most);
  sum = sum * shrink + hn::GetLane(hn::SumOfLanes(f, total));
  return shrink;
}

// The forward pass of queries [q0, q0 + kTile).
void forward_tile(const Head& h, const TrainScratch& w, int64_t q0) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f)), dp = padded(h.d), rows = std::min(kTile, h.L - q0);
  const int64_t M = (rows + 3) / 4 * 4;
  std::fill_n(w.a, h.group * kTile * dp, 0.0f);
  std::fill_n(w.most, h.group * kTile, -std::numeric_limits<float>::infinity());
  std::fill_n(w.sum, h.group * kTile, 0.0f);
  for (int64_t k0 = 0; k0 <= q0; k0 += kTile) {
    const int64_t keys = std::min(kTile, h.L - k0), at = k0 * h.k_stride;
    transpose_tile(rows_of(h.k + at, h.k_stride, keys, kTile, h.d, w.k), dp, h.scale * kLog2e, w.kT);
    const Rows v = rows_of(h.v + at, h.k_stride, keys, keys, h.d, w.v);
    for (int64_t g = 0; g < h.group; ++g) {
      const Rows q = rows_of(h.q + q0 * h.q_stride + g * h.d, h.q_stride, rows, M, h.d, w.q);
      product<false>(M, kTile, h.d, q.at, q.stride, w.kT, kTile, w.s, kTile, false);
      float* const o = w.a + g * kTile * dp;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = std::min(kTile, q0 + r + 1 - k0);  // keys that this query sees; at least one
        const float shrink = exponentials(w.s + r * kTile, n, w.most[g * kTile + r], w.sum[g * kTile + r]);
        if (shrink == 1.0f) continue;
        const auto by = hn::Set(f, shrink);
        for (int64_t i = 0; i < dp; i += L) hn::Store(hn::Mul(by, hn::Load(f, o + r * dp + i)), f, o + r * dp + i);
      }
      product<false>(M, dp, keys, w.s, kTile, v.at, v.stride, o, dp, true);
    }
  }
  for (int64_t g = 0; g < h.group; ++g)
    for (int64_t r = 0; r < rows; ++r) {
      const float* o = w.a + (g * kTile + r) * dp;
      const float sum = w.sum[g * kTile + r];
      float* to = h.o + (q0 + r) * h.q_stride + g * h.d;
      for (int64_t i = 0; i < h.d; ++i) to[i] = o[i] / sum;
      h.lse[(q0 + r) * h.lse_stride + g] = w.most[g * kTile + r] * kLn2 + std::log(sum);
    }
}

// w.p = p and w.s = ds of the tile, for query head g; zeros where the query does not see the key.
void probabilities(const Head& h, const TrainScratch& w, const Rows& q, const Rows& d_o, int64_t g, int64_t q0,
                   int64_t k0) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f)), rows = std::min(kTile, h.L - q0);
  const int64_t M = (rows + 3) / 4 * 4;
  product<false>(M, kTile, h.d, q.at, q.stride, w.kT, kTile, w.p, kTile, false);
  product<false>(M, kTile, h.d, d_o.at, d_o.stride, w.vT, kTile, w.s, kTile, false);
  for (int64_t r = 0; r < rows; ++r) {
    float *p = w.p + r * kTile, *s = w.s + r * kTile;
    const int64_t at = (q0 + r) * h.lse_stride + g, n = std::min(kTile, q0 + r + 1 - k0);
    const auto shift = hn::Set(f, h.lse[at] * kLog2e), along = hn::Set(f, h.along[at]);
    for (int64_t j = 0; j < kTile; j += L) {
      auto e = power_of_2(hn::Sub(hn::Load(f, p + j), shift));
      auto x = hn::Mul(e, hn::Sub(hn::Load(f, s + j), along));
      if (j + L > n) {
        const auto seen = hn::FirstN(f, size_t(std::max<int64_t>(0, n - j)));
        e = hn::IfThenElseZero(seen, e);
        x = hn::IfThenElseZero(seen, x);
      }
      hn::Store(e, f, p + j);
      hn::Store(x, f, s + j);
    }
  }
  std::fill(w.p + rows * kTile, w.p + M * kTile, 0.0f);
  std::fill(w.s + rows * kTile, w.s + M * kTile, 0.0f);
}

// to = from * by, or += it.
HWY_INLINE void put_row(const float* from, int64_t n, float by, bool add, float* to) {
  if (add)
    for (int64_t i = 0; i < n; ++i) to[i] += from[i] * by;
  else
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * by;
}

// dk and dv of keys [k0, k0 + kTile), and their part of dq of all queries that see them.
void backward_tile(const Head& h, const TrainScratch& w, int64_t k0) {
  const int64_t dp = padded(h.d), keys = std::min(kTile, h.L - k0), at = k0 * h.k_stride, turn = k0 / kTile;
  const Rows k = rows_of(h.k + at, h.k_stride, keys, kTile, h.d, w.k);
  transpose_tile(k, dp, h.scale * kLog2e, w.kT);
  transpose_tile(rows_of(h.v + at, h.k_stride, keys, kTile, h.d, w.v), dp, 1, w.vT);
  std::fill_n(w.a, kTile * dp, 0.0f);
  std::fill_n(w.b, kTile * dp, 0.0f);
  for (int64_t g = 0; g < h.group; ++g)
    for (int64_t q0 = k0; q0 < h.L; q0 += kTile) {
      const int64_t rows = std::min(kTile, h.L - q0), M = (rows + 3) / 4 * 4, q_at = q0 * h.q_stride + g * h.d;
      const Rows q = rows_of(h.q + q_at, h.q_stride, rows, M, h.d, w.q);
      const Rows d_o = rows_of(h.d_o + q_at, h.q_stride, rows, M, h.d, w.d_o);
      probabilities(h, w, q, d_o, g, q0, k0);
      product<true>(kTile, dp, rows, w.p, kTile, d_o.at, d_o.stride, w.b, dp, true);
      product<true>(kTile, dp, rows, w.s, kTile, q.at, q.stride, w.a, dp, true);
      product<false>(M, dp, keys, w.s, kTile, k.at, k.stride, w.c, dp, false);
      std::atomic<int32_t>& added = h.added[q0 / kTile * h.lse_stride + g];
      while (added.load(std::memory_order_acquire) != turn) std::this_thread::yield();
      for (int64_t r = 0; r < rows; ++r) put_row(w.c + r * dp, h.d, h.scale, turn > 0, h.dq + q_at + r * h.q_stride);
      added.store(int32_t(turn + 1), std::memory_order_release);
    }
  for (int64_t r = 0; r < keys; ++r) {
    put_row(w.a + r * dp, h.d, h.scale, false, h.dk + at + r * h.k_stride);
    put_row(w.b + r * dp, h.d, 1, false, h.dv + at + r * h.k_stride);
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {

HWY_EXPORT(forward_tile);
HWY_EXPORT(backward_tile);

namespace {
struct Work {
  int64_t n, tile;
};
// Tiles of all sequences.
std::vector<Work> tiles(const Packing& p) {
  std::vector<Work> all;
  for (int64_t n = 0; n < p.N(); ++n) {
    const int64_t L = p.host_start[size_t(n) + 1] - p.host_start[size_t(n)];
    for (int64_t t = 0; t * kTile < L; ++t) all.push_back({n, t});
  }
  return all;
}

size_t scratch_bytes(const Context& ctx, int64_t d, int64_t group) {
  return size_t(TrainScratch::floats(d, group) * ctx.pool->threads()) * sizeof(float) + 64;
}

float* aligned(void* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

struct Shapes {
  int64_t H, G, d, group;
};

// The sizes of one key head of one sequence.
Head head(const Shapes& s, const Packing& packing, int64_t n) {
  const int64_t t0 = packing.host_start[size_t(n)];
  Head h{};
  h.L = packing.host_start[size_t(n) + 1] - t0;
  h.d = s.d, h.group = s.group;
  h.q_stride = s.H * s.d, h.k_stride = s.G * s.d, h.lse_stride = s.H;
  h.scale = 1.0f / std::sqrt(float(s.d));
  return h;
}
}  // namespace

void attention_train(Context& ctx, const AttentionTrain& a) {
  const Shapes s{a.q.dim(1), a.k.dim(1), a.q.dim(2), a.q.dim(1) / a.k.dim(1)};
  const float *q = a.q.as<float>(), *k = a.k.as<float>(), *v = a.v.as<float>();
  float *o = a.o.as<float>(), *lse = a.lse.as<float>();
  float* const scratch = aligned(workspace(ctx, scratch_bytes(ctx, s.d, s.group), "attention_train"));
  const std::vector<Work> all = tiles(a.packing);
  const auto f = HWY_DYNAMIC_DISPATCH(forward_tile);
  ctx.pool->run(int64_t(all.size()) * s.G, [&](int64_t task, int worker) {
    const auto [n, tile] = all[all.size() - 1 - size_t(task / s.G)];  // later tiles see more keys: they start first
    const int64_t g = task % s.G, t0 = a.packing.host_start[size_t(n)];
    Head h = head(s, a.packing, n);
    h.q = q + t0 * h.q_stride + g * s.group * s.d, h.k = k + t0 * h.k_stride + g * s.d;
    h.v = v + t0 * h.k_stride + g * s.d, h.o = o + t0 * h.q_stride + g * s.group * s.d;
    h.lse = lse + t0 * s.H + g * s.group;
    f(h, TrainScratch(scratch + worker * TrainScratch::floats(s.d, s.group), s.d, s.group), tile * kTile);
  });
}

void attention_backward(Context& ctx, const AttentionBackward& a) {
  const int64_t T = a.q.dim(0);
  const Shapes s{a.q.dim(1), a.k.dim(1), a.q.dim(2), a.q.dim(1) / a.k.dim(1)};
  const float *q = a.q.as<float>(), *k = a.k.as<float>(), *v = a.v.as<float>();
  const float *o = a.o.as<float>(), *d_o = a.d_o.as<float>(), *lse = a.lse.as<float>();
  float *dq = a.dq.as<float>(), *dk = a.dk.as<float>(), *dv = a.dv.as<float>();
  const size_t bytes = attention_backward_workspace_bytes(ctx, T, s.H, s.G, s.d);
  float* const along = aligned(workspace(ctx, bytes, "attention_backward"));
  float* const scratch = aligned(along + T * s.H);
  in_pieces(*ctx.pool, T * s.H, s.d, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      float sum[8] = {};
      for (int64_t i = 0; i < s.d; ++i) sum[i % 8] += o[r * s.d + i] * d_o[r * s.d + i];
      along[r] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  });
  std::vector<Work> all = tiles(a.packing);
  std::vector<int64_t> first;  // tile of each sequence among all
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].tile == 0) first.resize(size_t(all[i].n) + 1, int64_t(i));
  std::vector<std::atomic<int32_t>> added(all.size() * size_t(s.H));
  // Early keys first: the order in which dq is added up, and they are seen by most queries.
  std::stable_sort(all.begin(), all.end(), [](const Work& x, const Work& y) { return x.tile < y.tile; });
  const auto f = HWY_DYNAMIC_DISPATCH(backward_tile);
  ctx.pool->run(int64_t(all.size()) * s.G, [&](int64_t task, int worker) {
    const auto [n, tile] = all[size_t(task / s.G)];
    const int64_t g = task % s.G, t0 = a.packing.host_start[size_t(n)];
    Head h = head(s, a.packing, n);
    const int64_t q_at = t0 * h.q_stride + g * s.group * s.d, k_at = t0 * h.k_stride + g * s.d;
    const int64_t row_at = t0 * s.H + g * s.group;
    h.q = q + q_at, h.d_o = d_o + q_at, h.dq = dq + q_at;
    h.k = k + k_at, h.v = v + k_at, h.dk = dk + k_at, h.dv = dv + k_at;
    h.lse = const_cast<float*>(lse) + row_at, h.along = along + row_at;
    h.added = added.data() + first[size_t(n)] * s.H + g * s.group;
    f(h, TrainScratch(scratch + worker * TrainScratch::floats(s.d, s.group), s.d, s.group), tile * kTile);
  });
}

}  // namespace cpu

size_t attention_train_workspace_bytes(const Context& ctx, int64_t, int64_t H, int64_t d) {
  return cpu::scratch_bytes(ctx, d, H);
}
size_t attention_backward_workspace_bytes(const Context& ctx, int64_t T, int64_t H, int64_t G, int64_t d) {
  return cpu::scratch_bytes(ctx, d, H / G) + size_t(T * H) * sizeof(float) + 128;
}

}  // namespace kda
#endif
