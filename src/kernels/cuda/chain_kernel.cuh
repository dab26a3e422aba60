// kernels/cuda/chain_kernel.cuh — the products and KDA steps of few rows, one after another in one launch
// (docs/CUDA.md).
//
// A block per multiprocessor stays for the whole chain. Its last warp streams weights: it asks for the rows that are
// this block's in link after link, through a ring in shared memory, as far ahead as the ring goes, so that the memory
// is busy while the links' ends and beginnings wait for each other. The other warps, the takers, do the links: what a
// link reads of the one before is there when all blocks have arrived at a counter. They must be well faster than the
// memory, to catch up afterwards with what the ring holds. The warps share a chunk in pieces of 64 bytes, taken in
// turn, and their sums are added in one order.
#pragma once
#include <cuda_fp16.h>

#include "kernels/cuda/chain.h"
#include "kernels/cuda/kda_decode_kernel.cuh"
#include "kernels/cuda/matvec_kernel.cuh"

namespace kda::cuda {

inline constexpr int kChainWarps = 8, kChainTakers = 32 * kChainWarps, kChainThreads = kChainTakers + 32;
inline constexpr int kChainGroup = 8;   // rows of weights that are summed together
inline constexpr int kChainPiece = 64;  // bytes of a row that a warp takes at a time
inline constexpr int kChainTurns = kChainChunk / (kChainWarps * kChainPiece);  // pieces of a chunk to a warp
inline constexpr int kMaxSlots = 16;                                           // of the ring
inline constexpr int kMaxGroups = kChainTakers / kChainGroup;                  // whose sums are added together
// Chunks asked for and not there yet. As many as keep the memory busy: what the takers read waits behind them.
inline constexpr int kChainFlight = 2;

#if __CUDA_ARCH__ >= 900

__device__ inline void chain_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kChainTakers) : "memory"); }

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

// Calls f(segment, first row, rows) for what is this block's of a link's segments.
template <class F>
__device__ void for_segments(const ChainProduct& link, F f) {
  const int block = blockIdx.x, each = link.rows_each, more = link.rows_more;
  const int r0 = block * each + min(block, more), r1 = r0 + each + (block < more ? 1 : 0);
  for (int s = 0, end = link.segments; s < end; ++s) {
    const ChainSegment& segment = link.segment[s];
    const int first = segment.first, from = max(r0, first), to = min(r1, first + segment.rows);
    if (from < to) f(segment, from - first, to - from);
  }
}

__device__ inline void stream_weights(const Chain& a, ChainLink* here, uint32_t ring, uint32_t full, uint32_t empty) {
  const int lane = threadIdx.x % 32, links = a.links, slots = a.slots;
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  LinkReader reader{a};
  reader.load(0);
  RingAt at, behind;
  int issued = 0;
  for (int i = 0; i < links; ++i) {
    __syncwarp();
    reader.store(*here);
    __syncwarp();
    reader.load(i + 1);
    if (here->is_kda) continue;
    const ChainProduct& link = here->product;
    for_segments(link, [&](const ChainSegment& segment, int row, int rows) {
      const int row_bytes = link.K << (segment.weight == Weight::bf16), chunk = min(kChainChunk, row_bytes);
      const uint8_t* from = segment.w + int64_t(row + lane) * row_bytes;
      const uint32_t to = ring + lane * chain_stride(chunk);
      for (; rows > 0; rows -= kChainGroup, from += kChainGroup * int64_t(row_bytes)) {
        const int count = min(kChainGroup, rows);
        for (int byte = 0; byte < row_bytes; byte += chunk) {
          const int bytes = min(chunk, row_bytes - byte);
          barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
          if (issued++ >= kChainFlight) barrier_wait(full + 8 * behind.slot, behind.phase), behind.advance(slots);
          if (lane == 0) barrier_expect(full + 8 * at.slot, bytes * count);
          __syncwarp();
          if (lane < count)
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                "[%3], %4;" ::"r"(to + at.slot * kChainSlot),
                "l"(from + byte), "r"(bytes), "r"(full + 8 * at.slot), "l"(policy)
                : "memory");
          at.advance(slots);
        }
      }
    });
  }
}

