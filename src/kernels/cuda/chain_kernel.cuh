// kernels/cuda/chain_kernel.cuh — the products and KDA steps of few rows, one after another in one launch
// (docs/CUDA.md).
//
// A block per multiprocessor stays for the whole chain. Its last warp streams weights through a ring in shared memory,
// link after link, as far ahead as the ring goes, so that the memory is busy while the links' ends and beginnings wait
// for each other. Most rows of a link are dealt out beforehand; the rest go to the blocks that the memory serves
// faster. The other warps, the takers, do the links. There is no barrier between blocks: what a link gives the next
// lies in memory full of marks before, and a value is there when it is none. Weights are the matrix unit's rows: 8 of
// them, or 4 in two parts of K; rows of x are its columns. The warps share a chunk, and all sums are added in one
// order, whichever block has a row.
#pragma once
#include <cuda_fp16.h>

#include "kernels/cuda/chain_head.cuh"
#include "kernels/cuda/chain_values.cuh"
#include "kernels/cuda/matvec_kernel.cuh"

namespace kda::cuda {

inline constexpr int kChainColumns = 8;  // of the matrix unit
inline constexpr int kChainTurns =
    kChainSlot / (kChainColumns * kChainPiece * kChainWarps);  // pieces of a chunk to a lane
inline constexpr int kMaxSlots = 16;                           // of the ring
inline constexpr int kMaxGroups = 40;                          // whose sums are added together, with one row of x
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

// A place of the ring: its barriers, and which group it holds a chunk of; -1: the link has no more for this block.
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
__device__ inline uint32_t kept(uint32_t address) { return __shfl_sync(0xffffffffu, address, 0); }

// To the second-level cache, by the lanes of a warp in turn: what the takers will read of a link beside its weights.
struct Fetcher {
  int turn = 0;
  __device__ void operator()(const void* from, int64_t bytes) {
    const uint64_t at = reinterpret_cast<uint64_t>(from), first = at / 16 * 16;
    if (int(threadIdx.x % 32) == turn++ % 32)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first),
                   "r"(uint32_t((at + bytes + 15) / 16 * 16 - first))
                   : "memory");
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
  constexpr int64_t W = kHeadWidth;
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
          shared_store(ring.group(at.slot), group);
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
      shared_store(ring.group(at.slot), -1);
      barrier_arrive(ring.full(at.slot));
    }
    at.advance(slots);
  }
}

// Calls f(i, piece) for this thread's of `pieces` of 16 bytes, where they are awaited when they are there. Rows are
// given out upwards, so a late piece is awaited at the highest before the others are asked for again.
template <class E, int kTaken, class F>
__device__ inline void take_pieces(const void* from, int pieces, bool awaited, F f) {
  const uint4* const at = static_cast<const uint4*>(from);
  for (int base = threadIdx.x; base < pieces; base += kTaken * kChainTakers) {
    uint4 v[kTaken];
#pragma unroll
    for (int j = 0; j < kTaken; ++j)
      if (base + j * kChainTakers < pieces) v[j] = load16(at + base + j * kChainTakers);
    while (awaited) {
      int last = -1;
#pragma unroll
      for (int j = 0; j < kTaken; ++j)
        if (base + j * kChainTakers < pieces && has_mark<E>(v[j])) last = j;
      if (last < 0) break;
      const uint4 late = await16<E>(at + base + last * kChainTakers);
#pragma unroll
      for (int j = 0; j < kTaken; ++j)
        if (j == last)
          v[j] = late;
        else if (base + j * kChainTakers < pieces && has_mark<E>(v[j]))
          v[j] = load16(at + base + j * kChainTakers);
    }
#pragma unroll
    for (int j = 0; j < kTaken; ++j)
      if (base + j * kChainTakers < pieces) f(base + j * kChainTakers, v[j]);
  }
}

struct Power {
  float value, inverse;
};
// What x of a link leaves beside it in shared memory.
struct TakenX {
  float sums[kChainRows * kChainWarps], most[kMaxSegments * kChainRows * kChainWarps];
  float factor[kMaxSegments * kChainRows];  // by which the products of a row are to be multiplied

