// kernels/cuda/gemm90.cu — y = x W^T in bf16 for sm_90a, several matrices in one launch, and the square of the
// product's positive part taken before it is stored. cuBLASLt has neither: its epilogues know relu alone, and the
// square costs a pass of its own.
//
// A block has a tile [128,256] of y. Two warpgroups multiply (wgmma, 64 rows each, sums in fp32 registers), a third one
// only asks the copy engine for the next tiles of x [128,64] and W [256,64], up to four ahead. Two blocks, a cluster,
// share W's tile: each brings one half of it for both. Blocks stay and go from tile to tile, in an order that keeps
// what runs at one time within few rows of x and W; while results leave, the next tile's operands arrive. Every sum
// runs along K in the same order, whatever R and N are: a row's bits depend on that row alone.
#include "kernels/cuda/gemm90.h"

#include <cuda.h>

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

// A tile; kDepth bf16 are the 128 bytes of a swizzled row. kGroup: row tiles of clusters worked on together.
[[maybe_unused]] constexpr int kRows = 128, kColumns = 256, kDepth = 64, kStages = 4, kCluster = 2, kGroup = 8;
[[maybe_unused]] constexpr int kThreads = 384, kConsumers = 2;
[[maybe_unused]] constexpr int kXBytes = kRows * kDepth * 2, kWBytes = kColumns * kDepth * 2;
[[maybe_unused]] constexpr int kHalfW = kWBytes / kCluster;
// Results on their way out: two boxes [64,64] for each warpgroup.
[[maybe_unused]] constexpr int kBoxColumns = 64, kBoxBytes = 64 * kBoxColumns * 2, kOutBytes = 2 * kBoxBytes;
constexpr size_t kShared = 1024 + size_t(kStages) * (kXBytes + kWBytes) + kConsumers * kOutBytes + 2 * kStages * 8;

// One matrix of up to eight that share x.
struct Part {
  CUtensorMap w, y;
  __nv_bfloat16* data;  // of y
  int64_t ld;           // elements from row to row of y
  int N, first;         // columns of y; first tile of columns among all
  bool boxes;           // y's rows are multiples of 16 bytes: results leave by the copy engine
};

struct Args {
  CUtensorMap x;
  Part part[kGemm90Parts];
  int parts, R, K;
  int rows, columns;  // tiles of kCluster * kRows rows; of kColumns columns, all parts
};

template <Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1) product(const __grid_constant__ Args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  uint8_t *const xs = shared, *const ws = xs + kStages * kXBytes, *const out = ws + kStages * kWBytes;
  uint64_t *const full = reinterpret_cast<uint64_t*>(out + kConsumers * kOutBytes), *const empty = full + kStages;
  const uint32_t rank = cluster_rank();
  const int group = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128;
  const int steps = (a.K + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(empty + s, kCluster * kConsumers);
    }
    barriers_made();
  }
  cluster_sync();

  // The place of this block's tile number i: row of x; matrix, and row of that.
  const auto place = [&](int i, int& row, int& column) -> const Part& {
    const int whole = kGroup * a.columns, first = i / whole * kGroup, rows = min(kGroup, a.rows - first);
    const int j = i % whole, tile = j / rows;
    row = ((first + j % rows) * kCluster + int(rank)) * kRows;
    int p = a.parts - 1;
    while (a.part[p].first > tile) --p;
    column = (tile - a.part[p].first) * kColumns;
    return a.part[p];
  };
  const int clusters = int(gridDim.x) / kCluster, count = a.rows * a.columns;
  int stage = 0;
  uint32_t phase = 0;
  const auto next_stage = [&] {
    if (++stage == kStages) stage = 0, phase ^= 1;
  };

  if (group == kConsumers) {
    give_registers<40>();
    if (thread == 0) {
      for (int i = int(blockIdx.x) / kCluster; i < count; i += clusters) {
        int row, column;
        const Part& p = place(i, row, column);
        for (int k = 0; k < steps; ++k) {
          wait_barrier(empty + stage, phase ^ 1);
          expect_bytes(full + stage, kXBytes + kWBytes);
          load_box(xs + stage * kXBytes, &a.x, k * kDepth, row, full + stage);
          load_box(ws + stage * kWBytes + rank * kHalfW, &p.w, k * kDepth, column + int(rank) * (kColumns / kCluster),
                   full + stage, uint16_t((1 << kCluster) - 1));
          next_stage();
        }
      }
    }
  } else {
    take_registers<232>();
    const int warp = thread / 32, lane = thread % 32;
    const uint32_t x_at = shared_address(xs) + uint32_t(group) * (kXBytes / kConsumers), w_at = shared_address(ws);
    uint8_t* const my_out = out + group * kOutBytes;
    float d[128] = {};
    const auto finish = [](float v) {
      if constexpr (kEpilogue == Epilogue::relu2) {
        v = __bfloat162float(__float2bfloat16_rn(v));  // as where the square is a pass of its own: the same bits
        v = v < 0 ? 0 : v;                             // a NaN stays one
        v *= v;
      }
      return v;
    };
    const auto pair = [&](int at) {
      const __nv_bfloat162 p = __floats2bfloat162_rn(finish(d[at]), finish(d[at + 1]));
      return reinterpret_cast<const uint32_t&>(p);
    };
    for (int i = int(blockIdx.x) / kCluster; i < count; i += clusters) {
      int row, column;
      const Part& p = place(i, row, column);
      int before = -1;
      for (int k = 0; k < steps; ++k) {
        wait_barrier(full + stage, phase);
        const uint64_t x = tile_descriptor(x_at + uint32_t(stage) * kXBytes);
        const uint64_t w = tile_descriptor(w_at + uint32_t(stage) * kWBytes);
        products_begin();
#pragma unroll
        for (int e = 0; e < kDepth / 16; ++e) multiply_64x256x16(d, x + 2 * e, w + 2 * e, k + e);
        products_commit();
        products_wait<1>();  // those of the step before are done: its stage may be filled again
        if (before >= 0 && thread < kCluster) arrive_at(empty + before, uint32_t(thread));
        before = stage;
        next_stage();
      }
      products_wait<0>();
      if (thread < kCluster) arrive_at(empty + before, uint32_t(thread));

      if (p.boxes) {
        const int r = warp * 16 + lane / 8 % 2 * 8 + lane % 8;  // the row whose address this lane gives
        const uint32_t line = shared_address(my_out) + uint32_t(r) * 128;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (thread == 0) wait_stores_read();
          sync_some(1 + group, 128);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int chunk = 2 * j + lane / 16, at = (half * 16 + 2 * j) * 4;
            store_matrices(line + uint32_t(chunk / 8 * kBoxBytes + ((chunk % 8 ^ r % 8) << 4)), pair(at), pair(at + 2),
                           pair(at + 4), pair(at + 6));
          }
          publish_to_copy_engine();
          sync_some(1 + group, 128);
          if (thread == 0) {
            for (int b = 0; b < 2; ++b)
              store_box(&p.y, my_out + b * kBoxBytes, column + half * 128 + b * kBoxColumns, row + group * 64);
            commit_stores();
          }
        }
      } else {
        // Pairs of neighbouring columns, rows r and r + 8.
        const int r = row + group * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (r + 8 * half >= a.R) continue;
          __nv_bfloat16* const to = p.data + int64_t(r + 8 * half) * p.ld;
#pragma unroll
          for (int j = 0; j < 32; ++j)
            if (const int c = column + j * 8 + lane % 4 * 2; c < p.N)
              *reinterpret_cast<uint32_t*>(to + c) = pair(j * 4 + 2 * half);
        }
      }
    }
    if (thread == 0) wait_stores();
  }
  cluster_sync();  // the other block of the cluster may still write here
