// kernels/cpu/attention.cc — softmax attention with a running maximum, over blocks of keys counted from position 0.
//
// A task is one key head and a tile of query rows (tokens x the heads that share that key head). It walks the cache in
// blocks of kKeys: the block's keys are transposed once into [d][kKeys], so that scores come out as vectors over keys,
// and serve every row of the tile. What one row adds up, and in which order, is the same in a tile of one row and in a
// tile of many: score = sum over channels in rising order; exponentials by lane, then across lanes; output = sum over
// keys in rising order. So a prompt gives the same bits however it was cut, and so does decoding.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/ops.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "kernels/cpu/tail-inl.h"

#ifndef KDA_ATTENTION_TILE
#define KDA_ATTENTION_TILE
namespace kda::cpu {

constexpr int64_t kKeys = 64;    // keys of a block; a multiple of twice the widest vector
constexpr int64_t kRows = 64;    // query rows of a tile, about
constexpr int64_t kFewRows = 8;  // up to here a tile waits for memory and not for sums

// One worker's share of the workspace, for `rows` query rows.
struct TileScratch {
  float* keys;      // [d][kKeys]  the block, transposed
  float* score;     // [rows][kKeys]
  float* o;         // [rows][d]   not yet divided by `sum`
  float* most;      // [rows]      largest score so far
  float* sum;       // [rows]
  const float** q;  // [rows]      the query rows themselves

  static size_t bytes(int64_t rows, int64_t d) {
    const int64_t floats = d * kKeys + rows * (kKeys + d + 2);
    return (size_t(floats) * sizeof(float) + size_t(rows) * sizeof(float*) + 63) / 64 * 64;
  }
  TileScratch(void* at, int64_t rows, int64_t d) {
    keys = static_cast<float*>(at);
    score = keys + d * kKeys;
    q = reinterpret_cast<const float**>(score + rows * kKeys);
    o = reinterpret_cast<float*>(q + rows);
    most = o + rows * d;
    sum = most + rows;
  }
};

struct Tile {
  int64_t d, stride;      // channels; floats from one key to the next in the cache
  const float *k, *v;     // the sequence's cache at this key head
  int64_t first, tokens;  // the tile's tokens, as positions in the sequence
  int64_t group;          // query heads that share the key head; row = token * group + head
};

}  // namespace kda::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// Asks for a line of memory, into the second-level cache; nothing happens where it is not mapped.
HWY_INLINE void ask_for(const float* p) { __builtin_prefetch(p, 0, 2); }

// to[i][j] = key j, channel i, for n keys; zeros up to the kStep keys that scores are taken by. Asks for the keys of
// `next` on the way, where that is not null.
void transpose_keys(const float* k, int64_t stride, int64_t n, int64_t d, float* to,
                    [[maybe_unused]] const float* next) {
  constexpr int64_t kStep = kKeys / 2;
  int64_t j = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> f4;
  const hn::RepartitionToWide<decltype(f4)> wide;
  for (; j + 4 <= n; j += 4) {
    const float *a = k + j * stride, *b = a + stride, *c = b + stride, *e = c + stride;
    int64_t i = 0;
    for (; i + 4 <= d; i += 4) {
      if (next) ask_for(next + (j + i / 4 % 4) * stride + i / 16 * 16);
      const auto va = hn::LoadU(f4, a + i), vb = hn::LoadU(f4, b + i);
      const auto vc = hn::LoadU(f4, c + i), ve = hn::LoadU(f4, e + i);
      const auto ab0 = hn::BitCast(wide, hn::InterleaveLower(f4, va, vb));
      const auto ab1 = hn::BitCast(wide, hn::InterleaveUpper(f4, va, vb));
      const auto ce0 = hn::BitCast(wide, hn::InterleaveLower(f4, vc, ve));
      const auto ce1 = hn::BitCast(wide, hn::InterleaveUpper(f4, vc, ve));
      float* out = to + i * kKeys + j;
      hn::StoreU(hn::BitCast(f4, hn::InterleaveLower(wide, ab0, ce0)), f4, out);
      hn::StoreU(hn::BitCast(f4, hn::InterleaveUpper(wide, ab0, ce0)), f4, out + kKeys);
      hn::StoreU(hn::BitCast(f4, hn::InterleaveLower(wide, ab1, ce1)), f4, out + 2 * kKeys);
      hn::StoreU(hn::BitCast(f4, hn::InterleaveUpper(wide, ab1, ce1)), f4, out + 3 * kKeys);
    }
    for (; i < d; ++i) {
      to[i * kKeys + j] = a[i], to[i * kKeys + j + 1] = b[i];
      to[i * kKeys + j + 2] = c[i], to[i * kKeys + j + 3] = e[i];
    }
  }
#endif
  for (; j < n; ++j)
    for (int64_t i = 0; i < d; ++i) to[i * kKeys + j] = k[j * stride + i];
  const int64_t end = (n + kStep - 1) / kStep * kStep;
  for (int64_t i = 0; i < d && n < end; ++i) std::fill(to + i * kKeys + n, to + i * kKeys + end, 0.0f);
}

