// kernels/cuda/kda_prefill.cuh — what the two phases of the chunked forward pass share: their arguments, what of a
// chunk one hands to the other, and the matrix instructions. docs/CUDA-KDA.md has the mathematics.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/kda.h"
#ifdef __CUDACC__
#include "kernels/cuda/async.cuh"
#endif

namespace kda::cuda::prefill {

inline constexpr int kChunk = 64;

// Chunks are numbered through the pack without a table: sequence n has the numbers from start[n] / 64 + n on. That is
// at least as many as it needs; the others stay empty.
__host__ __device__ inline int64_t first_slot(int32_t start, int64_t n) { return start / kChunk + n; }

struct Args {
  const __nv_bfloat16 *q, *k, *v, *f, *b;
  const float *A_log, *dt_bias;
  float* state;
  const int32_t *in, *out, *start;
  const StateMark* marks;
  int32_t marks_n;
  __nv_bfloat16* o;
  int32_t N, H, V;
  bool bounded;
  float lower_bound, beta_scale;
  // One pass: chunk numbers from .. to-1, of sequences first .. last. The state of a sequence that goes on into the
  // next pass is handed over in carry_out, and found in carry_in there: [H,V,K].
  int64_t from, to;
  int32_t first, last;
  char* records;  // [to-from,H] records
  const float* carry_in;
  float* carry_out;
  // Segmented: each sequence's chunks of this pass in `segments` parts of equal length.
  int32_t segments;
  float* summaries;  // [last-first+1, segments-1, H, V+K, K]: what a segment adds, [V,K], and what it does, [K,K]
};

// Both phases in one launch: what its blocks tell each other. All zero at the start.
struct Flow {
  int64_t ring, slots;  // places for chunk numbers; chunk numbers of the pack
  uint32_t* ready;      // [ring,H] how often the place was filled
  uint32_t* progress;   // [V/64,H] the first chunk number still to be read
  uint32_t *ticket, *chain_ticket;
  uint32_t* of_sm;  // [kFlowSms,2] blocks that came to a multiprocessor; what the first became, and 1
  int32_t alone;    // so many chains have a multiprocessor to themselves
};
inline constexpr int kFlowSms = 1024;

// What the first phase leaves of one chunk and head for the second: bytes of each part. The matrices are tiles of 64
// fp16 columns, rows of 128 bytes, units of 16 bytes at unit ^ (row & 7): what wgmma calls the 128-byte swizzle. Of a
// chunk that is taken token by token, what kda_prefill_tokens.cuh says.
//   W   -T K^, [token][K]
//   K'  [token][K]
//   E   [K] the chunk's whole decay                                                           f32
//   P   [token][token]; E again, and U0's powers, where tokens 32.. cannot reach tokens ..31 (spare_at)
//   Q^  [token][K]
//   U0  as accumulators: [V/16][4][lane] of 16 bytes, times a power of two for each 16 values   fp16
//   and the inverse of that power: [V/16]                                                     f32
template <int K>
struct Record {
  static constexpr int64_t w = 0, k = 64 * K * 2, e = 2 * k, p = e + 1024, q = p + 64 * 64 * 2, u = q + 64 * K * 2;
  static constexpr int64_t summary = p;  // what the state alone needs: W, K', E
  static __host__ __device__ int64_t scale(int64_t V) { return u + 64 * V * 2; }
  static __host__ __device__ int64_t bytes(int64_t V) { return scale(V) + 64; }
};

#ifdef __CUDACC__

// Where unit u of row r lies in a matrix of 64 rows as above.
__device__ inline int tile_at(int r, int u) { return (u >> 3) * 8192 + r * 128 + (((u ^ r) & 7) * 16); }

// In the P tile: unit u (0 or 1) of row r < 32 that no product reads.
__device__ inline int spare_at(int r, int u) { return tile_at(r, 4 + u); }

// Four 8 x 8 matrices of 16-bit elements; each lane gives the address of one row of 16 bytes.
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void ldmatrix_t(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c[16,8] += a[16,16] b[16,8], fp32 sums
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t half2_bits(float x, float y) {
  const __half2 h = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&h);
}
__device__ inline float2 half2_floats(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 16 bytes, or zeros where `there` is false
__device__ inline void copy_async_or_zero(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Which sequence has chunk number c: the last n with first_slot(start[n], n) <= c.
__device__ inline int sequence_of(const Args& a, int64_t c) {
  int low = a.first, high = a.last;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (first_slot(a.start[mid], mid) <= c)
      low = mid;
    else
      high = mid - 1;
  }
  return low;
}

// The chunks of one sequence that lie in this pass: numbers within the sequence, and the record of the first.
struct Range {
  int64_t from, to, record, chunks;
};
__device__ inline Range range_of(const Args& a, int n) {
  const int64_t slot = first_slot(a.start[n], n), chunks = (a.start[n + 1] - a.start[n] + kChunk - 1) / kChunk;
  Range r;
  r.chunks = chunks;
  r.from = a.from > slot ? a.from - slot : 0;
  r.to = a.to - slot < chunks ? a.to - slot : chunks;
  r.record = slot + r.from - a.from;
  return r;
}

#endif  // __CUDACC__

// Records of all chunks of the pass.
template <int K>
void prepare_chunks(const Args&, cudaStream_t);
// Outputs and states, chunk after chunk of each sequence or segment. warps: 16 rows of a state each, 4 or 8 in a block.
template <int K>
void scan_chunks(const Args&, int warps, cudaStream_t);
// What each segment but the last adds to a state and does to it; then the state that each but the first starts from.
template <int K>
void summarise_segments(const Args&, cudaStream_t);

// Both phases at once, over the whole pack. control: flow_bytes; blocks: that are resident together, on a device with
// machine code for sm_90a.
bool flow_code();  // whether this binary has that code
int64_t flow_bytes(int64_t H, int64_t V, int64_t ring);
template <int K>
void flow_chunks(Args, int64_t ring, int64_t slots, int alone, char* control, int blocks, cudaStream_t);

// Any K and V, token by token.
void prefill_general(const Args&, int64_t K, cudaStream_t);
int64_t general_shared_bytes(int64_t K);

int64_t prepare_shared_bytes(int64_t K);
int64_t scan_shared_bytes(int64_t K);
int64_t flow_shared_bytes(int64_t K);

}  // namespace kda::cuda::prefill
