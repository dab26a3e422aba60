// kernels/cuda/chain_stream.cuh — the warp of a chain's block that streams weights (docs/CUDA.md).
//
// They pass through a ring in shared memory, link after link, as far ahead as the ring goes, so that the memory is busy
// while the links' ends and beginnings wait for each other. Most rows of a link are dealt out beforehand; the rest go
// to the blocks that the memory serves faster.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/chain_values.cuh"

namespace kda::cuda {

inline constexpr int kMaxSlots = 16;  // of the ring
// Chunks asked for and not there yet. As many as keep the memory busy: what the takers read waits behind them.
inline constexpr int kChainFlight = 2;

#if __CUDA_ARCH__ >= 900

struct RingAt {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// A warp's reader of links: from the kernel's arguments, where a first read is slow, one link ahead.
struct LinkReader {
  const Chain& a;
  uint4 next{};

  __device__ void load(int i) {
    const int lane = threadIdx.x % 32;
    if (i < a.links && lane < int(sizeof(ChainLink) / 16))
      asm volatile("ld.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(next.x), "=r"(next.y), "=r"(next.z), "=r"(next.w)
                   : "l"(reinterpret_cast<const uint4*>(&a.link[i]) + lane));
  }
  __device__ void store(ChainLink& to) const {
    const int lane = threadIdx.x % 32;
    if (lane < int(sizeof(ChainLink) / 16)) reinterpret_cast<uint4*>(&to)[lane] = next;
  }
};

// The segment that group `group` of a link lies in.
__device__ inline const ChainSegment& segment_of(const ChainProduct& link, int group) {
  int s = 0;
  while (s + 1 < link.segments && group >= link.segment[s + 1].first) ++s;
  return link.segment[s];
}

// Of each place of the ring: its barriers, and in the first four bytes of `group` which group it holds a chunk of; -1:
// the link has no more for this block. A block that skips a link gets neither chunk nor -1.
struct RingShared {
  uint64_t full[kMaxSlots], empty[kMaxSlots], group[kMaxSlots];
};
struct Ring {
  uint32_t places, shared;  // in shared memory: what the ring holds, RingShared
  int slots;

  __device__ uint32_t full(int slot) const { return shared + 8 * slot; }
  __device__ uint32_t empty(int slot) const { return shared + 8 * (kMaxSlots + slot); }
  __device__ uint32_t group(int slot) const { return shared + 8 * (2 * kMaxSlots + slot); }
};
// So that the compiler keeps the address: it would find it anew each time, from a register that is slow to read.
__device__ inline uint32_t held(uint32_t address) { return __shfl_sync(0xffffffffu, address, 0); }

// To the second-level cache, by the lanes of a warp in turn: what the takers will read of a link beside its weights.
struct Fetcher {
  int turn = 0;
  __device__ void operator()(const void* from, int64_t bytes) {
    const uint64_t at = reinterpret_cast<uint64_t>(from), first = at / 16 * 16;
    if (int(threadIdx.x % 32) == turn++ % 32)
      prefetch_l2(reinterpret_cast<const void*>(first), uint32_t((at + bytes + 15) / 16 * 16 - first));
  }
};
__device__ inline void fetch(const ChainLink& link) {
  Fetcher to_cache;
  if (!link.is_kda) {
    if (link.product.norm) to_cache(link.product.norm, int64_t(link.product.K) * 4);
    return;
  }
  const ChainKda& kda = link.kda;
  const KdaDecodeArgs& k = kda.step;
  constexpr int64_t W = kGateWidth;
  const int64_t H = k.H;
#pragma unroll 1
  for (int head = blockIdx.x; head < k.N * k.H; head += gridDim.x) {
    const int64_t slot = k.in[head / H], h = head % H, bytes = W * (W << (kda.weight == Weight::bf16));
    if (slot >= 0) {
      to_cache(k.state + (slot * H + h) * W * W, W * W * 4);
#pragma unroll 1
      for (int64_t row = 0; row < 9; ++row) to_cache(k.window + ((slot * 9 + row) * H + h) * W, W * 2);
    }
    if (kda.f_w) to_cache(kda.f_w + h * bytes, bytes), to_cache(kda.g_w + h * bytes, bytes);
    if (kda.f_scale) to_cache(kda.f_scale + h * W, W * 4), to_cache(kda.g_scale + h * W, W * 4);
    to_cache(k.q_conv + h * W * 4, W * 16), to_cache(k.k_conv + h * W * 4, W * 16);
    to_cache(k.v_conv + h * W * 4, W * 16);
    to_cache(k.dt_bias + h * W, W * 4), to_cache(k.g_bias + h * W, W * 4), to_cache(k.o_norm, W * 4);
    to_cache(k.A_log + h, 4);
  }
}

__device__ inline void stream_weights(const Chain& a, ChainLink* here, const Ring& ring) {
  const int lane = threadIdx.x % 32, links = a.links, slots = ring.slots;
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  LinkReader reader{a};
  reader.load(0);
  RingAt at, behind;
  int issued = 0;
  const auto take_place = [&] {
    barrier_wait(ring.empty(at.slot), at.phase ^ 1);
    if (issued++ >= kChainFlight) barrier_wait(ring.full(behind.slot), behind.phase), behind.advance(slots);
  };
  for (int i = 0; i < links; ++i) {
    __syncwarp();
    reader.store(*here);
    __syncwarp();
    reader.load(i + 1);
    fetch(*here);
    if (here->is_kda) continue;
    const ChainProduct& link = here->product;
    const int first = int(blockIdx.x) - link.skipped, blocks = int(gridDim.x) - link.skipped;
    if (first < 0) continue;
    const int groups = link.groups, fixed = link.fixed;
    unsigned ticket = 0;
    const auto ask = [&] {
      if (lane == 0) ticket = atomicAdd(a.tickets + i, 1u) + 1;  // from all ones, the marks, on
    };
    ask();
    for (int turn = 0;; ++turn) {
      int group = first + turn * blocks;
      if (turn >= fixed) {
        group = int(__shfl_sync(0xffffffffu, ticket, 0)) + fixed * blocks;
        if (group >= groups) break;
        ask();
      }
      const ChainSegment& segment = segment_of(link, group);
      const int row = (group - segment.first) * segment.group, count = min(segment.group, segment.rows - row);
      const int row_bytes = link.K << (segment.weight == Weight::bf16), chunk = segment.chunk;
      const bool whole = chunk == row_bytes;  // then the rows lie behind each other
      const uint8_t* from = segment.w + int64_t(row + (whole ? 0 : lane)) * row_bytes;
      if (segment.scale && lane == 31) prefetch_l2(segment.scale + row);
      for (int byte = 0; byte < row_bytes; byte += chunk) {
        const int bytes = min(chunk, row_bytes - byte);
        take_place();
        if (lane == 0) {
          store_shared4(ring.group(at.slot), uint32_t(group));
          barrier_expect(ring.full(at.slot), bytes * count);
        }
        __syncwarp();
        if (lane < (whole ? 1 : count))
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
              "%4;" ::"r"(ring.places + at.slot * kChainSlot + lane * chunk),
              "l"(from + byte), "r"(whole ? bytes * count : bytes), "r"(ring.full(at.slot)), "l"(policy)
              : "memory");
        at.advance(slots);
      }
    }
    take_place();
    if (lane == 0) {
      store_shared4(ring.group(at.slot), uint32_t(-1));
      barrier_arrive(ring.full(at.slot));
    }
    at.advance(slots);
  }
}

#endif

}  // namespace kda::cuda
