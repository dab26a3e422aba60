// kernels/cuda/attention_tile.cuh — what the tensor-core attention kernels are made of: tiles of 64 keys in shared
// memory, products of 16 x 8 x 16, and the arithmetic of the running maximum, written so that it rounds the same
// wherever it is inlined.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/attention_kernels.h"

namespace kda::cuda::tile {

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16 ones

// A tile row holds D channels in pieces of 16 bytes, exchanged within each eight so that the eight rows that an
// instruction reads together lie in different banks.
template <int D>
__device__ __forceinline__ uint32_t piece(uint32_t tile, int row, int at) {
  return tile + uint32_t((row * (D / 8) + (at ^ (row & 7))) * 16);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes on their way to shared memory; zeros instead where `there` is false.
__device__ __forceinline__ void fetch16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void fetch_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void fetch_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// c += a b: a 16 x 16 by rows, b 16 x 8 by columns.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pair(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// A row's running maximum takes in a block's: by what earlier sums shrink, and what scores are lessened by.
struct Step {
  float shrink, base;
};
__device__ __forceinline__ Step raise(float& most, float block_most, float scale_log2) {
  const float before = most;
  most = fmaxf(before, block_most);
  const float finite = most == kMinusInfinity ? 0.0f : most;  // a row that sees nothing yet
  return {exp2_fast(__fmul_rn(__fsub_rn(before, finite), scale_log2)), __fmul_rn(finite, scale_log2)};
}
__device__ __forceinline__ float weight(float score, const Step& s, float scale_log2) {
  return exp2_fast(__fmaf_rn(score, scale_log2, -s.base));
}

// Sums of the splits so far take in those of the next: factors of the old and of the new.
struct Merge {
  float old, fresh;
};
__device__ __forceinline__ Merge merge(float& most, float split_most, float scale_log2) {
  const float before = most;
  most = fmaxf(before, split_most);
  const float finite = most == kMinusInfinity ? 0.0f : most;
  return {exp2_fast(__fmul_rn(__fsub_rn(before, finite), scale_log2)),
          exp2_fast(__fmul_rn(__fsub_rn(split_most, finite), scale_log2))};
}
__device__ __forceinline__ float merged(float old, float fresh, const Merge& m) {
  return __fmaf_rn(fresh, m.fresh, __fmul_rn(old, m.old));
}

}  // namespace kda::cuda::tile
