// kernels/cuda/kda_prefill_group.cuh — what the kernels that go from chunk to chunk share: products by a warpgroup
// (sm_90a), and powers of two.
#pragma once
#include "kernels/cuda/kda_prefill.cuh"

#ifdef __CUDACC__
namespace kda::cuda::prefill {

__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ inline uint32_t bf16_bits(float x, float y) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ inline __half2 as_half2(uint32_t x) { return *reinterpret_cast<const __half2*>(&x); }

// Of a power of two.
__device__ inline float inverse(float x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }

// 2^-(the exponent of x), so that x becomes 1 .. 2
__device__ inline float inverse_power(float x) {
  const int e = min(max(int(__float_as_uint(x) >> 23) - 127, -100), 100);
  return __uint_as_float(uint32_t(127 - e) << 23);
}

// ---- 16 rows of a state in a warp: a lane has rows g and g + 8, two columns of every 8, in S[..][2 * half ..]
template <int NT>
__device__ __forceinline__ void load_rows(float (&S)[NT][4], const float* from, int g, int tq) {
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 x = make_float2(0, 0);
      if (from) x = *reinterpret_cast<const float2*>(from + int64_t(g + 8 * half) * (8 * NT) + 8 * j + 2 * tq);
      S[j][2 * half] = x.x, S[j][2 * half + 1] = x.y;
    }
}
template <int NT>
__device__ __forceinline__ void store_rows(float* to, const float (&S)[NT][4], float by, int g, int tq) {
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(to + int64_t(g + 8 * half) * (8 * NT) + 8 * j + 2 * tq) =
          make_float2(S[j][2 * half] * by, S[j][2 * half + 1] * by);
}
// A: S in fp16. S holds the state times `power`; true where fit_rows must change that first, since fp16 would not hold
// S, what W makes of it, or U0 (at most 2^11 times `unscale`). The same in all lanes.
template <int NT>
__device__ __forceinline__ bool round_rows(uint32_t (&A)[NT][2], const float (&S)[NT][4], float power, float unscale) {
  __half2 most = __float2half2_rn(0.0f);
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      A[j][e] = half2_bits(S[j][2 * e], S[j][2 * e + 1]);
      most = __hmax2(most, __habs2(as_half2(A[j][e])));
    }
  const float s_most = fmaxf(__low2float(most), __high2float(most)), u_most = unscale * 0x1p11f * power;
  // |W| <= 2 in length, so |W S| <= 2 sqrt(K) max |S|: with these limits no U passes 65504.
  return __any_sync(~0u, s_most > 0x1p10f || u_most > 0x1p14f) || !__any_sync(~0u, fmaxf(s_most, u_most) >= 0x1p-3f);
}
template <int NT>
__device__ __forceinline__ void fit_rows(uint32_t (&A)[NT][2], float (&S)[NT][4], float& power, float unscale) {
  float top = unscale * 0x1p11f * power;
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) top = fmaxf(top, fabsf(S[j][e]));
#pragma unroll
  for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
  const float by = inverse_power(top) * 0x1p6f;
  if (top > 0 && (by < 1 || power < 0x1p40f)) {
    power *= by;
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) S[j][e] *= by;
    round_rows(A, S, power, unscale);
  }
}
// A chunk's outputs, as accumulators have them (16 values x 64 tokens), to tokens g, g + 8, .. of which `left` - g are
// there; next: elements from one of these tokens to the next.
__device__ __forceinline__ void write_rows(__nv_bfloat16* to, const uint32_t (&out)[8][2], int64_t next, int left) {
#pragma unroll
  for (int j = 0; j < 8; ++j, to += next) {
    const uint32_t low = transposed(out[j][0]), high = transposed(out[j][1]);
    if (8 * j < left) {
      *reinterpret_cast<uint32_t*>(to) = low;
      *reinterpret_cast<uint32_t*>(to + 8) = high;
    }
  }
}

// ---- products with the tiles of a chunk in shared memory, by a warpgroup
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KDA_REGISTERS(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define KDA_REGISTERS8(d, j)                                                                      \
  KDA_REGISTERS(d, j), KDA_REGISTERS(d, j + 1), KDA_REGISTERS(d, j + 2), KDA_REGISTERS(d, j + 3), \
      KDA_REGISTERS(d, j + 4), KDA_REGISTERS(d, j + 5), KDA_REGISTERS(d, j + 6), KDA_REGISTERS(d, j + 7)

// A tile for wgmma: its address, 1024 bytes from 8 rows to the next 8, 8192 from 64 columns to the next 64.
__device__ inline uint64_t tile(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(8192 >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// What 16 columns further on adds to it, in a matrix `from` bytes behind.
__device__ constexpr uint64_t tile_step(int64_t from, int step) {
  return uint64_t(from + (step >> 2) * 8192 + (step & 3) * 32) / 16;
}
__device__ inline void group_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left, int n>
__device__ inline void group_wait(float (&d)[n][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
}
// d[64,64] += a[64,16] b[16,64]; b by rows of its columns (across = 0) or as it is (across = 1). keep = 0: d = ..
template <int across>
__device__ inline void group_mma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int keep = 1) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, keep, 1, 1, %38;\n}"
      : KDA_REGISTERS8(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(across));
}
// d[64,32] += a[64,16] b[16,32], b by rows of its columns
__device__ inline void group_mma32(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, int keep = 1) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, keep, 1, 1, 0;\n}"
      : KDA_REGISTERS(d, 0), KDA_REGISTERS(d, 1), KDA_REGISTERS(d, 2), KDA_REGISTERS(d, 3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
template <int across>
__device__ inline void group_mma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, int keep = 1) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"
      "%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, "
      "keep, 1, 1, %70;\n}"
      : KDA_REGISTERS8(d, 0), KDA_REGISTERS8(d, 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(across));
}
#endif

}  // namespace kda::cuda::prefill
#endif
