// kernels/cuda/hopper.h — device code of sm_90a: barriers of the copy engine, its loads and stores, and wgmma.
// Source: the PTX manual, chapters mbarrier, cp.async.bulk.tensor and wgmma.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/async.cuh"

namespace kda::cuda::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using cuda::shared_address;

// async.cuh's, by pointer.
__device__ inline void init_barrier(uint64_t* b, uint32_t arrivals) { barrier_init(shared_address(b), arrivals); }
__device__ inline void expect_bytes(uint64_t* b, uint32_t bytes) { barrier_expect(shared_address(b), bytes); }
__device__ inline void wait_barrier(uint64_t* b, uint32_t phase) { barrier_wait(shared_address(b), phase); }
__device__ inline void arrive(uint64_t* b) { barrier_arrive(shared_address(b)); }
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* done) {
  copy_bulk(shared_address(to), from, bytes, shared_address(done));
}
// An arrival at the barrier that lies at b's place in block `rank` of the cluster. It orders no ordinary writes of
// other blocks (a release at cluster scope costs a fence of the whole device): for the reads of products that have
// ended.
__device__ inline void arrive_at(uint64_t* b, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }\n" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The box at (column, row) of a matrix, to shared memory here, or at the same place in every block of `mask`.
__device__ inline void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* done) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(done))
      : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* done, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(done)), "h"(mask)
      : "memory");
}
__device__ inline void store_box(const CUtensorMap* map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
// Plain bytes, multiples of 16 at multiples of 16: out; in is load_bytes.
__device__ inline void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
template <int n>
__device__ inline void wait_stores_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Between ordinary writes of shared memory and the copy engine's reads of it.
__device__ inline void publish_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int n>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// Four 8 x 8 matrices of 16 bits from the warp's registers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Of a tile whose rows are 128 bytes, swizzled by groups of 8 rows; the address is a multiple of 1024 (or, within a
// row, of 32: steps along K).
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  return (uint64_t(address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

// The sums d[i] on, as operands that the assembler's words number from %0 on.
#define KDA_SUMS_8(d, i)                                                                                  \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), \
      "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define KDA_SUMS_32(d, i) KDA_SUMS_8(d, i), KDA_SUMS_8(d, (i) + 8), KDA_SUMS_8(d, (i) + 16), KDA_SUMS_8(d, (i) + 24)

// d [64,256] += a [64,16] b [256,16]^T: both operands in shared memory, K innermost, rows of 128 swizzled bytes.
__device__ inline void multiply_64x256x16(float (&d)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1, 0, 0; }\n"
      : KDA_SUMS_32(d, 0), KDA_SUMS_32(d, 32), KDA_SUMS_32(d, 64), KDA_SUMS_32(d, 96)
      : "l"(a), "l"(b), "r"(keep));
}

// d [64,16] += a [64,16] b [16,16]^T, as above.
__device__ inline void multiply(float (&d)[8], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, %8, %9, p, 1, 1, 0, 0; }\n"
      : KDA_SUMS_8(d, 0)
      : "l"(a), "l"(b), "r"(keep));
}
// d [64,32] += a [64,16] b [32,16]^T, as above.
__device__ inline void multiply(float (&d)[16], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, %16, %17, p, 1, 1, 0, 0; }\n"
      : KDA_SUMS_8(d, 0), KDA_SUMS_8(d, 8)
      : "l"(a), "l"(b), "r"(keep));
}
// d [64,64] += a [64,16] b [64,16]^T, as above.
__device__ inline void multiply(float (&d)[32], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, 0, 0; }\n"
      : KDA_SUMS_32(d, 0)
      : "l"(a), "l"(b), "r"(keep));
}
// d [64,128] += a [64,16] b [128,16]^T, as above.
__device__ inline void multiply(float (&d)[64], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, 0; }\n"
      : KDA_SUMS_32(d, 0), KDA_SUMS_32(d, 32)
      : "l"(a), "l"(b), "r"(keep));
}

#endif

}  // namespace kda::cuda::hopper
