// kernels/cuda/skinny90.cuh — y = x W^T for 3 to 128 rows of x in bf16, sm_90a: nearly as fast as W can be read.
//
// W is the operand of 64 rows of wgmma, x the one of up to 128 columns: a block multiplies a tile of kGroups x 64 rows
// of W, a warpgroup each 64, with all of x; one thread more asks the copy engine for stages of 64 columns of both, as
// many as shared memory holds. Where W has too few rows for the device, several blocks share a tile, each a part of K,
// and then add up each a slice of it, parts in rising order of k. How a product is cut depends on W's shape and the
// device alone, so a row's bits depend on nothing but that row.
//
// Weights of 8 bits come as they are, in stages of 128 columns; each warp widens its fragments on their way from shared
// memory to the registers that wgmma takes them from. What those hold is bf16 and exact; the scales follow at the end.
// Matrices in bf16 may be among them: of these a tile is 64 rows, which are as many bytes.
//
// Launches hide behind each other: a block asks for its first stages of W before it waits for the kernel that makes x.
#pragma once
#include <cuda.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/eight_bits.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/hopper_fragments.h"
#include "kernels/cuda/skinny90.h"

namespace kda::cuda::skinny {

inline constexpr int kParts = kSkinnyParts, kMatrixRows = 64, kMaxSplits = 8;
// Rows of a box are 128 bytes: kBoxDepth columns of bf16, twice as many of 8 bits.
inline constexpr int kBoxDepth = 64, kBoxBytes = kMatrixRows * 128;

struct Part {
  CUtensorMap w;
  void* y;             // [R,N], bf16 or f32
  const float* scale;  // [N]; nullptr: ones
  // Its first group of 64 rows among all parts'. Where the launch takes weights of 8 bits, a bf16 matrix has whole
  // tiles, and of each the first group alone.
  int N, first;
  int x;  // which input
  Weight weight;
  bool f32;
};

// The grid is tiles x splits blocks, or, where nothing is split, any number of blocks.
struct Args {
  CUtensorMap x[kParts];
  Part part[kParts];
  int parts, R, tiles, steps, splits;
  SkinnyFinish finish;
  float* partial;  // [blocks, kGroups * 64 * kN]
  unsigned* tickets;
};

// kEight: weights of 8 bits are among the parts.
template <int kN, int kGroups, bool kEight>
struct Shape {
  static constexpr int kThreads = kGroups * 128 + 32;
  static constexpr int kBoxes = kEight ? 2 : 1, kDepth = kBoxes * kBoxDepth;  // of x in a stage
  static constexpr int kXBox = kN * 128;
  static constexpr int kWBytes = kGroups * kBoxBytes, kXBytes = kBoxes * kXBox;
  static constexpr int kStages = (220 << 10) / (kWBytes + kXBytes);
  static constexpr size_t kShared = 1024 + size_t(kStages) * (kWBytes + kXBytes + 16);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The transpose of an 8 x 8 matrix of bf16, two neighbours of a row to a lane.
__device__ inline uint32_t transposed(float low, float high) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  uint32_t t;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(reinterpret_cast<const uint32_t&>(p)));
  return t;
}

// Where 16 rows of W by 8 rows of x of one warp go. A lane has four sums: rows n and n + 8 of W, n = lane / 4, and
// rows r and r + 1 of x, r = lane % 4 * 2.
struct Place {
  void* y;
  const float* scale;
  int N, n, r, R;  // n, r: of the first
  bool f32;