  // The power of two that a row whose largest value is the largest of its warps' `most`, times `times`, is divided by:
  // 2^14 to 2^15 are left. What is no number stays none.
  __device__ Power power(int row, float times) const {
    float m = 0;
#pragma unroll
    for (int i = 0; i < kChainWarps; ++i) m = fmaxf(m, most[row * kChainWarps + i]);
    const int exponent = max(int(__float_as_uint(m * times) >> 23) - 14, 1);
    return {__uint_as_float(exponent << 23), __uint_as_float(254 - exponent << 23)};
  }
};
__device__ inline float warp_most(float v) {
  for (int m = 16; m; m >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, m));
  return v;
}
__device__ inline uint32_t half2_of(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(h);
}
__device__ inline float low_bf16(uint32_t v) { return __uint_as_float(v << 16); }
__device__ inline float high_bf16(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

// Two bf16 as fp16, times `by`.
__device__ inline uint32_t scaled(uint32_t v, float by) { return half2_of(low_bf16(v) * by, high_bf16(v) * by); }

// x of a link to shared memory [inputs * R, x_stride]: as bf16, or beside weights of 8 bits, which are fp16 to the
// matrix unit, as that: bf16 values times a power of two to each row that makes the largest 2^14 to 2^15, so that what
// fp16 cannot hold is less than 2^-38 of it.
template <Weight kEight>
__device__ inline void take_x(const ChainProduct& link, uint8_t* shared, TakenX& taken) {
  const int tid = threadIdx.x, warp = tid / 32, R = link.R, K = link.K, stride = link.x_stride;
  constexpr bool kSome = kEight != Weight::bf16;
  const bool wide = !kSome || link.wide, eight = kSome && link.eight;
  uint8_t* const halves = shared + link.half_at;
  const int pad = (link.x_width - K) / 8;
  for (int row = 0; pad && row < link.inputs * R; ++row)
    for (int i = tid; i < pad; i += kChainTakers)
      reinterpret_cast<uint4*>(shared + row * stride + K * 2)[i] =
          reinterpret_cast<uint4*>(halves + row * stride + K * 2)[i] = {};
  float4* const raw = reinterpret_cast<float4*>(halves + R * stride);  // with norm: x [R,K], the norm's weights [K]
  float4* const weights = raw + R * (K / 4);
  if (link.residual) {
    const float4* const norm = reinterpret_cast<const float4*>(link.norm);
#pragma unroll 1
    for (int i = tid; i < K / 4; i += kChainTakers) copy16(shared_address(weights + i), norm + i);
    commit_copies();
  }
  // Where x is awaited, a part of it once before it is there: to have the instructions when it comes.
#pragma unroll 1
  for (bool comes = !link.awaited;; comes = true) {
    const int most_pieces = comes ? K : kChainTakers;
    if (link.residual) {
      const int pieces = min(K / 4, most_pieces);
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        float4* const keep = raw + r * (K / 4);
        float sum = 0, most = 0;
        take_pieces<float, 2>(
            link.residual + int64_t(r) * K, pieces, comes && link.awaited & 1, [&](int i, uint4 bits) {
              wait_copies<0>();  // this thread's of the weights, which are those that it reads here
              const float4 v = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                                __uint_as_float(bits.w)},
                           w = weights[i];
              keep[i] = v;
              sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum),
              sum = fmaf(v.w, v.w, sum);
              most = fmaxf(fmaxf(fmaxf(most, fabsf(v.x * w.x)), fmaxf(fabsf(v.y * w.y), fabsf(v.z * w.z))),
                           fabsf(v.w * w.w));
            });
        sum = warp_total(sum), most = warp_most(most);
        if (tid % 32 == 0) taken.sums[r * kChainWarps + warp] = sum, taken.most[r * kChainWarps + warp] = most;
      }
      chain_sync();
#pragma unroll 1
      for (int r = 0; r < R; ++r) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kChainWarps; ++i) sum += taken.sums[r * kChainWarps + i];
        const float factor = rsqrtf(sum * link.mean + link.eps);
        const Power power = taken.power(r, factor);
        if (tid == 0) taken.factor[r] = power.value;
        const float4* const from = raw + r * (K / 4);
