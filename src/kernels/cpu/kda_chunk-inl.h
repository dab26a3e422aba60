// kernels/cpu/kda_chunk-inl.h — what the forward and the backward pass over chunks of 16 tokens share: the decayed rows
// of a chunk, its scores, products with a panel of the state.
#if defined(KDA_CPU_KDA_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_CPU_KDA_CHUNK_INL_H_
#undef KDA_CPU_KDA_CHUNK_INL_H_
#else
#define KDA_CPU_KDA_CHUNK_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "kernels/cpu/kda_math-inl.h"
#include "kernels/cpu/kda_scratch.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t C = kKdaChunk, W = kKdaPanel;
constexpr int kTile = HWY_MAX_BYTES >= 64 ? 8 : 4;   // rows of a product held in registers, two vectors wide
constexpr int kGroup = HWY_MAX_BYTES >= 64 ? 8 : 4;  // vectors of key channels held in registers

// What of a chunk does not touch the state, rows of Kp floats; see KdaScratch.
struct Rows {
  int64_t Kp;
  float *decayed, *k, *q, *rest, *decay, *total;
};

// Asks for n rows of `width` floats before they are needed: a head's rows lie too far apart for the CPU to guess them.
template <bool kWrite = false>
HWY_INLINE void Ask(const float* rows, int64_t n, int64_t stride, int64_t width) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(rows + t * stride + c, kWrite);
}

// Everything of a chunk of n tokens that does not touch the state, for G vectors of channels from j on. Rows of q, k
// and g are `stride` floats apart; `left` channels remain.
template <int G>
HWY_INLINE void PrepareColumns(const Rows& w, const float* q, const float* k, const float* g, int64_t n, int64_t stride,
                               float scale, int64_t j, int64_t left) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.Kp;
  float *decay = w.decay + j, *kept_k = w.k + j, *kept_q = w.q + j, *decayed = w.decayed + j, *rest = w.rest + j;
  const VF s = hn::Set(d, scale);
  VF passed[G], sum[G];
  for (int c = 0; c < G; ++c) passed[c] = hn::Set(d, 1.0f), sum[c] = hn::Zero(d);
  for (int64_t t = 0; t < n; ++t) {
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t from = t * stride + j + c * N, to = t * Kp + c * N;
      const VF gt = LoadPart(d, g + from, left - c * N), kt = LoadPart(d, k + from, left - c * N);
      const VF qt = hn::Mul(LoadPart(d, q + from, left - c * N), s);
      const VF one = Exp(d, gt);
      sum[c] = hn::Add(sum[c], gt);
      passed[c] = hn::Mul(passed[c], one);
      hn::Store(one, d, decay + to);
      hn::Store(kt, d, kept_k + to);
      hn::Store(qt, d, kept_q + to);
      hn::Store(hn::Mul(kt, passed[c]), d, decayed + to);
      hn::Store(hn::Mul(qt, passed[c]), d, decayed + C * Kp + to);
    }
  }
  // The state outlives the chunk, so its factor comes from the sum: one rounding instead of n.
  for (int c = 0; c < G; ++c) {
    hn::Store(Exp(d, sum[c]), d, w.total + j + c * N);
    passed[c] = hn::Set(d, 1.0f);
  }
  for (int64_t t = n - 1; t >= 0; --t) {
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t to = t * Kp + c * N;
      hn::Store(hn::Mul(hn::Load(d, kept_k + to), passed[c]), d, rest + to);
      passed[c] = hn::Mul(passed[c], hn::Load(d, decay + to));
    }
  }
}

HWY_INLINE void Prepare(const Rows& w, const float* q, const float* k, const float* g, int64_t n, int64_t stride,
                        int64_t K) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.Kp;
  const float scale = 1.0f / std::sqrt(float(K));
  int64_t j = 0;
  for (; j + kGroup * N <= K; j += kGroup * N) PrepareColumns<kGroup>(w, q, k, g, n, stride, scale, j, K - j);
  for (; j + 4 * N <= K; j += 4 * N) PrepareColumns<4>(w, q, k, g, n, stride, scale, j, K - j);
  for (; j < K; j += N) PrepareColumns<1>(w, q, k, g, n, stride, scale, j, K - j);
  for (; j < Kp; j += N) {  // padding beyond the last vector used above
    hn::Store(hn::Zero(d), d, w.total + j);
    for (int64_t t = 0; t < n; ++t) hn::Store(hn::Zero(d), d, w.rest + t * Kp + j);
  }
  for (int64_t t = n; t < round_up(n, kTile); ++t) {
    std::fill_n(w.decayed + t * Kp, Kp, 0.0f);
    std::fill_n(w.decayed + (C + t) * Kp, Kp, 0.0f);
  }
}

// What G vectors of channels from j on add to the scores of key i: kk[t,:] and qk[t,:], to be summed over their lanes.
template <int G>
HWY_INLINE void ScoreColumns(const Rows& w, int64_t i, int64_t n, int64_t j, float* kk, float* qk) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d)), Kp = w.Kp;
  const float *decay = w.decay + j, *k = w.k + j, *q = w.q + j;
  VF key[G], own = j ? hn::Load(d, qk + i * N) : hn::Zero(d);
  for (int c = 0; c < G; ++c) {
    key[c] = hn::Load(d, k + i * Kp + c * N);
    own = hn::MulAdd(key[c], hn::Load(d, q + i * Kp + c * N), own);
  }
  hn::Store(own, d, qk + i * N);
  for (int64_t t = i + 1; t < n; ++t) {
    VF a = j ? hn::Load(d, kk + t * N) : hn::Zero(d), b = j ? hn::Load(d, qk + t * N) : hn::Zero(d);
    HWY_UNROLL(8)
    for (int c = 0; c < G; ++c) {
      const int64_t at = t * Kp + c * N;
      key[c] = hn::Mul(key[c], hn::Load(d, decay + at));
      a = hn::MulAdd(key[c], hn::Load(d, k + at), a);
      b = hn::MulAdd(key[c], hn::Load(d, q + at), b);
    }
    hn::Store(a, d, kk + t * N);
    hn::Store(b, d, qk + t * N);
  }
}