  // Of rows n and n + 8.
  __device__ float2 scales(int lane) const {
    const int i = n + lane / 4;
    return {scale && i < N ? scale[i] : 1.0f, scale && i + 8 < N ? scale[i + 8] : 1.0f};
  }
  __device__ float4 old(SkinnyFinish finish, int lane) const {
    float4 v{};
    if (finish != SkinnyFinish::add || !f32) return v;
    const int i = n + lane / 4, j = r + lane % 4 * 2;
    const float* const at = static_cast<const float*>(y) + int64_t(j) * N + i;
    if (j < R && i < N) v.x = at[0];
    if (j + 1 < R && i < N) v.y = at[N];
    if (j < R && i + 8 < N) v.z = at[8];
    if (j + 1 < R && i + 8 < N) v.w = at[N + 8];
    return v;
  }
  // All lanes of a warp call it.
  __device__ void put(SkinnyFinish finish, int lane, float4 v, float4 before, float2 by) const {
    if (n >= N || r >= R) return;
    v = {v.x * by.x, v.y * by.x, v.z * by.y, v.w * by.y};
    if (finish == SkinnyFinish::relu2) {
      const auto square = [](float x) { return x > 0 ? x * x : x < 0 ? 0 : x * 0; };  // a NaN stays one
      v = {square(v.x), square(v.y), square(v.z), square(v.w)};
    }
    if (f32) {
      const int i = n + lane / 4, j = r + lane % 4 * 2;
      float* const at = static_cast<float*>(y) + int64_t(j) * N + i;
      if (j < R && i < N) at[0] = v.x + before.x;
      if (j + 1 < R && i < N) at[N] = v.y + before.y;
      if (j < R && i + 8 < N) at[8] = v.z + before.z;
      if (j + 1 < R && i + 8 < N) at[N + 8] = v.w + before.w;
      return;
    }
    const uint32_t low = transposed(v.x, v.y), high = transposed(v.z, v.w);
    const int i = n + lane % 4 * 2, j = r + lane / 4;
    if (j >= R) return;
    __nv_bfloat16* const at = static_cast<__nv_bfloat16*>(y) + int64_t(j) * N + i;
    if (N % 2 == 0) {
      if (i < N) *reinterpret_cast<uint32_t*>(at) = low;
      if (i + 8 < N) *reinterpret_cast<uint32_t*>(at + 8) = high;
    } else {
      const auto one = [&](int k, uint32_t bits) {
        if (i + k < N) at[k] = __ushort_as_bfloat16(uint16_t(bits));
      };
      one(0, low), one(1, low >> 16), one(8, high), one(9, high >> 16);
    }
  }
};

// The operand of 16 columns of 64 rows of 8 bits, in a tile of swizzled rows of 128 bytes. at: where row lane / 4 of
// the warp's begins, plus that row's swizzle and lane % 4 * 2; k: which 16 columns.
template <Weight kW>
__device__ inline void fragment(uint32_t (&a)[4], uint32_t at, int k) {
  const uint32_t row = at ^ uint32_t(k * 16), lower = row + 8 * 128;
  a[0] = widen<kW>(shared2(row), 0), a[1] = widen<kW>(shared2(lower), 0);
  a[2] = widen<kW>(shared2(row + 8), 0), a[3] = widen<kW>(shared2(lower + 8), 0);
}
#endif