#pragma unroll 1
        for (int i = tid; i < pieces; i += kChainTakers) {
          const uint2 v = norm_apply(from[i], weights[i], factor);
          if (wide) {
            uint32_t* const to = reinterpret_cast<uint32_t*>(shared + r * stride + 16 * (i / 2)) + i % 2;
            to[0] = v.x, to[2] = v.y;
          }
          if (eight) {
            uint32_t* const to = reinterpret_cast<uint32_t*>(halves + r * stride + 32 * (i / 4)) + i % 4;
            to[0] = scaled(v.x, power.inverse), to[4] = scaled(v.y, power.inverse);
          }
        }
      }
    } else {
      const int inputs = link.inputs, pieces = min(K / 8, most_pieces), rows = inputs * R;
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        const int input = row / R;
        const __nv_bfloat16* from = (inputs > 1 ? link.segment[input].x : link.x) + int64_t(row % R) * K;
        uint32_t most = 0;  // of both halves' absolute values, whose order is that of their bits
        take_pieces<__nv_bfloat16, 4>(from, pieces, comes && link.awaited >> input & 1, [&](int i, uint4 v) {
          *reinterpret_cast<uint4*>(shared + row * stride + 16 * i) = {v.x, v.z, v.y, v.w};
          most = __vmaxu2(__vmaxu2(most, v.x & 0x7fff7fffu), __vmaxu2(v.y & 0x7fff7fffu, v.z & 0x7fff7fffu));
          most = __vmaxu2(most, v.w & 0x7fff7fffu);
        });
        if (!eight) continue;
        const float m = warp_most(fmaxf(low_bf16(most), high_bf16(most)));
        if (tid % 32 == 0) taken.most[row * kChainWarps + warp] = m;
      }
      if (eight) chain_sync();
#pragma unroll 1
      for (int row = 0; eight && row < rows; ++row) {
        const Power power = taken.power(row, 1);
        if (tid == 0) taken.factor[row] = power.value;
        // A lane has a piece; of two, one lane stores the first halves and its neighbour the second.
        const bool second = tid % 2;
#pragma unroll 1
        for (int base = tid & ~31; base < pieces; base += kChainTakers) {
          const int i = min(base + tid % 32, pieces - 1);
          const uint4 v = *reinterpret_cast<const uint4*>(shared + row * stride + 16 * i);
          const uint2 low{scaled(v.x, power.inverse), scaled(v.y, power.inverse)},
              high{scaled(v.z, power.inverse), scaled(v.w, power.inverse)}, mine = second ? high : low;
          uint2 other = second ? low : high;
          other.x = __shfl_xor_sync(0xffffffffu, other.x, 1), other.y = __shfl_xor_sync(0xffffffffu, other.y, 1);
          if (base + tid % 32 < pieces)
            *reinterpret_cast<uint4*>(halves + row * stride + 16 * i) =
                second ? uint4{other.x, other.y, mine.x, mine.y} : uint4{mine.x, mine.y, other.x, other.y};
        }
      }
    }
    chain_sync();
    if (comes) break;
  }
}

// Bytes 2i and 2i+1 of a word (i = 0, 1) of 8-bit weights as two fp16.
template <Weight kW>
__device__ inline uint32_t half2_at(uint32_t word, int i) {
  uint32_t h;
  if constexpr (kW == Weight::f8) {
    if (i == 0)
      asm("{ .reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(h) : "r"(word));
    else
      asm("{ .reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(h) : "r"(word));
  } else {  // the bytes, less their sign's weight, behind 1024: the last bits of its fp16
    const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x64646464u, i ? 0x4342 : 0x4140);
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(h) : "r"(bits), "r"(0x64806480u));
  }
  return h;
}

