// kernels/cuda/matvec_kernel.cuh — y = x W^T for up to 64 rows of x, bound by reading W once (docs/CUDA.md).
//
// A task is up to 16 rows of the stacked segments over one part of K; a warp takes its tasks one after another. Weights
// come through a ring of stages in shared memory that belongs to the warp alone: a stage is 16 rows x 256 bytes, filled
// by asynchronous copies, so that no barrier stands in the way of the stream. They are the matrix unit's 16-row
// operand, x its 8-column one; both hold k in the same permuted order, so that every operand is a 16-byte read. A
// result is one chain of matrix-unit sums per part, in the order of k, and then the sum over parts in their order: the
// same bits for any number of rows.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/device.h"
#include "kernels/cuda/eight_bits.cuh"
#include "kernels/cuda/matvec_plan.h"
#include "kernels/cuda/matvec_types.h"

namespace kda::cuda {

inline constexpr int kTaskRows = 16;
inline constexpr int kPieceRow = 256;                      // bytes of a row in a stage
inline constexpr int kStageBytes = kTaskRows * kPieceRow;  // per warp
inline constexpr int kMaxRing = 8;
inline constexpr int kMaxColumns = 64;  // rows of x a launch takes
inline constexpr int kNormSlices = 8;

template <Weight kW>
inline constexpr int kStageK = kW == Weight::bf16 ? kPieceRow / 2 : kPieceRow;

struct MatvecSegment {
  const uint8_t* w;
  const float* scale;  // nullptr for bf16
  void* y;
  const __nv_bfloat16* x;  // own input; nullptr where all share one
  int64_t first, rows;     // within the stacked rows
  bool f32;                // y's type
};

struct MatvecArgs {
  MatvecSegment segment[kMaxSegments];
  int segments;
  int R, K;
  int64_t rows;
  MatvecPlan plan;
  int inputs;              // 1, or `segments` where each has its own x
  const __nv_bfloat16* x;  // [R,K]
  const float* residual;   // [R,K] with norm: x is rms_norm(residual)
  const float* norm;
  float eps;
  Finish finish;
  float* partial;     // [parts,R,rows] where parts > 1
  unsigned* arrived;  // [row_blocks] zeros
};

// 1 / sqrt(mean x^2 + eps) of R rows of K f32, K a multiple of 4. Eight slices of 32 lanes' strided sums, added in
// order: the same bits whatever the block is. `sums` [R * kNormSlices] is shared memory; ends with a barrier.
__device__ inline void norm_sums(const float* __restrict__ x, int R, int K, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int pieces = K / 4;
  for (int job = warp; job < R * kNormSlices; job += warps) {
    const float4* row = reinterpret_cast<const float4*>(x + int64_t(job / kNormSlices) * K);
    float sum = 0;
#pragma unroll 4
    for (int i = (job % kNormSlices) * 32 + lane; i < pieces; i += 32 * kNormSlices) {
      const float4 v = row[i];
      sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum), sum = fmaf(v.w, v.w, sum);
    }
    for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
    if (lane == 0) sums[job] = sum;
  }
  __syncthreads();
}
__device__ inline float norm_factor(const float* sums, int K, float eps) {
  float sum = 0;
  for (int s = 0; s < kNormSlices; ++s) sum += sums[s];
  return 1.0f / sqrtf(sum / float(K) + eps);
}
// Four normed values as bf16.
__device__ inline uint2 norm_apply(float4 x, float4 w, float factor) {
  const auto pack = [](float a, float b) {
    return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(a))) |
           uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
  };
  return {pack(x.x * factor * w.x, x.y * factor * w.y), pack(x.z * factor * w.z, x.w * factor * w.w)};
}

// The same normed rows, to global memory: for more rows than every block would want to norm again.
static __global__ void __launch_bounds__(256)
    norm_rows_kernel(const float* x, const float* w, float eps, int K, __nv_bfloat16* h) {
  __shared__ float sums[kNormSlices];
  release_next();
  wait_for_previous();
  const float* row = x + int64_t(blockIdx.x) * K;
  norm_sums(row, 1, K, sums);
  const float factor = norm_factor(sums, K, eps);
  for (int i = threadIdx.x; i < K / 4; i += blockDim.x)
    reinterpret_cast<uint2*>(h + int64_t(blockIdx.x) * K)[i] =
        norm_apply(reinterpret_cast<const float4*>(row)[i], reinterpret_cast<const float4*>(w)[i], factor);
}

