// kernels/cpu/attention_train.cc — softmax attention and its gradient in square tiles of queries and keys.
//
// Forward: a task is a tile of queries of one key head; it walks the tiles of keys with a running maximum. Backward:
// one pass whose tasks are tiles of keys (dk, dv) and one whose tasks are tiles of queries (dq); both recompute the
// tile's probabilities, so nothing is shared between tasks and every sum runs in the order of positions.
//
// Tiles are copied into scratch with channels and tokens padded by zeros to whole vectors. A padded key gets
// probability zero; a padded query has zeros for do and D, so it adds nothing.
#include "kernels/attention_train.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_train.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#ifndef KDA_ATTENTION_TRAIN_ONCE
#define KDA_ATTENTION_TRAIN_ONCE
namespace kda::cpu {
constexpr int64_t kTile = 64;  // queries, and keys; a multiple of 4 vectors

inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// One key head of one sequence. Strides are floats from a token to the next; query heads lie d apart.
struct Head {
  int64_t L, d, group, q_stride, k_stride, lse_stride;
  float scale;
  const float *q, *k, *v;
  float *o, *lse;            // forward: written; backward: read
  const float *d_o, *along;  // along [T,H]: do . o
  float *dq, *dk, *dv;
};

struct TrainScratch {
  float *qt, *dot, *kt, *vt;  // [kTile][dp] rows as they lie
  float *kT, *vT;             // [d][kTile] transposed
  float *s, *p;               // [kTile][kTile]
  float *a, *b;               // sums: [group][kTile][dp], [kTile][dp]
  float *most, *sum;          // [group][kTile]

  static int64_t floats(int64_t d, int64_t group) {
    const int64_t tile = kTile * padded(d);
    return 7 * tile + 2 * kTile * kTile + group * (tile + 2 * kTile);
  }
  TrainScratch(float* at, int64_t d, int64_t group) {
    const int64_t tile = kTile * padded(d);
    qt = at, dot = qt + tile, kt = dot + tile, vt = kt + tile, kT = vt + tile, vT = kT + tile, b = vT + tile;
    s = b + tile, p = s + kTile * kTile, a = p + kTile * kTile;
    most = a + group * tile, sum = most + group * kTile;
  }
};
}  // namespace kda::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using F = hn::CappedTag<float, 16>;

// c[m][n] (+)= sum_k a[m * by_m + k * by_k] b[k * ldb + n] for m < 4, N vectors of n.
template <int N>
HWY_INLINE void product_block(int64_t K, const float* a, int64_t by_m, int64_t by_k, const float* b, int64_t ldb,
                              float* c, int64_t ldc, bool add) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f));
  hn::Vec<F> s0[N], s1[N], s2[N], s3[N];
  for (int i = 0; i < N; ++i) {
    s0[i] = add ? hn::Load(f, c + i * L) : hn::Zero(f);
    s1[i] = add ? hn::Load(f, c + ldc + i * L) : hn::Zero(f);
    s2[i] = add ? hn::Load(f, c + 2 * ldc + i * L) : hn::Zero(f);
    s3[i] = add ? hn::Load(f, c + 3 * ldc + i * L) : hn::Zero(f);
  }
  for (int64_t k = 0; k < K; ++k, a += by_k, b += ldb) {
    const auto a0 = hn::Set(f, a[0]), a1 = hn::Set(f, a[by_m]), a2 = hn::Set(f, a[2 * by_m]);
    const auto a3 = hn::Set(f, a[3 * by_m]);
    for (int i = 0; i < N; ++i) {
      const auto x = hn::Load(f, b + i * L);
      s0[i] = hn::MulAdd(a0, x, s0[i]);
      s1[i] = hn::MulAdd(a1, x, s1[i]);
      s2[i] = hn::MulAdd(a2, x, s2[i]);
      s3[i] = hn::MulAdd(a3, x, s3[i]);
    }
  }
  for (int i = 0; i < N; ++i) {
    hn::Store(s0[i], f, c + i * L);
    hn::Store(s1[i], f, c + ldc + i * L);
    hn::Store(s2[i], f, c + 2 * ldc + i * L);
    hn::Store(s3[i], f, c + 3 * ldc + i * L);
  }
}