// Adds what a piece gives. The 16 bytes that a lane has of a row are the matrix unit's operand as they come: row g of
// it has the even pairs, row g + 8 the odd ones. So column 2 q of the other operand has the even pairs of x of q,
// column 2 q + 1 the odd ones, and the product is sum[..][0] + sum[..][3] of lanes t = q.
template <Weight kW>
__device__ inline void multiply(float (&sum)[2][4], uint4 w, uint4 x) {
  if constexpr (kW == Weight::bf16) {
    mma(sum[0], w.x, w.y, w.z, w.w, x.x, x.y);
  } else {
    mma_f16(sum[0], half2_at<kW>(w.x, 0), half2_at<kW>(w.x, 1), half2_at<kW>(w.y, 0), half2_at<kW>(w.y, 1), x.x, x.y);
    mma_f16(sum[1], half2_at<kW>(w.z, 0), half2_at<kW>(w.z, 1), half2_at<kW>(w.w, 0), half2_at<kW>(w.w, 1), x.z, x.w);
  }
}
template <Weight kW>
__device__ inline uint4 x_piece_at(uint32_t from) {
  if constexpr (kW != Weight::bf16) return shared16(from);
  const uint2 pair = shared8(from);
  return {pair.x, pair.y, 0, 0};
}

// The sums of up to kMaxGroups / R groups: of each column the warps' parts, in order, then of each row its columns.
struct GroupSums {
  static constexpr int kPad = 8;  // so that groups lie in different banks
  float part[kMaxGroups * (kChainWarps * kChainColumns + kPad)];
  float before[kMaxGroups * kChainColumns], scale[kMaxGroups * kChainColumns];  // of y, where it is added to; of rows
  int group[kMaxGroups];

  __device__ static constexpr int stride(int R) { return kChainWarps * kChainColumns * R + kPad; }

  // Asks for what finish needs of group i, by the threads of one warp.
  __device__ void begin(const ChainProduct& link, const ChainSegment& segment, int i, int which) {
    const int lane = threadIdx.x % 32, column = lane % kChainColumns, r = lane / kChainColumns;
    if (lane == 0) group[i] = which;
    const float *const adds = link.before, *const scales = segment.scale;
    const int R = link.R, rows = segment.rows, n = (which - segment.first) * segment.group + column;
    if (r >= R || column >= segment.group || n >= rows) return;
    if (adds) copy4(shared_address(before + (i * R + r) * kChainColumns + column), adds + r * int64_t(rows) + n);
    if (scales && r == 0) copy4(shared_address(scale + i * kChainColumns + column), scales + n);
    commit_copies();
  }

  __device__ void finish(const ChainProduct& link, const TakenX& taken, int groups) const {
    static_assert(kChainRows == 2 && kChainColumns == 8);
    const int R = link.R, shift = 2 + R, at = threadIdx.x & ((1 << shift) - 1), turn = threadIdx.x >> shift;
    const int r = at / kChainColumns, column = at % kChainColumns;
    for (int first = 0; first < groups; first += kChainTakers >> shift) {
      const int i = min(first + turn, groups - 1);
      const ChainSegment& segment = segment_of(link, group[i]);
      const int n = (group[i] - segment.first) * segment.group + column;
      float v = 0;
#pragma unroll
      for (int j = 0; j < kChainWarps; ++j) v += part[i * stride(R) + (j << shift) + at];
      const float other = __shfl_xor_sync(0xffffffffu, v, 4, kChainColumns);  // all lanes: their groups may differ
      if (segment.group == 4) v += other;
      if (first + turn >= groups || column >= segment.group || n >= segment.rows) continue;
      if (segment.scale)
        v *= scale[i * kChainColumns + column] * taken.factor[(link.inputs > 1 ? segment.input * R : 0) + r];
      if (link.finish == Finish::relu2) v = v > 0 ? v * v : v < 0 ? 0 : v * 0;  // a NaN stays one
      if (link.before) v += before[(i * R + r) * kChainColumns + column];
      const int64_t to = r * int64_t(segment.rows) + n;
      if (segment.f32) {
        if (segment.passed) store_value(static_cast<float*>(segment.passed) + to, v);
        if (segment.y) static_cast<float*>(segment.y)[to] = v;
      } else {
        if (segment.passed) store_value(static_cast<__nv_bfloat16*>(segment.passed) + to, v);
        if (segment.y) static_cast<__nv_bfloat16*>(segment.y)[to] = __float2bfloat16_rn(v);
      }
    }
  }
};