// What x of a link leaves beside it in shared memory.
struct TakenX {
  float sums[kChainRows * kChainWarps], most[kMaxSegments * kChainRows * kChainWarps];
  float factor[kMaxSegments * kChainRows];  // by which the products of a row are to be multiplied

  // The largest of the warps' `most` of a row; as a power of two, 2^14 to 2^15 times what it is to be divided by.
  __device__ float power(int row, float times) const {
    float m = 0;
#pragma unroll
    for (int i = 0; i < kChainWarps; ++i) m = fmaxf(m, most[row * kChainWarps + i]);
    m *= times;
    return m > 0 && m < INFINITY ? exp2f(float(ilogbf(m) - 14)) : 1.0f;
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

// x of a link to shared memory [inputs * R, x_stride]: as bf16, or beside weights of 8 bits, which are fp16 to the
// matrix unit, as that: bf16 values times a power of two to each row that makes the largest 2^14 to 2^15, so that what
// fp16 cannot hold is less than 2^-38 of it. `wait` returns when the link before has ended.
template <class Wait>
__device__ void take_x(const ChainProduct& link, uint8_t* shared, TakenX& taken, Wait wait) {
  const int tid = threadIdx.x, warp = tid / 32, R = link.R, K = link.K, stride = link.x_stride;
  const bool wide = link.wide, eight = link.eight;
  uint8_t* const halves = shared + link.half_at;
  if (link.residual) {
    uint8_t* const raw = halves + R * stride;
    float4* const weights = reinterpret_cast<float4*>(raw + int64_t(R) * K * 4);
    const int pieces = K / 4;
    const float* const residual = link.residual;
    const float4* const norm = reinterpret_cast<const float4*>(link.norm);
    for (int i = tid; i < pieces; i += kChainTakers) weights[i] = __ldg(norm + i);
    wait();
    for (int r = 0; r < R; ++r) {
      const float4* row = reinterpret_cast<const float4*>(residual + int64_t(r) * K);
      float4* const keep = reinterpret_cast<float4*>(raw) + int64_t(r) * pieces;
      float sum = 0, most = 0;
#pragma unroll 4
      for (int i = tid; i < pieces; i += kChainTakers) {
        const float4 v = __ldcg(row + i), w = weights[i];
        keep[i] = v;
        sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum), sum = fmaf(v.w, v.w, sum);
        most = fmaxf(fmaxf(fmaxf(most, fabsf(v.x * w.x)), fmaxf(fabsf(v.y * w.y), fabsf(v.z * w.z))), fabsf(v.w * w.w));
      }
      sum = warp_total(sum), most = warp_most(most);
      if (tid % 32 == 0) taken.sums[r * kChainWarps + warp] = sum, taken.most[r * kChainWarps + warp] = most;
    }
    chain_sync();
    for (int r = 0; r < R; ++r) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kChainWarps; ++i) sum += taken.sums[r * kChainWarps + i];
      const float factor = 1.0f / sqrtf(sum / float(K) + link.eps);
      const float power = eight ? taken.power(r, factor) : 1.0f, inverse = 1.0f / power;
      if (tid == 0) taken.factor[r] = power;
      const float4* const kept = reinterpret_cast<const float4*>(raw) + int64_t(r) * pieces;
      for (int i = tid; i < pieces; i += kChainTakers) {
        const uint2 v = norm_apply(kept[i], weights[i], factor);
        if (wide) {
          uint32_t* const to = reinterpret_cast<uint32_t*>(shared + r * stride + 16 * (i / 2)) + i % 2;
          to[0] = v.x, to[2] = v.y;
        }
        if (eight) {
          uint32_t* const to = reinterpret_cast<uint32_t*>(halves + r * stride + 32 * (i / 4)) + i % 4;
          to[0] = half2_of(low_bf16(v.x) * inverse, high_bf16(v.x) * inverse);
          to[4] = half2_of(low_bf16(v.y) * inverse, high_bf16(v.y) * inverse);
        }
      }
    }
  } else {
    const int inputs = link.inputs, pieces = K / 8, rows = inputs * R;
    const __nv_bfloat16* const x = link.x;
    wait();
    for (int row = 0; row < rows; ++row) {
      const __nv_bfloat16* from = inputs > 1 ? link.segment[row / R].x + int64_t(row % R) * K : x + int64_t(row) * K;
      uint32_t most = 0;  // of both halves' absolute values, whose order is that of their bits
#pragma unroll 4
      for (int i = tid; i < pieces; i += kChainTakers) {
        const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from) + i);
        *reinterpret_cast<uint4*>(shared + row * stride + 16 * i) = {v.x, v.z, v.y, v.w};
        most = __vmaxu2(__vmaxu2(most, v.x & 0x7fff7fffu), __vmaxu2(v.y & 0x7fff7fffu, v.z & 0x7fff7fffu));
        most = __vmaxu2(most, v.w & 0x7fff7fffu);
      }
      if (!eight) continue;
      const float m = warp_most(fmaxf(low_bf16(most), high_bf16(most)));
      if (tid % 32 == 0) taken.most[row * kChainWarps + warp] = m;
    }
    if (eight) chain_sync();
    for (int row = 0; row < rows; ++row) {
      const float power = eight ? taken.power(row, 1) : 1.0f, inverse = 1.0f / power;
      if (tid == 0) taken.factor[row] = power;
      if (!eight) continue;
      const auto scaled = [&](uint32_t v) { return half2_of(low_bf16(v) * inverse, high_bf16(v) * inverse); };
      for (int i = tid; i < pieces / 2; i += kChainTakers) {
        const uint4* const at = reinterpret_cast<const uint4*>(shared + row * stride + 32 * i);
        uint4* const to = reinterpret_cast<uint4*>(halves + row * stride + 32 * i);
        const uint4 v = at[0], w = at[1];
        to[0] = {scaled(v.x), scaled(v.y), scaled(w.x), scaled(w.y)};
        to[1] = {scaled(v.z), scaled(v.w), scaled(w.z), scaled(w.w)};
      }
    }
  }
  chain_sync();
}

