// kernels/cuda/chain_values.cuh — the shape of a chain's blocks, and how they hand each other what their links give.
//
// A value is its own mark: memory is full of ones before the launch, and what is none of them has come. So a reader
// needs neither a count nor a fence, only to look again.
#pragma once
#include <cuda_bf16.h>

#include "kernels/cuda/chain.h"

namespace kda::cuda {

inline constexpr int kChainWarps = 10, kChainTakers = 32 * kChainWarps, kChainThreads = kChainTakers + 32;
inline constexpr int kChainColumns = 8;  // of the matrix unit; a group has at most as many rows of weights
inline constexpr int kChainTurns =
    kChainSlot / (kChainColumns * kChainPiece * kChainWarps);  // pieces of a chunk that a lane has a part of

#if __CUDA_ARCH__ >= 900

__device__ inline void chain_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kChainTakers) : "memory"); }

// bf16 and f32 results are never all ones: the arithmetic's NaN is 0x7fff....
__device__ inline uint32_t no_mark(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits == kMark ? 0x7fffffffu : bits;
}
template <class E>
__device__ inline bool has_mark(uint4 v) {
  if constexpr (sizeof(E) == 4) return v.x == kMark || v.y == kMark || v.z == kMark || v.w == kMark;
  const uint32_t most = __vmaxu2(__vmaxu2(v.x, v.y), __vmaxu2(v.z, v.w));
  return most >= 0xffff0000u || (most & 0xffffu) == 0xffffu;
}
// Past the first-level cache, as are all reads of what the same launch writes.
__device__ inline uint4 load16(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
template <class E>
__device__ inline uint4 await16(const void* from) {
  uint4 v;
  do v = load16(from);
  while (has_mark<E>(v));
  return v;
}
__device__ inline void store_value(float* to, float v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(no_mark(v)) : "memory");
}
__device__ inline void store_value(__nv_bfloat16* to, float v) {  // whose NaN this gives is 0x7fff
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(__bfloat16_as_ushort(__float2bfloat16_rn(v)))
               : "memory");
}

#endif

}  // namespace kda::cuda