// One block to a multiprocessor: all blocks of a launch whose sums are cut run at the same time, and may wait for each
// other.
template <int kN, int kGroups, bool kEight>
__global__ void __launch_bounds__(Shape<kN, kGroups, kEight>::kThreads, 1)
    skinny_kernel(const __grid_constant__ Args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using S = Shape<kN, kGroups, kEight>;
  constexpr int kStages = S::kStages, kDepth = S::kDepth;
  constexpr int kTiles = kN / 8, kPieces = kGroups * kTiles * 4;  // pieces of 16 x 8 results, a warp's
  extern __shared__ uint8_t raw[];
  uint8_t* const ws = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
  uint8_t* const xs = ws + kStages * S::kWBytes;
  uint64_t *const full = reinterpret_cast<uint64_t*>(xs + kStages * S::kXBytes), *const empty = full + kStages;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  release_next();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, 4 * kGroups * kWarpArrivals);
    }
    barriers_made();
  }
  __syncthreads();
  const int split = int(blockIdx.x) % a.splits, stride = int(gridDim.x) / a.splits;
  const int from = int(int64_t(split) * a.steps / a.splits), to = int(int64_t(split + 1) * a.steps / a.splits);
  const auto part_of = [&](int group) -> const Part& {
    int p = a.parts - 1;
    while (a.part[p].first > group) --p;
    return a.part[p];
  };
  // Whether the tile is one of bf16 among such of 8 bits: it has the first 64 rows, in two boxes.
  const auto wide = [&](const Part& p) { return kEight && p.weight == Weight::bf16; };

  if (warp == 4 * kGroups) {
    if (lane != 0) return;
    int tile = int(blockIdx.x) / a.splits;
    const CUtensorMap *maps[kGroups], *x_map = nullptr;
    int rows[kGroups], boxes = kGroups, next_column = 0;  // columns from box to box
    const auto enter = [&] {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Part& p = part_of(tile * kGroups + g);
        maps[g] = &p.w, rows[g] = (tile * kGroups + g - p.first) * kMatrixRows;
        if (g == 0) x_map = &a.x[p.x];
      }
      if (const Part& p = part_of(tile * kGroups); kEight) {
        boxes = wide(p) ? S::kBoxes : kGroups;
        next_column = wide(p) ? kBoxDepth : 0;
        if (wide(p)) rows[0] = rows[1] = (tile - p.first / kGroups) * kMatrixRows;
      }
    };
    const auto load_w = [&](int step, int stage) {
      expect_bytes(full + stage, uint32_t(boxes * kBoxBytes + S::kXBytes));
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        if (!kEight || g < boxes)
          load_box(ws + stage * S::kWBytes + g * kBoxBytes, maps[g], step * kDepth + g * next_column, rows[g],
                   full + stage);
    };
    const auto load_x = [&](int step, int stage) {
#pragma unroll
      for (int b = 0; b < S::kBoxes; ++b)
        load_box(xs + stage * S::kXBytes + b * S::kXBox, x_map, step * kDepth + b * kBoxDepth, 0, full + stage);
    };
    enter();
    const int first = min(to - from, kStages);
    for (int i = 0; i < first; ++i) load_w(from + i, i);
    wait_for_previous();
    for (int i = 0; i < first; ++i) load_x(from + i, i);
    int stage = first % kStages, step = from + first;
    uint32_t phase = first == kStages ? 0 : 1;
    for (; tile < a.tiles; step = from) {
      for (; step < to; ++step) {
        wait_barrier(empty + stage, phase);
        load_w(step, stage);
        load_x(step, stage);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      if ((tile += stride) < a.tiles) enter();
    }
    return;
  }

  wait_for_previous();
  const int group = warp / 4, quarter = warp % 4;
  const auto place = [&](int tile, int g, int j, int w) {
    const Part& p = part_of(tile * kGroups + g);
    int n = (tile * kGroups + g - p.first) * kMatrixRows + w * 16;
    if (wide(p)) n = g == 0 ? (tile - p.first / kGroups) * kMatrixRows + w * 16 : p.N;
    return Place{p.y, p.scale, p.N, n, 8 * j, a.R, p.f32};
  };
  int stage = 0;
  uint32_t phase = 0;
  for (int tile = int(blockIdx.x) / a.splits; tile < a.tiles; tile += stride) {
    Place mine = place(tile, group, 0, quarter);
    const float2 by = mine.scales(lane);
    float d[kN / 2] = {};
    int before = -1;
    // Takes the stages of the tile: products(w, x, first) begins those of a stage, and ends those of the stage before.
    const auto take = [&](const auto& products) {
      for (int step = from; step < to; ++step) {
        wait_barrier(full + stage, phase);
        const uint32_t w = hopper::shared_address(ws) + uint32_t(stage * S::kWBytes + group * kBoxBytes);
        const uint32_t x = hopper::shared_address(xs) + uint32_t(stage * S::kXBytes);
        products(w, x, step == from);
        before = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    };
    // The stage before may be filled again: what the warp's lanes read of it went into products that have ended.
    const auto give_back = [&] {
      if (before >= 0 && (kWarpArrivals > 1 || lane == 0)) arrive(empty + before);
    };
    // Four products of 16 columns each.
    const auto from_shared = [&](uint32_t w, uint32_t x, bool first) {
#pragma unroll
      for (int k = 0; k < kBoxDepth / 16; ++k)
        multiply(d, tile_descriptor(w + uint32_t(k * 32)), tile_descriptor(x + uint32_t(k * 32)), !first || k > 0);
    };
    if constexpr (!kEight) {
      take([&](uint32_t w, uint32_t x, bool first) {
        products_begin();
        from_shared(w, x, first);
        products_commit();
        products_wait<1>();
        give_back();
      });
    } else {
      const Part& p = part_of(tile * kGroups + group);
      const auto from_registers = [&]<Weight kW> {
        const uint32_t row = uint32_t((quarter * 16 + lane / 4) * 128 + (lane / 4 << 4) + lane % 4 * 2);
        // While some products run, the operands of the next are made.
        constexpr int kAll = kDepth / 16, kSome = kN >= 64 && kGroups == 3 ? 2 : 4;
        uint32_t f[2][kSome][4];
        take([&](uint32_t w, uint32_t x, bool first) {
          const uint64_t columns = tile_descriptor(x);
#pragma unroll
          for (int from = 0; from < kAll; from += kSome) {
            auto& now = f[from / kSome % 2];
#pragma unroll
            for (int i = 0; i < kSome; ++i) fragment<kW>(now[i], w + row, from + i);
            products_begin();
#pragma unroll
            for (int i = 0; i < kSome; ++i) {
              const int k = from + i;
              multiply(d, now[i], columns + uint64_t((k / 4 * S::kXBox + k % 4 * 32) / 16), !first || k > 0);
            }
            products_commit();
            products_wait<1>();
            if (from == 0) give_back();
          }
        });
      };
      if (p.weight == Weight::f8)
        from_registers.template operator()<Weight::f8>();
      else if (p.weight == Weight::i8)
        from_registers.template operator()<Weight::i8>();
      else if (group == 0)
        take([&](uint32_t w, uint32_t x, bool first) {
          products_begin();
          from_shared(w, x, first);
          from_shared(w + kBoxBytes, x + S::kXBox, false);
          products_commit();
          products_wait<1>();
          give_back();
        });
      else
        take([&](uint32_t, uint32_t, bool) { give_back(); });
    }
    products_wait<0>();
    give_back();
    const auto four = [&](int j) { return float4{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}; };
    if (a.splits == 1) {
      constexpr int kSome = kTiles < 4 ? kTiles : 4;
#pragma unroll
      for (int j = 0; j < kTiles; j += kSome) {
        float4 old[kSome];
#pragma unroll
        for (int i = 0; i < kSome; ++i) mine.r = 8 * (j + i), old[i] = mine.old(a.finish, lane);
#pragma unroll
        for (int i = 0; i < kSome; ++i) mine.r = 8 * (j + i), mine.put(a.finish, lane, four(j + i), old[i], by);
      }
      continue;
    }
    // [block][piece][lane]
    float4* const parts = reinterpret_cast<float4*>(a.partial) + int64_t(tile) * a.splits * (kPieces * 32) + lane;
    unsigned* const ticket = a.tickets + tile;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (8 * j < a.R) parts[(split * kPieces + (group * kTiles + j) * 4 + quarter) * 32] = four(j);
    sync_some(1, kGroups * 128);
    if (threadIdx.x == 0) {
      add_released(ticket, 1u);
      while ((load_acquired(ticket) & 0xffffu) < unsigned(a.splits)) {
      }
    }
    sync_some(1, kGroups * 128);
    const int end = (split + 1) * kPieces / a.splits;
    // Of kBatch pieces at a time, at most kMost parts each: all their loads are on their way at once.
    const auto add_up = [&]<int kMost, int kBatch>() {
#pragma unroll 1
      for (int piece = split * kPieces / a.splits + warp; piece < end; piece += kBatch * 4 * kGroups) {
        float4 v[kBatch][kMost], old[kBatch];
        float2 by[kBatch];
        const auto piece_of = [&](int b) { return min(piece + b * 4 * kGroups, end - 1); };
        const auto place_of = [&](int i) { return place(tile, i / (kTiles * 4), i / 4 % kTiles, i % 4); };
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const float4* const from_part = parts + piece_of(b) * 32;
#pragma unroll
          for (int q = 0; q < kMost; ++q)
            if (q < a.splits) v[b][q] = __ldcg(from_part + q * kPieces * 32);
          const Place p = place_of(piece_of(b));
          old[b] = p.old(a.finish, lane);
          by[b] = p.scales(lane);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (piece + b * 4 * kGroups >= end) break;
          float4 sum = v[b][0];
#pragma unroll
          for (int q = 1; q < kMost; ++q)
            if (q < a.splits) sum.x += v[b][q].x, sum.y += v[b][q].y, sum.z += v[b][q].z, sum.w += v[b][q].w;
          place_of(piece_of(b)).put(a.finish, lane, sum, old[b], by[b]);
        }
      }
    };
    if (a.splits == 2)
      add_up.template operator()<2, 4>();
    else if (a.splits <= 4)
      add_up.template operator()<4, 2>();
    else
      add_up.template operator()<kMaxSplits, 1>();
    if (threadIdx.x == 0 && atomicAdd(ticket, 0x10000u) >> 16 == unsigned(a.splits) - 1) *ticket = 0;  // the last one
    return;
  }
#endif
}

}  // namespace kda::cuda::skinny