// By key, then by the later token, each sum over lanes at the end; sums [2,C,lanes] is scratch.
// L[i,t] = sum_d k_t k_i D for t > i, P[i,t] = sum_d q_t k_i D for t >= i; D is the decay after i, up to t included.
HWY_INLINE void Scores(const Rows& w, int64_t n, int64_t K, float* sums, float* L, float* P) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t i = 0; i < n; ++i) {
    float *kk = sums, *qk = sums + C * C;
    int64_t j = 0;
    for (; j + kGroup * N <= K; j += kGroup * N) ScoreColumns<kGroup>(w, i, n, j, kk, qk);
    for (; j + 4 * N <= K; j += 4 * N) ScoreColumns<4>(w, i, n, j, kk, qk);
    for (; j < K; j += N) ScoreColumns<1>(w, i, n, j, kk, qk);
    SumRows(kk, L + i * C);
    SumRows(qk, P + i * C);
  }
}

// out[r,:] = sum_d rows[r,d] panel[d,:] for kTile rows
HWY_INLINE void MeetState(const float* rows, int64_t Kp, int64_t K, const float* panel, float* out) {
  const F32 d;
  const int64_t N = int64_t(hn::Lanes(d));
  for (int64_t c = 0; c < W; c += 2 * N) {
    VF a[kTile], b[kTile];
    for (int r = 0; r < kTile; ++r) a[r] = b[r] = hn::Zero(d);
    for (int64_t i = 0; i < K; ++i) {
      const VF x = hn::Load(d, panel + i * W + c), y = hn::Load(d, panel + i * W + c + N);
      HWY_UNROLL(8)
      for (int r = 0; r < kTile; ++r) {
        const VF m = hn::Set(d, rows[r * Kp + i]);
        a[r] = hn::MulAdd(m, x, a[r]);
        b[r] = hn::MulAdd(m, y, b[r]);
      }
    }
    for (int r = 0; r < kTile; ++r) {
      hn::Store(a[r], d, out + r * W + c);
      hn::Store(b[r], d, out + r * W + c + N);
    }
  }
}

// to[c,r] = from[r,c] for 16 x 16 floats; rows are `stride` and `to_stride` floats apart.
HWY_INLINE void Transpose16(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if HWY_TARGET <= HWY_AVX3
  const F32 d;
  const hn::Repartition<uint64_t, F32> pairs;
  VF x[4][4];  // x[a][m], block b: column 4b+m of rows 4a .. 4a+3
  HWY_UNROLL(4)
  for (int a = 0; a < 4; ++a) {
    const auto row = [&](int r) { return hn::LoadU(d, from + (4 * a + r) * stride); };
    const VF r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
    const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d, r0, r1));
    const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d, r2, r3));
    const auto up01 = hn::BitCast(pairs, hn::InterleaveUpper(d, r0, r1));
    const auto up23 = hn::BitCast(pairs, hn::InterleaveUpper(d, r2, r3));
    x[a][0] = hn::BitCast(d, hn::InterleaveLower(pairs, low01, low23));
    x[a][1] = hn::BitCast(d, hn::InterleaveUpper(pairs, low01, low23));
    x[a][2] = hn::BitCast(d, hn::InterleaveLower(pairs, up01, up23));
    x[a][3] = hn::BitCast(d, hn::InterleaveUpper(pairs, up01, up23));
  }
  HWY_UNROLL(4)
  for (int m = 0; m < 4; ++m) {  // now the blocks: block b of the four x[.][m] makes up row 4b+m
    const auto even = [&](VF a, VF b) { return hn::OddEvenBlocks(hn::SwapAdjacentBlocks(b), a); };
    const auto odd = [&](VF a, VF b) { return hn::OddEvenBlocks(b, hn::SwapAdjacentBlocks(a)); };
    const VF e01 = even(x[0][m], x[1][m]), e23 = even(x[2][m], x[3][m]);
    const VF o01 = odd(x[0][m], x[1][m]), o23 = odd(x[2][m], x[3][m]);
    hn::StoreU(hn::ConcatLowerLower(d, e23, e01), d, to + m * to_stride);
    hn::StoreU(hn::ConcatLowerLower(d, o23, o01), d, to + (4 + m) * to_stride);
    hn::StoreU(hn::ConcatUpperUpper(d, e23, e01), d, to + (8 + m) * to_stride);
    hn::StoreU(hn::ConcatUpperUpper(d, o23, o01), d, to + (12 + m) * to_stride);
  }
#else
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t c = 0; c < 16; ++c) to[c * to_stride + r] = from[r * stride + c];
#endif
}

// Panels [n/32, m, 32] to panels [m/32, n, 32], up to a multiple of 16 of either.
HWY_INLINE void TransposePanels(const float* from, int64_t n, int64_t m, float* to, int64_t to_n) {
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t j = 0; j < m; j += 16)
      Transpose16(from + (i / W * m + j) * W + i % W, W, to + (j / W * to_n + i) * W + j % W, W);
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