// Bytes 2i and 2i+1 of a word (i = 0, 1) of 8-bit weights as two fp16.
template <Weight kW>
__device__ inline uint32_t half2_at(uint32_t word, int i) {
  uint32_t h;
  if constexpr (kW == Weight::f8) {
    asm("{ .reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low; }"
        : "=r"(h)
        : "r"(i ? word >> 16 : word));
  } else {  // the bytes, less their sign's weight, behind 1024: the last bits of its fp16
    const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x64646464u, i ? 0x4342 : 0x4140);
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(h) : "r"(bits), "r"(0x64806480u));
  }
  return h;
}

// Adds to the sums of row g of the group what this warp's pieces of a chunk give. w and x: where the lane's part of the
// warp's first piece lies; kFull: the chunk is a whole one, else it has `pieces`, counted from the warp's first.
//
// The 16 bytes that a lane has of a row are the matrix unit's operand as they come: row g of it has the even pairs, row
// g + 8 the odd ones. So column 2 r of the other operand has the even pairs of row r of x, column 2 r + 1 the odd ones,
// and the product is sum[..][0] + sum[..][3] of lanes t = r.
template <Weight kW, bool kFull>
__device__ void multiply_chunk(float (&sum)[2][4], uint32_t w, uint32_t x, int pieces) {
  constexpr int kWide = kW == Weight::bf16 ? 1 : 2, kTurn = kChainWarps * kChainPiece;
  uint4 v[kChainTurns], y[kChainTurns];
#pragma unroll
  for (int j = 0; j < kChainTurns; ++j) {
    const bool there = kFull || j * kChainWarps < pieces;
    v[j] = there ? shared16(w + j * kTurn) : uint4{};
    if constexpr (kWide == 1) {
      const uint2 pair = there ? shared8(x + j * kTurn) : uint2{};
      y[j].x = pair.x, y[j].y = pair.y;
    } else {
      y[j] = there ? shared16(x + j * kTurn * kWide) : uint4{};
    }
  }
#pragma unroll
  for (int j = 0; j < kChainTurns; ++j) {
    if constexpr (kWide == 1) {
      mma(sum[j % 2], v[j].x, v[j].y, v[j].z, v[j].w, y[j].x, y[j].y);
    } else {
      mma_f16(sum[0], half2_at<kW>(v[j].x, 0), half2_at<kW>(v[j].x, 1), half2_at<kW>(v[j].y, 0),
              half2_at<kW>(v[j].y, 1), y[j].x, y[j].y);
      mma_f16(sum[1], half2_at<kW>(v[j].z, 0), half2_at<kW>(v[j].z, 1), half2_at<kW>(v[j].w, 0),
              half2_at<kW>(v[j].w, 1), y[j].z, y[j].w);
    }
  }
}