// M a multiple of 4, columns one of 16.
void product(int64_t M, int64_t columns, int64_t K, const float* a, int64_t by_m, int64_t by_k, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add) {
  const int64_t L = int64_t(hn::Lanes(F()));
  int64_t n = 0;
  const auto along = [&](auto block, int64_t vectors) HWY_ATTR {
    for (; n + vectors * L <= columns; n += vectors * L)
      for (int64_t m = 0; m < M; m += 4) block(K, a + m * by_m, by_m, by_k, b + n, ldb, c + m * ldc + n, ldc, add);
  };
#if HWY_TARGET <= HWY_AVX3
  along(product_block<4>, 4);
#endif
  along(product_block<2>, 2);
  along(product_block<1>, 1);
}

// to [kTile][dp] = rows of x times `by`, zeros beyond n rows and d columns.
void copy_tile(const float* x, int64_t stride, int64_t n, int64_t d, int64_t dp, float by, float* to) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < d; ++i) to[r * dp + i] = x[r * stride + i] * by;
    std::fill(to + r * dp + d, to + (r + 1) * dp, 0.0f);
  }
  std::fill(to + n * dp, to + kTile * dp, 0.0f);
}

// to[i][j] = x[j][i], for a tile as copy_tile leaves it.
void transpose_tile(const float* x, int64_t d, int64_t dp, float* to) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t j = 0; j < kTile; ++j)
    for (int64_t i = 0; i < d; ++i) to[i * kTile + j] = x[j * dp + i];
#else
  (void)d;
  const hn::FixedTag<float, 4> f4;
  const hn::RepartitionToWide<decltype(f4)> wide;
  for (int64_t i = 0; i < dp; i += 4)
    for (int64_t j = 0; j < kTile; j += 4) {
      const float* from = x + j * dp + i;
      const auto a = hn::Load(f4, from), b = hn::Load(f4, from + dp);
      const auto c = hn::Load(f4, from + 2 * dp), e = hn::Load(f4, from + 3 * dp);
      const auto ab0 = hn::BitCast(wide, hn::InterleaveLower(f4, a, b));
      const auto ab1 = hn::BitCast(wide, hn::InterleaveUpper(f4, a, b));
      const auto ce0 = hn::BitCast(wide, hn::InterleaveLower(f4, c, e));
      const auto ce1 = hn::BitCast(wide, hn::InterleaveUpper(f4, c, e));
      float* out = to + i * kTile + j;
      hn::Store(hn::BitCast(f4, hn::InterleaveLower(wide, ab0, ce0)), f4, out);
      hn::Store(hn::BitCast(f4, hn::InterleaveUpper(wide, ab0, ce0)), f4, out + kTile);
      hn::Store(hn::BitCast(f4, hn::InterleaveLower(wide, ab1, ce1)), f4, out + 2 * kTile);
      hn::Store(hn::BitCast(f4, hn::InterleaveUpper(wide, ab1, ce1)), f4, out + 3 * kTile);
    }
#endif
}

// Highway's exp takes a NaN for minus infinity; here it must stay one.
HWY_INLINE hn::Vec<F> exponential(hn::Vec<F> x) { return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(F(), x)); }