struct MatvecRow {
  const MatvecSegment* segment;
  int64_t n;
};
__device__ inline MatvecRow matvec_row(const MatvecArgs& a, int64_t row) {
  int s = 0;
  while (s + 1 < a.segments && row >= a.segment[s + 1].first) ++s;
  return {&a.segment[s], row - a.segment[s].first};
}

__device__ inline void finish_one(const MatvecArgs& a, const MatvecRow& at, int column, float v) {
  if (at.segment->scale) v *= at.segment->scale[at.n];
  const int64_t i = int64_t(column) * at.segment->rows + at.n;
  if (a.finish == Finish::add) {
    static_cast<float*>(at.segment->y)[i] += v;
    return;
  }
  if (a.finish == Finish::relu2) v = v > 0 ? v * v : v < 0 ? 0 : v * 0;  // a NaN stays one
  if (at.segment->f32)
    static_cast<float*>(at.segment->y)[i] = v;
  else
    static_cast<__nv_bfloat16*>(at.segment->y)[i] = __float2bfloat16_rn(v);
}

// kTiles: columns of 8 that R rows of x take.
template <Weight kW, int kTiles>
__global__ void __launch_bounds__(512) matvec_kernel(const __grid_constant__ MatvecArgs a) {
  constexpr int kBytes = kW == Weight::bf16 ? 2 : 1;
  constexpr int kK = kStageK<kW>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float sums[8 * kNormSlices];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const MatvecPlan& plan = a.plan;
  const int row_block = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  const int units = (a.K + kK - 1) / kK;
  const int unit0 = int(int64_t(units) * part / plan.parts), unit1 = int(int64_t(units) * (part + 1) / plan.parts);
  const int stages = unit1 - unit0;  // of one task
  const int64_t tasks = int64_t(plan.row_blocks) * plan.turns * plan.warps;
  const auto first_row = [&](int64_t task) { return a.rows * task / tasks; };
  const auto task_of = [&](int turn) { return (int64_t(row_block) * plan.turns + turn) * plan.warps + warp; };
  const bool streams = warp < plan.warps;  // else the warp that stages x
  const int total = streams ? stages * plan.turns : 0;

  const int x_buffers = plan.chunk ? 2 : 1;
  const uint32_t x_shared = shared_address(shared);
  const uint32_t ring =
      x_shared + uint32_t(x_buffers * a.inputs * a.R * a.plan.x_stride) + uint32_t(warp * plan.ring) * kStageBytes;

  // ---- the stream of weights: lane l knows where row l % 16 of the task being fetched lies
  const uint8_t* row_at = nullptr;
  int fetch_turn = 0, fetch_stage = 0, fetch_rows = 0, fetched = 0;
  uint32_t fetch_slot = ring;
  const uint32_t ring_end = ring + uint32_t(plan.ring) * kStageBytes;
  const auto locate = [&] {
    const int64_t task = task_of(fetch_turn), r0 = first_row(task);
    fetch_rows = int(first_row(task + 1) - r0);
    if (fetch_rows > 0) {
      const MatvecRow at = matvec_row(a, r0 + min(lane % 16, fetch_rows - 1));
      row_at = at.segment->w + at.n * a.K * kBytes;
    }
  };
  const int piece = lane % 16;
  const auto fetch = [&] {
    if (fetched < total) {
      const uint32_t slot = fetch_slot;
      if ((fetch_slot += kStageBytes) == ring_end) fetch_slot = ring;
      const int64_t byte = int64_t(unit0 + fetch_stage) * kPieceRow + piece * 16;
      const int64_t left = int64_t(a.K) * kBytes - byte;
      const int bytes = left >= 16 ? 16 : left > 0 ? int(left) : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 2 * i + lane / 16;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(
            __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row_at), row));
        if (row < fetch_rows)
          copy16(slot + uint32_t(row * kPieceRow + ((piece ^ ((row & 1) << 2)) << 4)), bytes ? from + byte : from,
                 bytes);
      }
      ++fetched;
      if (++fetch_stage == stages) {
        fetch_stage = 0;
        if (++fetch_turn < plan.turns) locate();
      }
    }
    commit_copies();
  };
  if (total) locate();
  for (int i = 0; i + 1 < plan.ring; ++i) fetch();
  if (total) {  // 16 rows x 2 lines of 128 bytes to a stage
    const int64_t end = min(int64_t(a.K) * kBytes, int64_t(unit1) * kPieceRow);
    for (int i = 0; i < plan.ahead; ++i) {
      const int64_t byte = int64_t(unit0 + fetch_stage + i) * kPieceRow + (lane / 16) * 128;
      if (byte < end && fetch_turn < plan.turns && lane % 16 < fetch_rows) prefetch_l2(row_at + byte);
    }
  }
  release_next();
  wait_for_previous();

  // ---- x
  const int x0 = unit0 * kK;       // first k of the part
  const int part_k = stages * kK;  // beyond K: zeros
  const auto stage_x = [&](uint32_t to, int from_k, int width, int thread, int threads) {
    const int pieces = width / 8;
    for (int input = 0; input < a.inputs; ++input) {
      const __nv_bfloat16* x = a.inputs > 1 ? a.segment[input].x : a.x;
      for (int i = thread; i < a.R * pieces; i += threads) {
        const int r = i / pieces, j = i % pieces, k = from_k + 8 * j;
        copy16(to + uint32_t((input * a.R + r) * a.plan.x_stride + 16 * j), k < a.K ? x + int64_t(r) * a.K + k : x,
               k < a.K ? 16 : 0);
      }
    }
  };
  const int chunks = plan.chunk ? (part_k + plan.chunk - 1) / plan.chunk : 1;
  const uint32_t x_buffer = uint32_t(a.inputs * a.R * a.plan.x_stride);
  if (!plan.chunk) {
    if (a.residual) {
      norm_sums(a.residual, a.R, a.K, sums);
      const int pieces = part_k / 4;
      for (int i = threadIdx.x; i < a.R * pieces; i += blockDim.x) {
        const int r = i / pieces, j = i % pieces, k = x0 + 4 * j;
        uint2 v{0, 0};
        if (k < a.K)
          v = norm_apply(*reinterpret_cast<const float4*>(a.residual + int64_t(r) * a.K + k),
                         *reinterpret_cast<const float4*>(a.norm + k), norm_factor(sums + r * kNormSlices, a.K, a.eps));
        *reinterpret_cast<uint2*>(shared + r * a.plan.x_stride + 8 * j) = v;
      }
    } else {
      const int pieces = part_k / 8, of_input = a.R * pieces;
#pragma unroll 4
      for (int i = threadIdx.x; i < a.inputs * of_input; i += blockDim.x) {
        const int input = i / of_input, r = i % of_input / pieces, j = i % pieces, k = x0 + 8 * j;
        const __nv_bfloat16* x = a.inputs > 1 ? a.segment[input].x : a.x;
        const uint4 v = k < a.K ? *reinterpret_cast<const uint4*>(x + int64_t(r) * a.K + k) : uint4{};
        *reinterpret_cast<uint4*>(shared + (input * a.R + r) * a.plan.x_stride + 16 * j) = v;
      }
    }
    __syncthreads();
  } else if (!streams) {
    stage_x(x_shared, x0, min(plan.chunk, part_k), lane, 32);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    for (int c = 0; c < chunks * plan.turns; ++c) {
      const int next = (c + 1) % chunks;
      if (c + 1 < chunks * plan.turns) {
        stage_x(x_shared + uint32_t((c + 1) & 1) * x_buffer, x0 + next * plan.chunk,
                min(plan.chunk, part_k - next * plan.chunk), lane, 32);
        commit_copies();
        wait_copies<0>();
      }
      __syncthreads();
    }
  } else {
    __syncthreads();
  }

  // ---- products
  if (streams) {
    uint32_t x_row[kTiles];
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
      x_row[c] = x_shared + uint32_t(min(8 * c + g, a.R - 1) * a.plan.x_stride + t * 16 * (3 - kBytes));
    const uint32_t w_lane = uint32_t(g * kPieceRow);
    const int per_chunk = plan.chunk ? plan.chunk / kK : stages;
    int chunk = 0;
    uint32_t take_slot = ring;
    for (int turn = 0; turn < plan.turns; ++turn) {
      float sum[kTiles][4] = {};
      const int64_t task = task_of(turn), r0 = first_row(task);
      const int count = int(first_row(task + 1) - r0);
      uint32_t x_base = 0;
      if (a.inputs > 1 && count > 0)
        x_base = uint32_t(matvec_row(a, r0).segment - a.segment) * uint32_t(a.R * a.plan.x_stride);
      int in_chunk = 0;
      for (int s = 0; s < stages; ++s) {
        wait_copies(plan.ring - 2);
        __syncwarp();
        fetch();
        const uint32_t slot = take_slot + w_lane;
        if ((take_slot += kStageBytes) == ring_end) take_slot = ring;
        const uint32_t x_at = x_base + (plan.chunk ? uint32_t(chunk & 1) * x_buffer : 0) + uint32_t(in_chunk * kK * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t at = slot + uint32_t(((4 * j + t) ^ ((g & 1) << 2)) << 4);
          const uint4 top = shared16(at), low = shared16(at + 8 * kPieceRow);
          if constexpr (kW == Weight::bf16) {
#pragma unroll
            for (int c = 0; c < kTiles; ++c) {
              const uint4 x = shared16(x_row[c] + x_at + 64 * j);
              mma(sum[c], top.x, low.x, top.y, low.y, x.x, x.y);
              mma(sum[c], top.z, low.z, top.w, low.w, x.z, x.w);
            }
          } else {
            const uint32_t tops[4] = {top.x, top.y, top.z, top.w}, lows[4] = {low.x, low.y, low.z, low.w};
            uint32_t w[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              w[i][0] = widen<kW>(tops[i], 0), w[i][1] = widen<kW>(lows[i], 0), w[i][2] = widen<kW>(tops[i], 1),
              w[i][3] = widen<kW>(lows[i], 1);
#pragma unroll
            for (int c = 0; c < kTiles; ++c) {
              const uint4 x = shared16(x_row[c] + x_at + 128 * j), z = shared16(x_row[c] + x_at + 128 * j + 16);
              mma(sum[c], w[0][0], w[0][1], w[0][2], w[0][3], x.x, x.y);
              mma(sum[c], w[1][0], w[1][1], w[1][2], w[1][3], x.z, x.w);
              mma(sum[c], w[2][0], w[2][1], w[2][2], w[2][3], z.x, z.y);
              mma(sum[c], w[3][0], w[3][1], w[3][2], w[3][3], z.z, z.w);
            }
          }
        }
        if (++in_chunk == per_chunk && plan.chunk) {
          in_chunk = 0, ++chunk;
          __syncthreads();
        }
      }
      if (in_chunk && plan.chunk) {
        ++chunk;
        __syncthreads();
      }
      // sum[c]: rows g, g + 8 of the task, columns 8 c + 2 t and the next
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = g + 8 * half;
        if (r >= count) continue;
        const MatvecRow at = matvec_row(a, r0 + r);
#pragma unroll
        for (int c = 0; c < kTiles; ++c)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = 8 * c + 2 * t + i;
            if (column >= a.R) continue;
            const float v = sum[c][2 * half + i];
            if (plan.parts > 1)
              __stcg(a.partial + (int64_t(part) * a.R + column) * a.rows + r0 + r, v);
            else
              finish_one(a, at, column, v);
          }
      }
    }
  }

  // ---- parts: the block of a row block that comes last adds them up, in their order
  if (plan.parts > 1) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(a.arrived + row_block, 1u) == unsigned(plan.parts - 1);
      if (last) a.arrived[row_block] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
    const int64_t r0 = first_row(int64_t(row_block) * plan.turns * plan.warps);
    const int count = int(first_row((int64_t(row_block) + 1) * plan.turns * plan.warps) - r0);
    const int64_t step = int64_t(a.R) * a.rows;
    for (int i = threadIdx.x; i < count * a.R; i += blockDim.x) {
      const int column = i / count, r = i % count;
      const float* from = a.partial + int64_t(column) * a.rows + r0 + r;
      float v = __ldcg(from);
#pragma unroll 8
      for (int q = 1; q < plan.parts; ++q) v += __ldcg(from + q * step);
      finish_one(a, matvec_row(a, r0 + r), column, v);
    }
  }
}

}  // namespace kda::cuda
