// kernels/cuda/attention_single.cu — attention of one new token a sequence over its cache.
//
// Bound by reading keys and values once. A block of the grid takes one key head of one sequence and some of its splits
// of 128 keys; its query heads are the rows of one tile of 16. The four warps each score 16 of a block's 64 keys, then
// each weigh all 64 values for a quarter of the channels: what is added, and in which order, is what a warp of the
// prompt kernel does alone. The split that ends with the new token takes it from the inputs and appends it.
#include <algorithm>

#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/device.h"

namespace kda::cuda {
namespace {

using namespace tile;

constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = 16;
constexpr int kBlock = kAttentionBlock, kBlocksOfSplit = kAttentionSplit / kAttentionBlock;

// kStages: blocks of keys and values that are here or on their way.
template <int D, int kStages>
struct Smem {
  __nv_bfloat16 k[kStages][kBlock * D], v[kStages][kBlock * D];
  __nv_bfloat16 q[kRows * D], p[kRows * kBlock];
  float most[kWarps][kRows];
};

// What a split leaves behind, in scratch: o [N,H,splits,d] not yet divided, then {most, sum} [N,H,splits].
struct Parts {
  float* o;
  float2* most_sum;
};

template <int D>
__device__ void fetch_block(uint32_t to, const __nv_bfloat16* cache, const __nv_bfloat16* fresh, int64_t stride,
                            int first, int past) {
#pragma unroll
  for (int i = threadIdx.x; i < kBlock * D / 8; i += kThreads) {
    const int row = i / (D / 8), at = i % (D / 8), position = first + row;
    const __nv_bfloat16* from = position < past ? cache + position * stride : fresh;
    fetch16(piece<D>(to, row, at), from + at * 8, position <= past);
  }
}

// kWhole: one block of the grid walks all splits of its row tile and finishes the rows.
template <int D, int kStages, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) single_kernel(const AttentionCall a, const Parts parts) {
  constexpr int kN = D / 8 / kWarps;  // column tiles of o for each warp
  extern __shared__ __align__(128) unsigned char raw[];
  auto& m = *reinterpret_cast<Smem<D, kStages>*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous();
  const int group = a.H / a.G, row_tiles = (group + kRows - 1) / kRows;
  const int n = blockIdx.z, g = blockIdx.y / row_tiles, row0 = blockIdx.y % row_tiles * kRows;
  const int token = a.start[n];
  if (a.start[n + 1] == token) return;
  const int slot = a.slot[n], past = a.past[n];
  const int rows = min(group - row0, kRows);
  const int64_t head0 = int64_t(token) * a.H + g * group + row0;  // of the tile's first row, in q and o
  if (slot < 0 || past >= a.capacity) {
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < rows * D / 8; i += kThreads)
        reinterpret_cast<uint4*>(a.o + head0 * D)[i] = uint4{0, 0, 0, 0};
    return;
  }
  const int all_blocks = past / kBlock + 1, stride_blocks = kBlocksOfSplit * int(gridDim.x);
  // This block's i-th block of keys, and how many it has.
  const auto block_of = [&](int i) {
    return i / kBlocksOfSplit * stride_blocks + int(blockIdx.x) * kBlocksOfSplit + i % kBlocksOfSplit;
  };
  if (block_of(0) >= all_blocks) return;