// score[r][0..n) = q[r] . keys, n rounded up to two vectors, for R rows.
template <int R>
HWY_INLINE void scores(const float* const* q, const float* keys, int64_t d, int64_t n, float* score) {
  const hn::CappedTag<float, kKeys / 2> f;
  const int64_t L = int64_t(hn::Lanes(f));
  for (int64_t j = 0; j < n; j += 2 * L) {
    auto a0 = hn::Zero(f), b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0, a3 = a0, b3 = a0;
    for (int64_t i = 0; i < d; ++i) {
      const auto x = hn::Load(f, keys + i * kKeys + j), y = hn::Load(f, keys + i * kKeys + j + L);
      const auto q0 = hn::Set(f, q[0][i]);
      a0 = hn::MulAdd(q0, x, a0), b0 = hn::MulAdd(q0, y, b0);
      if constexpr (R > 1) {
        const auto q1 = hn::Set(f, q[1][i]);
        a1 = hn::MulAdd(q1, x, a1), b1 = hn::MulAdd(q1, y, b1);
      }
      if constexpr (R > 2) {
        const auto q2 = hn::Set(f, q[2][i]);
        a2 = hn::MulAdd(q2, x, a2), b2 = hn::MulAdd(q2, y, b2);
      }
      if constexpr (R > 3) {
        const auto q3 = hn::Set(f, q[3][i]);
        a3 = hn::MulAdd(q3, x, a3), b3 = hn::MulAdd(q3, y, b3);
      }
    }
    hn::Store(a0, f, score + j), hn::Store(b0, f, score + j + L);
    if constexpr (R > 1) hn::Store(a1, f, score + kKeys + j), hn::Store(b1, f, score + kKeys + j + L);
    if constexpr (R > 2) hn::Store(a2, f, score + 2 * kKeys + j), hn::Store(b2, f, score + 2 * kKeys + j + L);
    if constexpr (R > 3) hn::Store(a3, f, score + 3 * kKeys + j), hn::Store(b3, f, score + 3 * kKeys + j + L);
  }
}

// One row's n scores become exponentials against the new running maximum; returns by what earlier sums shrink.
HWY_INLINE float exponentials(float* score, int64_t n, float scale, float& most, float& sum) {
  const hn::CappedTag<float, kKeys / 2> f;
  const int64_t L = int64_t(hn::Lanes(f));
  const auto low = hn::Set(f, -std::numeric_limits<float>::infinity());
  const auto by = hn::Set(f, scale);
  auto top = low;
  for (int64_t j = 0; j < n; j += L) {
    auto s = hn::Mul(hn::Load(f, score + j), by);
    if (j + L > n) s = hn::IfThenElse(hn::FirstN(f, size_t(n - j)), s, low);
    hn::Store(s, f, score + j);
    top = hn::Max(top, s);
  }
  const float before = most;
  most = std::max(before, hn::GetLane(hn::MaxOfLanes(f, top)));
  const auto shift = hn::Set(f, most);
  auto total = hn::Zero(f);
  for (int64_t j = 0; j < n; j += L) {
    const auto x = hn::Sub(hn::Load(f, score + j), shift);
    // Highway's exp takes a NaN for minus infinity; here it must stay one.
    const auto e = hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(f, x));
    hn::Store(e, f, score + j);
    total = hn::Add(total, e);
  }
  const float shrink = before == most ? 1.0f : std::exp(before - most);
  sum = sum * shrink + hn::GetLane(hn::SumOfLanes(f, total));
  return shrink;
}