// The sums of up to kMaxGroups / R groups: each thread adds the warps' parts of one of their values, in order.
struct GroupSums {
  struct Group {
    const ChainSegment* segment;
    int row, count;
  };
  static constexpr int kPad = 8;  // so that groups lie in different banks
  float part[kMaxGroups * (kChainWarps * kChainGroup + kPad)];
  Group group[kMaxGroups];

  __device__ static int stride(int R) { return kChainWarps * kChainGroup * R + kPad; }
  __device__ void finish(const ChainProduct& link, const TakenX& taken, int groups) const {
    const int R = link.R;
    const Finish finish = link.finish;
    const int values = kChainGroup * R, i = threadIdx.x / values, at = threadIdx.x % values;
    if (i >= groups) return;
    const int r = at / kChainGroup, column = at % kChainGroup;
    if (column >= group[i].count) return;
    const ChainSegment& segment = *group[i].segment;
    const int64_t n = group[i].row + column, to = int64_t(r) * segment.rows + n;
    const float scale = segment.scale ? __ldg(segment.scale + n) : 1.0f;
    const bool adds = finish == Finish::add;
    float* const y = static_cast<float*>(segment.y) + to;
    const float before = adds ? __ldcg(y) : 0.0f;
    float v = 0;
#pragma unroll
    for (int j = 0; j < kChainWarps; ++j) v += part[i * stride(R) + j * values + at];
    if (segment.scale) v *= scale * taken.factor[(link.inputs > 1 ? segment.input * R : 0) + r];
    if (finish == Finish::relu2) v = v > 0 ? v * v : v < 0 ? 0 : v * 0;  // a NaN stays one
    if (adds || segment.f32)
      *y = before + v;
    else
      static_cast<__nv_bfloat16*>(segment.y)[to] = __float2bfloat16_rn(v);
  }
};

// What a taker keeps from link to link.
struct Taker {
  GroupSums& parts;
  const TakenX& taken;
  uint32_t x_shared, ring, full, empty;
  int slots;
  RingAt at;
  int groups = 0;

  // The product with rows row .. row + rows - 1 of a segment.
  template <Weight kW>
  __device__ void take(const ChainProduct& link, const ChainSegment& segment, int row, int rows) {
    constexpr int kWide = kW == Weight::bf16 ? 1 : 2, kBytes = 3 - kWide;  // bytes of x to one of w; of a weight
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int R = link.R, most = kMaxGroups / R, stride = GroupSums::stride(R);
    const int pieces = link.K * kBytes / kChainPiece, chunk = min(kChainChunk / kChainPiece, pieces);
    const uint32_t w_lane = ring + g * chain_stride(chunk * kChainPiece) + warp * kChainPiece + t * 16;
    // Columns beyond 2 R take a row as well; nobody reads their sums.
    const int x_row = (link.inputs > 1 ? segment.input * R : 0) + min(g / 2, R - 1);
    const uint32_t x_lane = x_shared + (kWide > 1 ? link.half_at : 0) + x_row * link.x_stride +
                            (warp * kChainPiece + t * 16 + g % 2 * 8) * kWide;
    float* const mine = parts.part + (warp * R + t) * kChainGroup + g;
    for (; rows > 0; rows -= kChainGroup, row += kChainGroup) {
      float sum[2][4] = {};
      for (int from = 0; from < pieces; from += chunk) {
        const int n = pieces - from;
        const uint32_t w = w_lane + at.slot * kChainSlot, x = x_lane + from * kChainPiece * kWide;
        barrier_wait(full + 8 * at.slot, at.phase);
        if (n >= kChainTurns * kChainWarps)
          multiply_chunk<kW, true>(sum, w, x, 0);
        else
          multiply_chunk<kW, false>(sum, w, x, n - warp);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * at.slot);
        at.advance(slots);
      }
      if (t < R) mine[groups * stride] = sum[0][0] + sum[1][0] + (sum[0][3] + sum[1][3]);
      if (threadIdx.x == 0) parts.group[groups] = {&segment, row, min(kChainGroup, rows)};
      if (++groups == most) {
        chain_sync();
        parts.finish(link, taken, groups);
        chain_sync();
        groups = 0;
      }
    }
  }
};