  const int64_t stride = int64_t(a.G) * D, fresh = int64_t(token) * stride + g * D;
  __nv_bfloat16* keys = a.k_cache + (int64_t(slot) * a.capacity * a.G + g) * D;
  __nv_bfloat16* values = a.v_cache + (int64_t(slot) * a.capacity * a.G + g) * D;
  const auto fetch = [&](int i) {
    const int b = block_of(i), stage = i % kStages;
    if (b < all_blocks) {
      fetch_block<D>(shared_address(m.k[stage]), keys, a.k + fresh, stride, b * kBlock, past);
      fetch_block<D>(shared_address(m.v[stage]), values, a.v + fresh, stride, b * kBlock, past);
    }
    fetch_commit();  // an empty group where nothing is left, so that waiting counts the same
  };
  for (int i = threadIdx.x; i < kRows * D / 8; i += kThreads) {
    const int row = i / (D / 8), at = i % (D / 8);
    fetch16(piece<D>(shared_address(m.q), row, at), a.q + (head0 + min(row, rows - 1)) * D + at * 8, row < rows);
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  float most[2] = {kMinusInfinity, kMinusInfinity}, total_most[2] = {kMinusInfinity, kMinusInfinity}, total_sum[2] = {};
  float o[kN][4] = {}, sum[4] = {}, total[kN][4] = {};
  for (int i = 0, b; (b = block_of(i)) < all_blocks; ++i) {
    fetch_wait<kStages - 2>();
    __syncthreads();
    fetch(i + kStages - 1);
    const uint32_t k_now = shared_address(m.k[i % kStages]), v_now = shared_address(m.v[i % kStages]);

    float s[2][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t qf[4], kf[4];
      load4(qf, piece<D>(shared_address(m.q), lane % 16, c * 2 + lane / 16));
      load4(kf, piece<D>(k_now, warp * 16 + lane % 8 + lane / 16 * 8, c * 2 + lane / 8 % 2));
      multiply(s[0], qf, kf[0], kf[1]);
      multiply(s[1], qf, kf[2], kf[3]);
    }
    float top[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (b * kBlock + warp * 16 + j * 8 + lane % 4 * 2 + e % 2 > past) s[j][e] = kMinusInfinity;
        top[e / 2] = fmaxf(top[e / 2], s[j][e]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      if (lane % 4 == 0) m.most[warp][half * 8 + lane / 4] = top[half];
    }
    __syncthreads();
    Step step[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      top[half] = fmaxf(fmaxf(m.most[0][row], m.most[1][row]), fmaxf(m.most[2][row], m.most[3][row]));
      step[half] = raise(most[half], top[half], a.scale_log2);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        reinterpret_cast<uint32_t*>(m.p)[piece<kBlock>(0, half * 8 + lane / 4, warp * 2 + j) / 4 + lane % 4] = pair(
            weight(s[j][2 * half], step[half], a.scale_log2), weight(s[j][2 * half + 1], step[half], a.scale_log2));
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = __fmul_rn(sum[e], step[e / 2].shrink);
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = __fmul_rn(o[j][e], step[e / 2].shrink);
#pragma unroll
    for (int c = 0; c < kBlock / 16; ++c) {
      uint32_t pf[4];
      load4(pf, piece<kBlock>(shared_address(m.p), lane % 16, c * 2 + lane / 16));
      multiply(sum, pf, kOnes, kOnes);
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        uint32_t vf[4];
        load4_transposed(vf, piece<D>(v_now, c * 16 + lane % 16, warp * kN + j * 2 + lane / 16));
        multiply(o[2 * j], pf, vf[0], vf[1]);
        multiply(o[2 * j + 1], pf, vf[2], vf[3]);
      }
    }

    // The new token lies in the last block; its key and value are in shared memory by now.
    if (b + 1 == all_blocks && row0 == 0 && threadIdx.x < 2 * D / 8) {
      const int at = threadIdx.x % (D / 8), row = past % kBlock;
      const bool key = threadIdx.x < D / 8;
      const uint32_t from = piece<D>(0, row, at) / 16;
      const uint4* tile_now = reinterpret_cast<const uint4*>(key ? m.k[i % kStages] : m.v[i % kStages]);
      reinterpret_cast<uint4*>((key ? keys : values) + past * stride)[at] = tile_now[from];
    }
    if ((i + 1) % kBlocksOfSplit != 0 && b + 1 != all_blocks) continue;
    if constexpr (kWhole) {
      Merge by[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        by[half] = merge(total_most[half], most[half], a.scale_log2);
        total_sum[half] = merged(total_sum[half], sum[2 * half], by[half]);
      }
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) total[j][e] = merged(total[j][e], o[j][e], by[e / 2]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        if (row >= rows) continue;
        const int64_t at = (int64_t(n) * a.H + g * group + row0 + row) * a.splits + b / kBlocksOfSplit;
        float2* to = reinterpret_cast<float2*>(parts.o + at * D) + warp * kN * 4 + lane % 4;
#pragma unroll
        for (int j = 0; j < kN; ++j) to[j * 4] = {o[j][2 * half], o[j][2 * half + 1]};
        if (warp == 0 && lane % 4 == 0) parts.most_sum[at] = {most[half], sum[2 * half]};
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = 0, most[e / 2] = kMinusInfinity;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = 0;
  }
  if constexpr (kWhole) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      if (row >= rows) continue;
      const float by = __frcp_rn(total_sum[half]);
      uint32_t* to = reinterpret_cast<uint32_t*>(a.o + (head0 + row) * D) + warp * kN * 4 + lane % 4;
#pragma unroll
      for (int j = 0; j < kN; ++j)
        to[j * 4] = pair(__fmul_rn(total[j][2 * half], by), __fmul_rn(total[j][2 * half + 1], by));
    }
  }
}

// One row's splits, in rising order; a thread of the first D / 2 has two channels. Many splits are loaded at once, and
// the factors, which depend on maxima only, are found ahead: the sums wait for neither memory nor exponentials.
constexpr int kMergeThreads = 256, kMany = 64;

template <int D>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const AttentionCall a, const Parts parts) {
  __shared__ float4 loaded[kMany * D / 4];
  __shared__ Merge factors[kMany];
  __shared__ float sums[kMany];
  wait_for_previous();
  const int n = blockIdx.y, h = blockIdx.x, token = a.start[n], lane = threadIdx.x % 32;
  if (a.start[n + 1] == token || a.slot[n] < 0 || a.past[n] >= a.capacity) return;
  const int splits = a.past[n] / kAttentionSplit + 1;
  const int64_t at = (int64_t(n) * a.H + h) * a.splits;
  const bool adds = threadIdx.x < D / 2;
  float carried = kMinusInfinity, sum = 0;
  float2 o{0, 0};
  for (int first = 0; first < splits; first += kMany) {
    const int count = min(kMany, splits - first);
    const float4* from = reinterpret_cast<const float4*>(parts.o + (at + first) * D);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kMany * D / 4 / kMergeThreads; ++k) {
      const int i = k * kMergeThreads + int(threadIdx.x);
      if (i < count * D / 4) loaded[i] = from[i];
    }
    for (int i = lane; threadIdx.x < 32 && i - lane < count; i += 32) {
      const float2 mine = i < count ? parts.most_sum[at + first + i] : float2{kMinusInfinity, 0};
      float top = mine.x;  // of the splits up to this one
      for (int k = 1; k < 32; k <<= 1) {
        const float other = __shfl_up_sync(~0u, top, k);
        if (lane >= k) top = fmaxf(top, other);
      }
      float before = __shfl_up_sync(~0u, top, 1);
      before = lane ? fmaxf(before, carried) : carried;
      carried = fmaxf(carried, __shfl_sync(~0u, top, 31));
      if (i < count) factors[i] = merge(before, mine.x, a.scale_log2), sums[i] = mine.y;
    }
    __syncthreads();
    const float2* part = reinterpret_cast<const float2*>(loaded) + threadIdx.x;
#pragma unroll 8
    for (int s = 0; adds && s < count; ++s) {
      const Merge m = factors[s];
      const float2 x = part[s * (D / 2)];
      sum = merged(sum, sums[s], m);
      o = {merged(o.x, x.x, m), merged(o.y, x.y, m)};
    }
  }
  if (!adds) return;
  const float by = __frcp_rn(sum);
  reinterpret_cast<uint32_t*>(a.o + (int64_t(token) * a.H + h) * D)[threadIdx.x] =
      pair(__fmul_rn(o.x, by), __fmul_rn(o.y, by));
}