// o[r] += sum over keys [from,to) of score[r][key] * v[key], for R rows. One vector of channels, or two, at a time.
// Asks for the same part of `next` on the way, where that is not null.
template <int R, bool kTwo, class F>
HWY_INLINE void add_values_at(F f, const float* score, const float* v, int64_t stride, int64_t from, int64_t to,
                              float* o, int64_t d, int64_t i, const float* next) {
  const int64_t L = int64_t(hn::Lanes(f));
  const auto get = [&](int r, int64_t at) HWY_ATTR { return hn::LoadU(f, o + r * d + at); };
  auto a0 = get(0, i), a1 = get(R > 1 ? 1 : 0, i), a2 = get(R > 2 ? 2 : 0, i), a3 = get(R > 3 ? 3 : 0, i);
  auto b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  if constexpr (kTwo) {
    b0 = get(0, i + L);
    if constexpr (R > 1) b1 = get(1, i + L);
    if constexpr (R > 2) b2 = get(2, i + L);
    if constexpr (R > 3) b3 = get(3, i + L);
  }
  for (int64_t j = from; j < to; ++j) {
    const auto x = hn::LoadU(f, v + j * stride + i);
    auto y = x;
    if constexpr (kTwo) y = hn::LoadU(f, v + j * stride + i + L);
    if (next) {
      ask_for(next + j * stride + i);
      if (kTwo && L >= 16) ask_for(next + j * stride + i + L);
    }
    const auto p0 = hn::Set(f, score[j]);
    a0 = hn::MulAdd(p0, x, a0);
    if constexpr (kTwo) b0 = hn::MulAdd(p0, y, b0);
    if constexpr (R > 1) {
      const auto p1 = hn::Set(f, score[kKeys + j]);
      a1 = hn::MulAdd(p1, x, a1);
      if constexpr (kTwo) b1 = hn::MulAdd(p1, y, b1);
    }
    if constexpr (R > 2) {
      const auto p2 = hn::Set(f, score[2 * kKeys + j]);
      a2 = hn::MulAdd(p2, x, a2);
      if constexpr (kTwo) b2 = hn::MulAdd(p2, y, b2);
    }
    if constexpr (R > 3) {
      const auto p3 = hn::Set(f, score[3 * kKeys + j]);
      a3 = hn::MulAdd(p3, x, a3);
      if constexpr (kTwo) b3 = hn::MulAdd(p3, y, b3);
    }
  }
  hn::StoreU(a0, f, o + i);
  if constexpr (R > 1) hn::StoreU(a1, f, o + d + i);
  if constexpr (R > 2) hn::StoreU(a2, f, o + 2 * d + i);
  if constexpr (R > 3) hn::StoreU(a3, f, o + 3 * d + i);
  if constexpr (kTwo) {
    hn::StoreU(b0, f, o + i + L);
    if constexpr (R > 1) hn::StoreU(b1, f, o + d + i + L);
    if constexpr (R > 2) hn::StoreU(b2, f, o + 2 * d + i + L);
    if constexpr (R > 3) hn::StoreU(b3, f, o + 3 * d + i + L);
  }
}