// What a taker keeps from group to group of a segment.
template <Weight kEight>
struct TakenRows {
  const ChainSegment* segment;
  int from = 0, to = 0;  // its groups
  int row_bytes, chunk, stride, w_piece;
  uint32_t w, x_at;  // the lane's first piece of a row, in the ring's first place, and of x
  uint32_t out;      // the sum that the lane has, of the first group; 0: none
  bool eight, kept;
  uint4 x[kChainTurns];  // where a row is one chunk, what the lane multiplies with

  // The two sets of columns 2 r and 2 r + 1 have different pieces, and so have neighbouring rows, which read different
  // banks: of 4 rows each has one half of the pieces in its first, the other in its second place; of 8, neighbouring
  // warps have each other's for the odd rows.
  __device__ void begin(const ChainProduct& link, int group, uint32_t places, uint32_t x_shared, uint32_t sums) {
    segment = &segment_of(link, group);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int R = link.R, rows = segment->group;
    const auto piece = [&](int set) { return rows == 4 ? 2 * warp + set : warp ^ set; };
    const int w_set = rows == 4 ? g / 4 ^ g % 2 : g % 2, x_piece = piece(g / 2 % 2);
    eight = segment->weight != Weight::bf16;
    const int wide = eight ? 2 : 1;
    from = segment->first, to = from + (segment->rows + rows - 1 >> (rows == 4 ? 2 : 3));
    row_bytes = link.K << !eight, chunk = segment->chunk;
    stride = (rows == 4 ? 2 * kChainWarps : kChainWarps) * kChainPiece;
    w_piece = piece(w_set);
    w = places + (g & (rows - 1)) * chunk + w_piece * kChainPiece + t * 16;
    // Columns beyond the last row of x take some row's values; nobody reads their sums.
    x_at = x_shared + (eight ? link.half_at : 0) +
           ((link.inputs > 1 ? segment->input * R : 0) + min(g / 4, R - 1)) * link.x_stride +
           (x_piece * kChainPiece + t * 16 + g % 2 * 8) * wide;
    out = t / 2 < R && t % 2 == w_set ? sums + ((warp * R + t / 2) * kChainColumns + g) * 4 : 0;
    kept = eight == (kEight != Weight::bf16) && chunk == row_bytes;
    if (!kept) return;
#pragma unroll
    for (int j = 0; j < kChainTurns; ++j) x[j] = x_piece_at<kEight>(x_at + j * stride * wide);
  }
};

struct Taker {
  GroupSums& parts;
  const TakenX& taken;
  Ring ring;
  uint32_t x_shared, parts_shared;
  RingAt at;

  __device__ void release() {
    warp_arrive(ring.empty(at.slot));
    at.advance(ring.slots);
  }
  __device__ void wait() { barrier_wait(ring.full(at.slot), at.phase); }
  __device__ int next_group() {
    wait();
    return shared_load(ring.group(at.slot));
  }