// The forward pass of queries [q0, q0 + kTile).
void forward_tile(const Head& h, const TrainScratch& w, int64_t q0) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f)), dp = padded(h.d), rows = std::min(kTile, h.L - q0);
  const int64_t M = (rows + 3) / 4 * 4;
  const float low = -std::numeric_limits<float>::infinity();
  std::fill_n(w.a, h.group * kTile * dp, 0.0f);
  std::fill_n(w.most, h.group * kTile, low);
  std::fill_n(w.sum, h.group * kTile, 0.0f);
  for (int64_t k0 = 0; k0 <= q0; k0 += kTile) {
    const int64_t keys = std::min(kTile, h.L - k0);
    copy_tile(h.k + k0 * h.k_stride, h.k_stride, keys, h.d, dp, 1, w.kt);
    transpose_tile(w.kt, h.d, dp, w.kT);
    copy_tile(h.v + k0 * h.k_stride, h.k_stride, keys, h.d, dp, 1, w.vt);
    for (int64_t g = 0; g < h.group; ++g) {
      copy_tile(h.q + q0 * h.q_stride + g * h.d, h.q_stride, rows, h.d, dp, h.scale, w.qt);
      product(M, kTile, h.d, w.qt, dp, 1, w.kT, kTile, w.s, kTile, false);
      float* const o = w.a + g * kTile * dp;
      for (int64_t r = 0; r < rows; ++r) {
        float *const s = w.s + r * kTile, &most = w.most[g * kTile + r], &sum = w.sum[g * kTile + r];
        const int64_t n = std::min(kTile, q0 + r + 1 - k0);  // keys that this query sees; at least one
        auto top = hn::Set(f, low);
        for (int64_t j = 0; j < kTile; j += L) {
          auto x = hn::Load(f, s + j);
          if (j + L > n) {
            x = j < n ? hn::IfThenElse(hn::FirstN(f, size_t(n - j)), x, hn::Set(f, low)) : hn::Set(f, low);
            hn::Store(x, f, s + j);
          }
          top = hn::Max(top, x);
        }
        const float before = most;
        most = std::max(before, hn::GetLane(hn::MaxOfLanes(f, top)));
        const auto shift = hn::Set(f, most);
        auto total = hn::Zero(f);
        for (int64_t j = 0; j < kTile; j += L) {
          const auto e = exponential(hn::Sub(hn::Load(f, s + j), shift));
          hn::Store(e, f, s + j);
          total = hn::Add(total, e);
        }
        const float shrink = before == most ? 1.0f : std::exp(before - most);
        sum = sum * shrink + hn::GetLane(hn::SumOfLanes(f, total));
        if (shrink != 1.0f) {
          const auto by = hn::Set(f, shrink);
          for (int64_t i = 0; i < dp; i += L) hn::Store(hn::Mul(by, hn::Load(f, o + r * dp + i)), f, o + r * dp + i);
        }
      }
      product(M, dp, keys, w.s, kTile, 1, w.vt, dp, o, dp, true);
    }
  }
  for (int64_t g = 0; g < h.group; ++g)
    for (int64_t r = 0; r < rows; ++r) {
      const float* o = w.a + (g * kTile + r) * dp;
      const float sum = w.sum[g * kTile + r];
      float* to = h.o + (q0 + r) * h.q_stride + g * h.d;
      for (int64_t i = 0; i < h.d; ++i) to[i] = o[i] / sum;
      h.lse[(q0 + r) * h.lse_stride + g] = w.most[g * kTile + r] + std::log(sum);
    }
}