template <int R>
HWY_INLINE void add_values(const float* score, const float* v, int64_t stride, int64_t from, int64_t to, float* o,
                           int64_t d, const float* next) {
  if (from >= to) return;
  const hn::ScalableTag<float> f;
  const hn::FixedTag<float, 1> f1;
  const int64_t L = int64_t(hn::Lanes(f));
  int64_t i = 0;
  for (; i + 2 * L <= d; i += 2 * L) add_values_at<R, true>(f, score, v, stride, from, to, o, d, i, next);
  for (; i + L <= d; i += L) add_values_at<R, false>(f, score, v, stride, from, to, o, d, i, next);
  for (; i < d; ++i) add_values_at<R, false>(f1, score, v, stride, from, to, o, d, i, next);
}

// One block for R rows of the tile, beginning with row r; `valid(row)` counts the block's keys the row may see.
template <int R, class Valid>
HWY_INLINE void rows_of_block(const Tile& t, const TileScratch& s, int64_t r, int64_t block, float scale,
                              const Valid& valid, const float* next) {
  const int64_t most = valid(r + R - 1), least = valid(r);  // rows see ever more keys
  if (most <= 0) return;
  float* score = s.score + r * kKeys;
  float* o = s.o + r * t.d;
  const float* v = t.v + block * t.stride;
  scores<R>(s.q + r, s.keys, t.d, most, score);
  for (int64_t k = 0; k < R; ++k) {
    const int64_t n = valid(r + k);
    if (n <= 0) continue;
    const float shrink = exponentials(score + k * kKeys, n, scale, s.most[r + k], s.sum[r + k]);
    if (shrink != 1.0f)
      for (int64_t i = 0; i < t.d; ++i) o[k * t.d + i] *= shrink;
  }
  // Keys that all R rows see go together; a later key must not touch an earlier row, not even times zero.
  const int64_t shared = std::max<int64_t>(least, 0);
  add_values<R>(score, v, t.stride, 0, shared, o, t.d, next);
  for (int64_t k = 0; k < R && most > shared; ++k)
    add_values<1>(score + k * kKeys, v, t.stride, shared, std::max(valid(r + k), shared), o + k * t.d, t.d, nullptr);
}