// f and g of a head, found from their inputs: a thread has a row of either's weights. Stored too, as the op that stands
// for them would.
struct FoundGates {
  const ChainKda& a;
  int64_t n, h;
  float* values;  // [2 * kGateWidth] of shared memory

  __device__ static float dot2(uint32_t w, uint32_t x, float sum) {
    return fmaf(high_bf16(w), high_bf16(x), fmaf(low_bf16(w), low_bf16(x), sum));
  }
  template <Weight kW>
  __device__ static float dot8(uint2 w, uint4 x, float sum) {
    sum = dot2(widen<kW>(w.x, 1), x.y, dot2(widen<kW>(w.x, 0), x.x, sum));
    return dot2(widen<kW>(w.y, 1), x.w, dot2(widen<kW>(w.y, 0), x.z, sum));
  }
  template <class Sync>
  __device__ void find(Sync sync) {
    static_assert(kChainTakers == 2 * kGateWidth);
    const bool of_g = threadIdx.x >= kGateWidth, wide = a.weight == Weight::bf16;
    const int64_t row = h * kGateWidth + threadIdx.x % kGateWidth;
    const uint4* w = reinterpret_cast<const uint4*>((of_g ? a.g_w : a.f_w) + row * (kGateWidth << wide));
    const uint4* in = reinterpret_cast<const uint4*>((of_g ? a.g_in : a.f_in) + n * kGateWidth);
    float sum = 0;
    if (wide) {
#pragma unroll
      for (int i = 0; i < kGateWidth / 8; ++i) {
        const uint4 v = __ldg(w + i), x = __ldcg(in + i);
        sum = dot2(v.w, x.w, dot2(v.z, x.z, dot2(v.y, x.y, dot2(v.x, x.x, sum))));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGateWidth / 16; ++i) {
        const uint4 v = __ldg(w + i), x = __ldcg(in + 2 * i), y = __ldcg(in + 2 * i + 1);
        if (a.weight == Weight::f8)
          sum = dot8<Weight::f8>({v.z, v.w}, y, dot8<Weight::f8>({v.x, v.y}, x, sum));
        else
          sum = dot8<Weight::i8>({v.z, v.w}, y, dot8<Weight::i8>({v.x, v.y}, x, sum));
      }
      sum *= __ldg((of_g ? a.g_scale : a.f_scale) + row);
    }
    const __nv_bfloat16 value = __float2bfloat16_rn(sum);
    const_cast<__nv_bfloat16*>(of_g ? a.step.g : a.step.f)[n * a.step.H * kGateWidth + row] = value;
    values[threadIdx.x] = __bfloat162float(value);
    sync();
  }
  __device__ float f(int channel) const { return values[channel]; }
  __device__ float g(int channel) const { return values[kGateWidth + channel]; }
};

// To the second-level cache: what the takers will read first of this link, and of the next.
__device__ inline void fetch(const void* from, int64_t bytes) {
  for (int64_t byte = threadIdx.x * 128; byte < bytes; byte += kChainTakers * 128)
    prefetch_l2(static_cast<const char*>(from) + byte);
}
__device__ inline void fetch_scales(const ChainProduct& link) {
  for_segments(link, [&](const ChainSegment& segment, int row, int rows) {
    if (segment.scale)
      for (int r = threadIdx.x; r < rows; r += kChainTakers) prefetch_l2(segment.scale + row + r);
  });
}
__device__ inline void fetch_next(const ChainLink& next) {
  if (!next.is_kda) {
    if (next.product.norm) fetch(next.product.norm, int64_t(next.product.K) * 4);
    return;
  }
  const ChainKda& kda = next.kda;
  const KdaDecodeArgs& k = kda.step;
  for (int head = blockIdx.x; head < k.N * k.H; head += gridDim.x) {
    const int64_t slot = k.in[head / k.H], h = head % k.H;
    if (slot >= 0) fetch(k.state + (slot * k.H + h) * k.K * k.V, int64_t(k.K) * k.V * 4);
    fetch(k.q_conv + h * k.K * 4, k.K * 16);
    fetch(k.k_conv + h * k.K * 4, k.K * 16);
    fetch(k.v_conv + h * k.V * 4, k.V * 16);
    if (!kda.f_w) continue;
    const int64_t bytes = kGateWidth * (kGateWidth << (kda.weight == Weight::bf16));
    fetch(kda.f_w + h * bytes, bytes);
    fetch(kda.g_w + h * bytes, bytes);
  }
}