#endif
}

template <Epilogue kEpilogue>
void run(Context& ctx, const __nv_bfloat16* x, std::span<const Gemm90Part> parts, int64_t R, int64_t K) {
  Device& device = device_of(ctx);
  Args a{};
  a.x = tensor_map(device, x, R, K, K, kRows);
  a.parts = int(parts.size());
  a.R = int(R);
  a.K = int(K);
  a.rows = int(ceil_div(R, kCluster * kRows));
  for (size_t i = 0; i < parts.size(); ++i) {
    const Gemm90Part& from = parts[i];
    Part& p = a.part[i];
    p = {.w = tensor_map(device, from.w, from.N, K, K, kColumns / kCluster),
         .y = {},
         .data = from.y,
         .ld = from.ld,
         .N = int(from.N),
         .first = a.columns,
         .boxes = from.ld % 8 == 0 && aligned(from.y, 16)};
    if (p.boxes) p.y = tensor_map(device, from.y, R, from.N, from.ld, 64);
    a.columns += int(ceil_div(from.N, kColumns));
  }
  allow_shared(product<kEpilogue>, kShared);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  const int64_t clusters = std::min<int64_t>(device.sms / kCluster, int64_t(a.rows) * a.columns);
  config.gridDim = dim3(unsigned(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream_of(ctx);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, product<kEpilogue>, a), "matmul");
}

}  // namespace

bool gemm90_takes(const Context& ctx, const void* x, std::span<const Gemm90Part> parts, int64_t R, int64_t K) {
  if (parts.size() > kGemm90Parts || K % 8 || K == 0 || R == 0 ||
      std::max(R, K) >= int64_t(1) << 30 || !aligned(x, 16))
    return false;
  for (const Gemm90Part& p : parts)
    if (p.N % 2 || p.ld % 2 || p.N == 0 || p.N >= int64_t(1) << 30 || !aligned(p.w, 16) || !aligned(p.y, 8))
      return false;
  return has_sm90a_code(ctx);
}

// Measured on an H100: one matrix is level with cuBLASLt from 1024 rows on, three and more from 256.
bool gemm90_pays(const Context& ctx, std::span<const Gemm90Part> parts, int64_t R) {
  if (R < (parts.size() > 2 ? 256 : 1024)) return false;
  int64_t columns = 0;
  for (const Gemm90Part& p : parts) columns += ceil_div(p.N, kColumns);
  return columns * ceil_div(R, kCluster * kRows) * kCluster * 4 >= int64_t(device_of(ctx).sms) * 3;
}

void gemm90(Context& ctx, Epilogue epilogue, const __nv_bfloat16* x, std::span<const Gemm90Part> parts, int64_t R,
            int64_t K) {
  switch (epilogue) {
    case Epilogue::none: return run<Epilogue::none>(ctx, x, parts, R, K);
    case Epilogue::relu2: return run<Epilogue::relu2>(ctx, x, parts, R, K);
  }
}

}  // namespace kda::cuda