// All keys for one tile; s.q is set. Leaves o / sum in s.o.
void attend(const Tile& t, const TileScratch& s) {
  const int64_t rows = t.tokens * t.group;
  const float scale = 1.0f / std::sqrt(float(t.d));
  std::fill(s.most, s.most + rows, -std::numeric_limits<float>::infinity());
  std::fill(s.sum, s.sum + rows, 0.0f);
  std::fill(s.o, s.o + rows * t.d, 0.0f);
  const int64_t end = t.first + t.tokens;
  for (int64_t block = 0; block < end; block += kKeys) {
    const int64_t after = block + kKeys;
    const bool ask = rows <= kFewRows && after < end;
    transpose_keys(t.k + block * t.stride, t.stride, std::min(kKeys, end - block), t.d, s.keys,
                   ask ? t.k + after * t.stride : nullptr);
    const float* next = ask ? t.v + after * t.stride : nullptr;
    const auto valid = [&](int64_t row) { return std::min(kKeys, t.first + row / t.group + 1 - block); };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) rows_of_block<4>(t, s, r, block, scale, valid, r ? nullptr : next);
    const float* rest = r ? nullptr : next;
    if (rows - r == 3) rows_of_block<3>(t, s, r, block, scale, valid, rest);
    if (rows - r == 2) rows_of_block<2>(t, s, r, block, scale, valid, rest);
    if (rows - r == 1) rows_of_block<1>(t, s, r, block, scale, valid, rest);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < t.d; ++i) s.o[r * t.d + i] /= s.sum[r];
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {

namespace cpu {

HWY_EXPORT(attend);

void attention(Context& ctx, const Attention& a) {
  const float *q = a.q.as<float>(), *k = a.k.as<float>(), *v = a.v.as<float>();
  float *k_cache = a.k_cache.as<float>(), *v_cache = a.v_cache.as<float>(), *o = a.o.as<float>();
  const int64_t T = a.q.dim(0), H = a.q.dim(1), d = a.q.dim(2), G = a.k.dim(1), group = H / G;
  const int64_t slots = a.k_cache.dim(0), capacity = a.k_cache.dim(1), N = a.packing.N();
  const int32_t* start = a.packing.host_start.data();
  for (int64_t n = 0; n < N; ++n) {
    const int64_t fresh = start[n + 1] - start[n];
    if (fresh == 0) continue;
    KDA_CHECK(a.slot[n] >= 0 && a.slot[n] < slots, "attention: sequence ", n, " names slot ", a.slot[n], " of ", slots);
    KDA_CHECK(a.past[n] >= 0 && a.past[n] + fresh <= capacity, "attention: sequence ", n, " has ", a.past[n], " + ",
              fresh, " tokens, a slot holds ", capacity);
  }
  if (T == 0) return;

  const int64_t per_tile = std::max<int64_t>(1, kRows / group);
  const size_t share = TileScratch::bytes(per_tile * group, d);
  auto* scratch = static_cast<std::byte*>(workspace(ctx, share * size_t(ctx.pool->threads()), "attention"));

  // The new keys and values into the cache, piece by piece of a sequence.
  constexpr int64_t kCopy = 16;
  const auto piece_of = [&](int64_t per, int64_t task, int64_t& n, int64_t& at) {
    for (n = 0;; ++n) {
      const int64_t pieces = (start[n + 1] - start[n] + per - 1) / per;
      if (task < pieces) break;
      task -= pieces;
    }
    at = task;
  };
  const auto pieces = [&](int64_t per) {
    int64_t sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += (start[n + 1] - start[n] + per - 1) / per;
    return sum;
  };
  ctx.pool->run(pieces(kCopy), [&](int64_t task, int) {
    int64_t n, at;
    piece_of(kCopy, task, n, at);
    const int64_t from = at * kCopy, count = std::min<int64_t>(kCopy, start[n + 1] - start[n] - from);
    const size_t bytes = size_t(count * G * d) * sizeof(float);
    const int64_t to = (a.slot[n] * capacity + a.past[n] + from) * G * d;
    std::memcpy(k_cache + to, k + (start[n] + from) * G * d, bytes);
    std::memcpy(v_cache + to, v + (start[n] + from) * G * d, bytes);
  });

  const auto f = HWY_DYNAMIC_DISPATCH(attend);
  ctx.pool->run(pieces(per_tile) * G, [&](int64_t task, int worker) {
    int64_t n, at;
    piece_of(per_tile, task / G, n, at);
    const int64_t g = task % G, fresh = start[n + 1] - start[n];
    const int64_t tiles = (fresh + per_tile - 1) / per_tile;
    const int64_t from = (tiles - 1 - at) * per_tile;  // the last tile sees most keys: it starts first
    Tile t{.d = d,
           .stride = G * d,
           .k = k_cache + (a.slot[n] * capacity * G + g) * d,
           .v = v_cache + (a.slot[n] * capacity * G + g) * d,
           .first = a.past[n] + from,
           .tokens = std::min(per_tile, fresh - from),
           .group = group};
    const TileScratch s(scratch + share * size_t(worker), per_tile * group, d);
    const auto row_at = [&](int64_t r) { return ((start[n] + from + r / group) * H + g * group + r % group) * d; };
    const int64_t rows = t.tokens * group;
    for (int64_t r = 0; r < rows; ++r) s.q[r] = q + row_at(r);
    f(t, s);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(o + row_at(r), s.o + r * d, size_t(d) * sizeof(float));
  });
}

}  // namespace cpu

size_t cpu::attention_workspace(const Context& ctx, int64_t, int64_t H, int64_t d, int64_t) {
  const int64_t threads = ctx.pool ? ctx.pool->threads() : 1;
  return cpu::TileScratch::bytes(std::max(H, cpu::kRows), d) * size_t(threads);
}

}  // namespace kda
#endif
