// kernels/cuda/attention_prompt.cu — attention of many new tokens over the cache that already holds them.
//
// A block of the grid takes 128 rows that share a key head (tokens x the query heads of that head) and walks the keys;
// each warp owns 16 or 32 of the rows. Keys and values come through two stages of shared memory. The last tile of a
// sequence, which has most keys to see, starts first.
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/device.h"

namespace kda::cuda {
namespace {

using namespace tile;

constexpr int kBlock = kAttentionBlock;

// kTiles: row tiles of 16 for each warp.
template <int D, int kWarps, int kTiles>
constexpr size_t prompt_smem = size_t(kWarps* kTiles * 16 + 4 * kBlock) * D * sizeof(__nv_bfloat16);

// 64 keys from `first` on, those before `end`, of one head.
template <int D, int kThreads>
__device__ void fetch_block(uint32_t to, const __nv_bfloat16* from, int64_t stride, int first, int end) {
#pragma unroll
  for (int i = threadIdx.x; i < kBlock * D / 8; i += kThreads) {
    const int row = i / (D / 8), at = i % (D / 8);
    const bool there = first + row < end;
    fetch16(piece<D>(to, row, at), from + (there ? (first + row) * stride + at * 8 : 0), there);
  }
}

template <int D, int kWarps, int kTiles>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 4 ? 2 : 1) prompt_kernel(const AttentionCall a) {
  constexpr int kThreads = kWarps * 32, kRows = kWarps * kTiles * 16;
  constexpr int kN = D / 8;  // column tiles of o
  extern __shared__ __align__(128) __nv_bfloat16 smem[];
  const uint32_t q_tile = shared_address(smem), k_tile = q_tile + kRows * D * 2, v_tile = k_tile + 2 * kBlock * D * 2;
  const int n = blockIdx.z, g = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = a.H / a.G;
  const int token0 = a.start[n], rows = (a.start[n + 1] - token0) * group;
  const int tile_index = (rows + kRows - 1) / kRows - 1 - int(blockIdx.x);
  if (tile_index < 0) return;
  const int row0 = tile_index * kRows;
  const int slot = a.slot[n], past = a.past[n];
  const auto out = [&](int row) {
    const int r = row0 + row;
    return a.o + (int64_t(token0 + r / group) * a.H + g * group + r % group) * D;
  };
  if (slot < 0) {
    for (int i = threadIdx.x; i < kRows * D / 8; i += kThreads)
      if (row0 + i / (D / 8) < rows) reinterpret_cast<uint4*>(out(i / (D / 8)))[i % (D / 8)] = uint4{0, 0, 0, 0};
    return;
  }
  const int64_t stride = int64_t(a.G) * D;
  const __nv_bfloat16* keys = a.k_cache + (int64_t(slot) * a.capacity * a.G + g) * D;
  const __nv_bfloat16* values = a.v_cache + (int64_t(slot) * a.capacity * a.G + g) * D;
  const int end = past + (min(rows, row0 + kRows) - 1) / group + 1;  // keys that any row of the tile sees
  const int blocks = (end + kBlock - 1) / kBlock;

#pragma unroll
  for (int i = threadIdx.x; i < kRows * D / 8; i += kThreads) {
    const int row = i / (D / 8), at = i % (D / 8), r = min(row0 + row, rows - 1);
    fetch16(piece<D>(q_tile, row, at), a.q + (int64_t(token0 + r / group) * a.H + g * group + r % group) * D + at * 8,
            row0 + row < rows);
  }
  fetch_block<D, kThreads>(k_tile, keys, stride, 0, end);
  fetch_block<D, kThreads>(v_tile, values, stride, 0, end);
  fetch_commit();

  int position[kTiles][2];  // of this thread's rows
  float most[kTiles][2], total_most[kTiles][2], total_sum[kTiles][2];
  float o[kTiles][kN][4] = {}, sum[kTiles][4] = {}, total[kTiles][kN][4] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row0 + (warp * kTiles + t) * 16 + half * 8 + lane / 4;
      position[t][half] = past + min(r, rows - 1) / group;
      most[t][half] = total_most[t][half] = kMinusInfinity;
      total_sum[t][half] = 0;
    }