template <int D, int kStages>
void run(Context& ctx, const AttentionCall& a, void* scratch, int blocks) {
  constexpr size_t kSmem = sizeof(Smem<D, kStages>);
  const int64_t row_tiles = ceil_div(a.H / a.G, kRows), pairs = a.G * row_tiles * a.N;
  const auto grid = [&](int64_t beside) { return dim3(unsigned(beside), unsigned(a.G * row_tiles), unsigned(a.N)); };
  const char* op = "attention of single tokens";
  if (!scratch) {
    const auto kernel = single_kernel<D, kStages, true>;
    allow_shared(kernel, kSmem);
    return launch_early(op, ctx, grid(1), kThreads, kSmem, kernel, a, Parts{});
  }
  float* o = static_cast<float*>(scratch);
  const Parts parts{o, reinterpret_cast<float2*>(o + int64_t(a.N) * a.H * a.splits * D)};
  const auto kernel = single_kernel<D, kStages, false>;
  allow_shared(kernel, kSmem);
  launch_early(op, ctx, grid(std::min<int64_t>(a.splits, ceil_div(blocks, pairs))), kThreads, kSmem, kernel, a, parts);
  launch_early(op, ctx, dim3(unsigned(a.H), unsigned(a.N)), kMergeThreads, 0, merge_kernel<D>, a, parts);
}

}  // namespace

size_t attention_split_bytes(int64_t tokens, int64_t H, int64_t d, int64_t capacity) {
  return size_t(tokens * H * ceil_div(capacity, kAttentionSplit) * (d + 2)) * sizeof(float);
}

void attention_single(Context& ctx, const AttentionCall& a, void* scratch, int blocks) {
  if (a.d == 64) return run<64, 3>(ctx, a, scratch, blocks);
  // sm_86 and sm_89 have no room for three stages
  const bool room = device_of(ctx).properties.sharedMemPerBlockOptin >= sizeof(Smem<128, 3>);
  room ? run<128, 3>(ctx, a, scratch, blocks) : run<128, 2>(ctx, a, scratch, blocks);
}

}  // namespace kda::cuda
