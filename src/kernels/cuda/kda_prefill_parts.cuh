// kernels/cuda/kda_prefill_parts.cuh — pieces of the preparation of a chunk: its shared memory, gates, sums over lanes,
// tiles of scores and of the triangular solve.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/kda_prefill.cuh"

#ifdef __CUDACC__
namespace kda::cuda::prefill {

inline constexpr int kThreads = 256;
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr int kStride = 68;  // floats from row to row of the solve's matrices: fragments without bank conflicts

// Shared memory. Three levels of scaled rows (pairs at least 8, 16 and 32 tokens apart): k of 64 tokens, q of the 32
// that are rows; later the solve's matrices and v. Then K^ and the scores. beta lies in the first rows of P, in columns
// that no fragment of P has.
template <int K>
struct Layout {
  static constexpr int row = K * 2, level = 96 * row;
  // over the levels, once the scores are there
  static constexpr int X = 0, product = X + 64 * kStride * 4, T = product + 32 * kStride * 4, T_high = T + 64 * 128;
  static constexpr int T_rest = product;  // once the solve is through
  static constexpr int T_low = T_high + 64 * 128, v = T_low + 64 * 128, solve = v + 64 * 256;
  static constexpr int keys = 3 * level > solve ? 3 * level : solve, L = keys + 64 * row, P = L + 64 * kStride * 4;
  static constexpr int bytes = P + 64 * 64 * 2;
};
// Two blocks share a multiprocessor of sm_90 (227 KB, 1 KB of each block for the system).
static_assert(Layout<128>::bytes <= (228 * 1024) / 2 - 1024);

__device__ inline float shuffled(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
__device__ inline __half2 shuffled(__half2 x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// Sums n values over the lanes of groups of n: afterwards x[0] is the sum of value `lane % n`.
template <int n, class T, int size>
__device__ inline void fold(T (&x)[size], int lane) {
  if constexpr (n > 1) {
    const bool upper = lane & (n / 2);
#pragma unroll
    for (int j = 0; j < n / 2; ++j) {
      const T low = x[j], high = x[j + n / 2], send = upper ? low : high, keep = upper ? high : low;
      x[j] = keep + shuffled(send, n / 2);
    }
    fold<n / 2>(x, lane);
  }
}

// n bf16 values as they lie in memory.
template <int n>
struct Raw {
  uint32_t bits[n / 2];
  __device__ void load(const __nv_bfloat16* p) {
    if constexpr (n == 4) {
      const uint2 x = *reinterpret_cast<const uint2*>(p);
      bits[0] = x.x, bits[1] = x.y;
    } else {
      bits[0] = *reinterpret_cast<const uint32_t*>(p);
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) bits[i] = 0;
  }
  __device__ void widen(float (&x)[n]) const {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) x[2 * i] = low_bf16(bits[i]), x[2 * i + 1] = high_bf16(bits[i]);
  }
};

// A lane's C channels of one token, as fp16.
template <int C>
struct Channels {
  __half2 x[C / 2];
  __device__ void set(const float (&f)[C], float by) {
#pragma unroll
    for (int c = 0; c < C / 2; ++c) x[c] = __floats2half2_rn(f[2 * c] * by, f[2 * c + 1] * by);
  }
  __device__ Channels operator*(const Channels& o) const {
    Channels y;
#pragma unroll
    for (int c = 0; c < C / 2; ++c) y.x[c] = __hmul2(x[c], o.x[c]);
    return y;
  }
  __device__ Channels times_plus(const Channels& by, const Channels& o) const {
    Channels y;
#pragma unroll
    for (int c = 0; c < C / 2; ++c) y.x[c] = __hfma2(x[c], by.x[c], o.x[c]);
    return y;
  }
  __device__ __half2 dot(const Channels& o) const {  // in two halves
    __half2 y = __hmul2(x[0], o.x[0]);
    if constexpr (C == 4) y = __hfma2(x[1], o.x[1], y);
    return y;
  }
  __device__ void store(char* to) const {
    if constexpr (C == 4)
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(x);
    else
      *reinterpret_cast<__half2*>(to) = x[0];
  }
};

// Log of the decay, base 2; a = exp(A_log). What log2(1 + e) would lose of a small e comes from its series.
__device__ inline float softplus_log2(float z, float a) {
  const float y = z * kLog2e, e = exp2_fast(-fabsf(y)), small = e * (kLog2e - e * (kLog2e / 2 - e * (kLog2e / 3)));
  return -a * (fmaxf(y, 0.0f) + (e < 0x1p-7f ? small : log2_fast(1.0f + e)));
}
__device__ inline float bounded_log2(float z, float a, float lower) {
  const float e = exp2_fast(-fabsf(a * z) * kLog2e), s = __fdividef(1.0f, 1.0f + e);
  return lower * kLog2e * (a * z >= 0 ? s : e * s);
}

// Unit of 16 bytes u of row r, in rows of K halves.
template <int K>
__device__ inline int at(int r, int u) {
  return r * (K * 2) + ((u ^ (r & 7)) * 16);
}
// The same for [64,64] halves.
__device__ inline int at64(int r, int u) { return r * 128 + ((u ^ (r & 7)) * 16); }
// [64,64] floats: the index of row r, column c.
__device__ inline int at_f(int r, int c) { return r * kStride + c; }

// One tile of scores: rows of two tables of scaled rows (row_address: this lane's row of A), columns col0 .. col0+7.
template <int K>
__device__ inline void score_tile(float (&c)[4], uint32_t base, int a_row, int b_row, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = 0;
#pragma unroll
  for (int s = 0; s < K / 32; ++s) {
    uint32_t a0[4], a1[4], b[4];
    ldmatrix(b, base + at<K>(b_row, s * 4 + (lane >> 3)));
    ldmatrix(a0, base + at<K>(a_row, s * 4 + (lane >> 4)));
    ldmatrix(a1, base + at<K>(a_row, s * 4 + 2 + (lane >> 4)));
    mma(c, a0, b[0], b[1]);
    mma(c, a1, b[2], b[3]);
  }
}

// The upper 11 bits of a product's operand; mma drops the rest itself.
__device__ inline uint32_t tf32(float x) { return __float_as_uint(x) & 0xffffe000u; }
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a[16,8] b[8,8] from [64,64] matrices in shared memory, the first element of each given; what tf32 drops of
// either operand is multiplied by the other's upper part, so that the products keep 21 bits.
__device__ inline void product8(float (&c)[4], const float* a, int ar, int ac, const float* b, int br, int bc, int g,
                                int t) {
  const float x[4] = {a[at_f(ar + g, ac + t)], a[at_f(ar + 8 + g, ac + t)], a[at_f(ar + g, ac + 4 + t)],
                      a[at_f(ar + 8 + g, ac + 4 + t)]};
  const float y[2] = {b[at_f(br + t, bc + g)], b[at_f(br + 4 + t, bc + g)]};
  uint32_t xh[4], xl[4], yh[2], yl[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) xh[i] = tf32(x[i]), xl[i] = __float_as_uint(x[i] - __uint_as_float(xh[i]));
#pragma unroll
  for (int i = 0; i < 2; ++i) yh[i] = tf32(y[i]), yl[i] = __float_as_uint(y[i] - __uint_as_float(yh[i]));
  mma_tf32(c, xl, yh);
  mma_tf32(c, xh, yl);
  mma_tf32(c, xh, yh);
}
__device__ inline void put8(float* to, int r, int c, const float (&x)[4], float by, int g, int t) {
  *reinterpret_cast<float2*>(to + at_f(r + g, c + 2 * t)) = make_float2(by * x[0], by * x[1]);
  *reinterpret_cast<float2*>(to + at_f(r + 8 + g, c + 2 * t)) = make_float2(by * x[2], by * x[3]);
}

// x[i] of lane j of a quad to x[j] of lane i
__device__ inline void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int m = 1; m <= 2; m *= 2) {
    const bool upper = lane & m;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & m) continue;
      const uint32_t low = x[i], high = x[i + m], got = __shfl_xor_sync(~0u, upper ? low : high, m);
      x[i] = upper ? got : low, x[i + m] = upper ? high : got;
    }
  }
}

}  // namespace kda::cuda::prefill
#endif