  // The lane's part of the sums of a group whose first chunk is there. kKept: which is all of it.
  template <Weight kW, bool kKept, Weight kEight>
  __device__ float take_group(TakenRows<kEight>& rows) {
    constexpr int kWide = kW == Weight::bf16 ? 1 : 2;
    float sum[2][2][4] = {};
    for (int byte = 0;;) {
      const int bytes = kKept ? rows.row_bytes : min(rows.chunk, rows.row_bytes - byte);
      // Behind its last piece, which a lane then takes again, x is zeros.
      const uint32_t w = rows.w + at.slot * kChainSlot, last = w + bytes - (rows.w_piece + 1) * kChainPiece;
      uint4 v[kChainTurns], y[kChainTurns];
#pragma unroll
      for (int j = 0; j < kChainTurns; ++j) {
        v[j] = shared16(min(w + j * rows.stride, last));
        y[j] = kKept ? rows.x[j] : x_piece_at<kW>(rows.x_at + (byte + j * rows.stride) * kWide);
      }
#pragma unroll
      for (int j = 0; j < kChainTurns; ++j) multiply<kW>(sum[j % 2], v[j], y[j]);
      release();
      if (kKept || (byte += rows.chunk) >= rows.row_bytes) break;
      wait();
    }
    return (sum[0][0][0] + sum[0][1][0]) + (sum[1][0][0] + sum[1][1][0]) +
           ((sum[0][0][3] + sum[0][1][3]) + (sum[1][0][3] + sum[1][1][3]));
  }

  template <Weight kEight>
  __device__ void take(const ChainProduct& link) {
    const int most = kMaxGroups / link.R, stride = 4 * GroupSums::stride(link.R);
    TakenRows<kEight> rows;
    int group = next_group();
    do {
      int groups = 0, until = threadIdx.x / 32;  // the warp's turn to begin
      uint32_t sums = 0;
      for (; group >= 0 && groups < most; sums += stride, ++groups, group = next_group()) {
        if (group < rows.from || group >= rows.to) rows.begin(link, group, ring.places, x_shared, parts_shared);
        if (until-- == 0) parts.begin(link, *rows.segment, groups, group), until = kChainWarps - 1;
        float sum;
        if (rows.kept)
          sum = take_group<kEight, true>(rows);
        else if (kEight == Weight::bf16 || !rows.eight)
          sum = take_group<Weight::bf16, false>(rows);
        else
          sum = take_group<kEight, false>(rows);
        if (rows.out) shared_store(rows.out + sums, sum);
      }
      if (group < 0) release();
      wait_copies<0>();
      chain_sync();
      parts.finish(link, taken, groups);
      if (group >= 0) chain_sync();
    } while (group >= 0);  // ends while threads may still read the sums
  }
};

#endif

// kEight: the type of those weights that have 8 bits; bf16: none. Code is not read faster than weights: what is not
// needed is not there.
template <Weight kEight>
static __global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ Chain a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ RingShared ring_shared;
  __shared__ __align__(16) uint8_t read[4][sizeof(ChainLink)];  // three links of the takers', one of the stream's
  __shared__ TakenX taken;
  __shared__ GroupSums parts;
  __shared__ HeadShared heads;
  const int tid = threadIdx.x;
  const uint32_t x_shared = shared_address(shared);
  const Ring ring{x_shared + a.x_bytes, kept(shared_address(&ring_shared)), a.slots};
  const auto read_link = [&](int i) -> ChainLink& { return *reinterpret_cast<ChainLink*>(read[i]); };
  LinkReader reader{a};
  if (tid < 32) reader.load(0), reader.store(read_link(0)), reader.load(1);
  if (tid == 0) {
    for (int i = 0; i < a.slots; ++i) {
      barrier_init(ring.full(i), 1);
      barrier_init(ring.empty(i), kChainWarps * kWarpArrivals);
    }
    barriers_made();
  }
  __syncthreads();
  if (tid >= kChainTakers) return stream_weights(a, &read_link(3), ring);

  Taker taker{parts, taken, ring, x_shared, kept(shared_address(parts.part))};
  for (int i = 0; i < a.links; ++i) {
    const ChainLink& here = read_link(i % 3);
    if (tid < 32) reader.store(read_link((i + 1) % 3)), reader.load(i + 2);
    if (!here.is_kda) {
      if (int(blockIdx.x) < here.product.skipped) {
        chain_sync();
        continue;
      }
      take_x<kEight>(here.product, shared, taken);
      taker.take<kEight>(here.product);
      continue;
    }
    take_heads<kEight>(here.kda, heads);
    chain_sync();
  }
#endif
}

}  // namespace kda::cuda