// p and ds of one tile for query head g: w.qt, w.dot, w.kT, w.vT are set, q times scale. w.p = p, w.s = ds; zeros where
// the query does not see the key.
void probabilities(const Head& h, const TrainScratch& w, int64_t g, int64_t q0, int64_t k0) {
  const F f;
  const int64_t L = int64_t(hn::Lanes(f)), dp = padded(h.d), rows = std::min(kTile, h.L - q0);
  const int64_t M = (rows + 3) / 4 * 4;
  product(M, kTile, h.d, w.qt, dp, 1, w.kT, kTile, w.p, kTile, false);
  product(M, kTile, h.d, w.dot, dp, 1, w.vT, kTile, w.s, kTile, false);
  for (int64_t r = 0; r < rows; ++r) {
    float *p = w.p + r * kTile, *s = w.s + r * kTile;
    const int64_t at = (q0 + r) * h.lse_stride + g, n = std::min(kTile, q0 + r + 1 - k0);
    const auto shift = hn::Set(f, h.lse[at]), along = hn::Set(f, h.along[at]);
    for (int64_t j = 0; j < kTile; j += L) {
      auto e = exponential(hn::Sub(hn::Load(f, p + j), shift));
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

void set_queries(const Head& h, const TrainScratch& w, int64_t g, int64_t q0) {
  const int64_t dp = padded(h.d), rows = std::min(kTile, h.L - q0), at = q0 * h.q_stride + g * h.d;
  copy_tile(h.q + at, h.q_stride, rows, h.d, dp, h.scale, w.qt);
  copy_tile(h.d_o + at, h.q_stride, rows, h.d, dp, 1, w.dot);
}

void set_keys(const Head& h, const TrainScratch& w, int64_t k0) {
  const int64_t dp = padded(h.d), keys = std::min(kTile, h.L - k0);
  copy_tile(h.k + k0 * h.k_stride, h.k_stride, keys, h.d, dp, 1, w.kt);
  copy_tile(h.v + k0 * h.k_stride, h.k_stride, keys, h.d, dp, 1, w.vt);
  transpose_tile(w.kt, h.d, dp, w.kT);
  transpose_tile(w.vt, h.d, dp, w.vT);
}

void store_tile(const float* x, int64_t n, int64_t d, int64_t dp, float by, float* to, int64_t stride) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < d; ++i) to[r * stride + i] = x[r * dp + i] * by;
}

// dk and dv of keys [k0, k0 + kTile): summed over the query tiles at and after them, then over heads.
void keys_tile(const Head& h, const TrainScratch& w, int64_t k0) {
  const int64_t dp = padded(h.d), keys = std::min(kTile, h.L - k0);
  set_keys(h, w, k0);
  std::fill_n(w.a, kTile * dp, 0.0f);
  std::fill_n(w.b, kTile * dp, 0.0f);
  for (int64_t g = 0; g < h.group; ++g)
    for (int64_t q0 = k0; q0 < h.L; q0 += kTile) {
      const int64_t rows = std::min(kTile, h.L - q0);
      set_queries(h, w, g, q0);
      probabilities(h, w, g, q0, k0);
      product(kTile, dp, rows, w.p, 1, kTile, w.dot, dp, w.b, dp, true);
      product(kTile, dp, rows, w.s, 1, kTile, w.qt, dp, w.a, dp, true);
    }
  store_tile(w.a, keys, h.d, dp, 1, h.dk + k0 * h.k_stride, h.k_stride);
  store_tile(w.b, keys, h.d, dp, 1, h.dv + k0 * h.k_stride, h.k_stride);
}

// dq of queries [q0, q0 + kTile).
void queries_tile(const Head& h, const TrainScratch& w, int64_t q0) {
  const int64_t dp = padded(h.d), rows = std::min(kTile, h.L - q0), M = (rows + 3) / 4 * 4;
  std::fill_n(w.a, h.group * kTile * dp, 0.0f);
  for (int64_t k0 = 0; k0 <= q0; k0 += kTile) {
    set_keys(h, w, k0);
    for (int64_t g = 0; g < h.group; ++g) {
      set_queries(h, w, g, q0);
      probabilities(h, w, g, q0, k0);
      product(M, dp, std::min(kTile, h.L - k0), w.s, kTile, 1, w.kt, dp, w.a + g * kTile * dp, dp, true);
    }
  }
  for (int64_t g = 0; g < h.group; ++g)
    store_tile(w.a + g * kTile * dp, rows, h.d, dp, h.scale, h.dq + q0 * h.q_stride + g * h.d, h.q_stride);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {

HWY_EXPORT(forward_tile);
HWY_EXPORT(keys_tile);
HWY_EXPORT(queries_tile);

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
  const std::vector<Work> all = tiles(a.packing);
  const auto keys = HWY_DYNAMIC_DISPATCH(keys_tile), queries = HWY_DYNAMIC_DISPATCH(queries_tile);
  const int64_t half = int64_t(all.size()) * s.G;
  ctx.pool->run(2 * half, [&](int64_t task, int worker) {
    const bool of_keys = task < half;
    // Early keys are seen by most queries, late queries see most keys: those start first.
    const auto at = size_t(task % half / s.G);
    const auto [n, tile] = all[of_keys ? at : all.size() - 1 - at];
    const int64_t g = task % s.G, t0 = a.packing.host_start[size_t(n)];
    Head h = head(s, a.packing, n);
    const int64_t q_at = t0 * h.q_stride + g * s.group * s.d, k_at = t0 * h.k_stride + g * s.d;
    const int64_t row_at = t0 * s.H + g * s.group;
    h.q = q + q_at, h.d_o = d_o + q_at, h.dq = dq + q_at;
    h.k = k + k_at, h.v = v + k_at, h.dk = dk + k_at, h.dv = dv + k_at;
    h.lse = const_cast<float*>(lse) + row_at, h.along = along + row_at;
    (of_keys ? keys : queries)(h, TrainScratch(scratch + worker * TrainScratch::floats(s.d, s.group), s.d, s.group),
                               tile * kTile);
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