  for (int b = 0; b < blocks; ++b) {
    fetch_wait<0>();
    __syncthreads();
    if (b + 1 < blocks) {
      const uint32_t stage = uint32_t((b + 1) & 1) * kBlock * D * 2;
      fetch_block<D, kThreads>(k_tile + stage, keys, stride, (b + 1) * kBlock, end);
      fetch_block<D, kThreads>(v_tile + stage, values, stride, (b + 1) * kBlock, end);
      fetch_commit();
    }
    const uint32_t k_now = k_tile + uint32_t(b & 1) * kBlock * D * 2, v_now = v_tile + uint32_t(b & 1) * kBlock * D * 2;

    float s[kTiles][kBlock / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t qf[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        load4(qf[t], piece<D>(q_tile, (warp * kTiles + t) * 16 + lane % 16, c * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kBlock / 16; ++j) {
        uint32_t kf[4];
        load4(kf, piece<D>(k_now, j * 16 + lane % 8 + lane / 16 * 8, c * 2 + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply(s[t][2 * j], qf[t], kf[0], kf[1]);
          multiply(s[t][2 * j + 1], qf[t], kf[2], kf[3]);
        }
      }
    }

    uint32_t p[kTiles][kBlock / 16][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if ((b + 1) * kBlock > position[t][0] + 1 || (b + 1) * kBlock > position[t][1] + 1) {
#pragma unroll
        for (int j = 0; j < kBlock / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (b * kBlock + j * 8 + lane % 4 * 2 + i % 2 > position[t][i / 2]) s[t][j][i] = kMinusInfinity;
      }
      float top[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
      for (int j = 0; j < kBlock / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[t][j][i]);
      Step step[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
        step[half] = raise(most[t][half], top[half], a.scale_log2);
      }
#pragma unroll
      for (int j = 0; j < kBlock / 16; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&x)[4] = s[t][2 * j + i / 2];
          const int half = i % 2;
          p[t][j][i] =
              pair(weight(x[2 * half], step[half], a.scale_log2), weight(x[2 * half + 1], step[half], a.scale_log2));
        }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[t][i] = __fmul_rn(sum[t][i], step[i / 2].shrink);
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][j][i] = __fmul_rn(o[t][j][i], step[i / 2].shrink);
    }
#pragma unroll
    for (int c = 0; c < kBlock / 16; ++c) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) multiply(sum[t], p[t][c], kOnes, kOnes);
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t vf[4];
        load4_transposed(vf, piece<D>(v_now, c * 16 + lane % 16, j * 2 + lane / 16));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply(o[t][2 * j], p[t][c], vf[0], vf[1]);
          multiply(o[t][2 * j + 1], p[t][c], vf[2], vf[3]);
        }
      }
    }

    if ((b + 1) % (kAttentionSplit / kBlock) == 0 || b + 1 == blocks) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        Merge m[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          m[half] = merge(total_most[t][half], most[t][half], a.scale_log2);
          total_sum[t][half] = merged(total_sum[t][half], sum[t][2 * half], m[half]);
          most[t][half] = kMinusInfinity;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[t][i] = 0;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[t][j][i] = merged(total[t][j][i], o[t][j][i], m[i / 2]);
            o[t][j][i] = 0;
          }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (warp * kTiles + t) * 16 + half * 8 + lane / 4;
      if (row0 + row >= rows) continue;
      const float by = __frcp_rn(total_sum[t][half]);
      uint32_t* to = reinterpret_cast<uint32_t*>(out(row)) + lane % 4;
#pragma unroll
      for (int j = 0; j < kN; ++j)
        to[j * 4] = pair(__fmul_rn(total[t][j][2 * half], by), __fmul_rn(total[t][j][2 * half + 1], by));
    }
}

template <int D, int kWarps, int kTiles>
void run(Context& ctx, const AttentionCall& a) {
  constexpr int kRows = kWarps * kTiles * 16;
  constexpr size_t kSmem = prompt_smem<D, kWarps, kTiles>;
  const auto kernel = prompt_kernel<D, kWarps, kTiles>;
  allow_shared(kernel, kSmem);
  launch("attention of prompts", ctx,
         dim3(unsigned(ceil_div(int64_t(a.longest) * (a.H / a.G), kRows)), unsigned(a.G), unsigned(a.N)), kWarps * 32,
         kSmem, kernel, a);
}

}  // namespace

// Warps and row tiles as measured fastest at 8192 tokens.
void attention_prompt(Context& ctx, const AttentionCall& a) {
  a.d == 64 ? run<64, 4, 2>(ctx, a) : run<128, 8, 1>(ctx, a);
}

}  // namespace kda::cuda
