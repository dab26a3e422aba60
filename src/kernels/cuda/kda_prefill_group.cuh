// kernels/cuda/kda_prefill_group.cuh — what the kernels that go from chunk to chunk share on sm_90: bulk copies with
// their barriers, products by a warpgroup, and powers of two.
#pragma once
#include "kernels/cuda/kda_prefill.cuh"

#ifdef __CUDACC__
namespace kda::cuda::prefill {

#if __CUDA_ARCH__ >= 900
__device__ inline void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
#endif

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