#endif

static __global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ Chain a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t barriers[2 * kMaxSlots];
  __shared__ __align__(16) uint8_t read[4][sizeof(ChainLink)];  // three links of the takers', one of the stream's
  __shared__ TakenX taken;
  __shared__ GroupSums parts;
  const int tid = threadIdx.x;
  const uint32_t full = shared_address(barriers), empty = full + 8 * kMaxSlots;
  const uint32_t x_shared = shared_address(shared), ring = x_shared + a.x_bytes;
  const auto read_link = [&](int i) -> ChainLink& { return *reinterpret_cast<ChainLink*>(read[i]); };
  LinkReader reader{a};
  if (tid < 32) reader.load(0), reader.store(read_link(0)), reader.load(1);
  if (tid == 0) {
    for (int i = 0; i < a.slots; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kChainWarps);
    }
    barriers_made();
  }
  __syncthreads();
  if (tid >= kChainTakers) return stream_weights(a, &read_link(3), ring, full, empty);

  const int blocks = gridDim.x, links = a.links;
  unsigned* const arrived_at = a.arrived;
  Taker taker{parts, taken, x_shared, ring, full, empty, a.slots};
  for (int i = 0; i < links; ++i) {
    const ChainLink &here = read_link(i % 3), &next = read_link((i + 1) % 3);
    if (tid < 32) reader.store(read_link((i + 1) % 3)), reader.load(i + 2);
    const auto wait = [&] {
      if (tid == 0 && i > 0) {
        while (load_acquired(arrived_at) < unsigned(i * blocks)) {
        }
      }
      chain_sync();
    };
    const auto arrive = [&] {
      chain_sync();
      if (tid == 0) {
        if (i + 1 < links) {
          add_released(arrived_at, 1);
        } else {
          __threadfence();
          if (atomicAdd(arrived_at, 1u) == unsigned(links * blocks - 1)) *arrived_at = 0;  // for the next launch
        }
      }
    };
    if (!here.is_kda) {
      const ChainProduct& link = here.product;
      fetch_scales(link);
      take_x(link, shared, taken, wait);
      if (i + 1 < links) fetch_next(next);
      for_segments(link, [&](const ChainSegment& segment, int row, int rows) {
        switch (segment.weight) {
          case Weight::bf16: return taker.take<Weight::bf16>(link, segment, row, rows);
          case Weight::f8: return taker.take<Weight::f8>(link, segment, row, rows);
          case Weight::i8: return taker.take<Weight::i8>(link, segment, row, rows);
        }
      });
      chain_sync();
      parts.finish(link, taken, taker.groups);
      taker.groups = 0;
      arrive();
      continue;
    }
    const ChainKda& kda = here.kda;
    const int heads = kda.step.N * kda.step.H;
    for (int head = blockIdx.x; head < heads; head += blocks) {
      const int n = head / kda.step.H, h = head % kda.step.H;
      const auto sync = [] { chain_sync(); };
      const auto first = [&] {
        if (head == int(blockIdx.x)) wait();
      };
      const auto done = [&] {
        if (head + blocks >= heads) arrive();
      };
      if (kda.f_w)
        kda_decode_head<128, 128, 1, kChainTakers, true>(kda.step, n, h, 0, FoundGates{kda, n, h, parts.part}, sync,
                                                         first, done);
      else
        kda_decode_head<128, 128, 1, kChainTakers, true>(kda.step, n, h, 0, StoredGates{kda.step, n, h}, sync, first,
                                                         done);
      chain_sync();
    }
    if (int(blockIdx.x) >= heads) wait(), arrive();
    if (i + 1 < links && next.is_kda) fetch_next(next);
  }
#endif
}

}  // namespace kda::cuda
