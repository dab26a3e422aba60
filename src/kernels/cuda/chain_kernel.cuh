// kernels/cuda/chain_kernel.cuh — the products and KDA steps of few rows, one after another in one launch
// (docs/CUDA.md).
//
// A block per multiprocessor stays for the whole chain. Its last warp streams weights; the others, the takers, do the
// links. There is no barrier between blocks: what a link gives the next lies in memory full of marks before, and a
// value is there when it is none. Weights are the matrix unit's rows: 8 of them, or 4 in two parts of K; rows of x are
// its columns. The warps share a chunk, and all sums are added in one order, whichever block has a row.
#pragma once
#include "kernels/cuda/chain_head.cuh"
#include "kernels/cuda/chain_stream.cuh"
#include "kernels/cuda/chain_x.cuh"

namespace kda::cuda {

inline constexpr int kMaxGroups = 40;  // whose sums are added together, with one row of x

#if __CUDA_ARCH__ >= 900

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

// The sums of up to kMaxGroups / R groups: of each row of weights (here `column`, of y) the warps' parts, in order.
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
    static_assert(kChainRows == 2 && kChainColumns == 8 && kMaxGroups * kChainColumns <= kChainTakers);
    if (groups == 0) return;
    const int R = link.R, shift = 2 + R, at = threadIdx.x & ((1 << shift) - 1), turn = threadIdx.x >> shift;
    const int r = at / kChainColumns, column = at % kChainColumns, i = min(turn, groups - 1);
    const ChainSegment& segment = segment_of(link, group[i]);
    const int n = (group[i] - segment.first) * segment.group + column;
    float v = 0;
#pragma unroll
    for (int j = 0; j < kChainWarps; ++j) v += part[i * stride(R) + (j << shift) + at];
    const float other = __shfl_xor_sync(0xffffffffu, v, 4, kChainColumns);  // all lanes: their groups may differ
    if (segment.group == 4) v += other;
    if (turn >= groups || column >= segment.group || n >= segment.rows) return;
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
  // Where a row is one chunk, and of the kernel's type (a form for each type would be more code): what the lane
  // multiplies with.
  uint4 x[kChainTurns];

  // The two q of a row of x, 2 r and 2 r + 1 (multiply), have different pieces, and so have neighbouring rows, which
  // read different banks: of 4 rows each has one half of the pieces in its first, the other in its second place; of 8,
  // neighbouring warps have each other's for the odd rows.
  __device__ void begin(const ChainProduct& link, int group, uint32_t places, uint32_t x_shared, uint32_t sums) {
    segment = &segment_of(link, group);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int R = link.R, rows = segment->group;
    const auto piece = [&](int set) { return rows == 4 ? 2 * warp + set : warp ^ set; };
    const int w_set = rows == 4 ? g / 4 ^ g % 2 : g % 2, x_piece = piece(g / 2 % 2);
    eight = segment->weight != Weight::bf16;
    const int per_byte = eight ? 2 : 1;  // bytes of x to one of weights
    from = segment->first, to = from + (segment->rows + rows - 1 >> (rows == 4 ? 2 : 3));
    row_bytes = link.K << !eight, chunk = segment->chunk;
    stride = (rows == 4 ? 2 * kChainWarps : kChainWarps) * kChainPiece;
    w_piece = piece(w_set);
    w = places + (g & (rows - 1)) * chunk + w_piece * kChainPiece + t * 16;
    // Columns beyond the last row of x take some row's values; nobody reads their sums.
    x_at = x_shared + (eight ? link.half_at : 0) +
           ((link.inputs > 1 ? segment->input * R : 0) + min(g / 4, R - 1)) * link.x_stride +
           (x_piece * kChainPiece + t * 16 + g % 2 * 8) * per_byte;
    out = t / 2 < R && t % 2 == w_set ? sums + ((warp * R + t / 2) * kChainColumns + g) * 4 : 0;
    kept = eight == (kEight != Weight::bf16) && chunk == row_bytes;
    if (!kept) return;
#pragma unroll
    for (int j = 0; j < kChainTurns; ++j) x[j] = x_piece_at<kEight>(x_at + j * stride * per_byte);
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
    return int(shared4(ring.group(at.slot)));
  }

  // The lane's part of the sums of a group whose first chunk is there. kKept: which is all of it.
  template <Weight kW, bool kKept, Weight kEight>
  __device__ float take_group(TakenRows<kEight>& rows) {
    constexpr int kPerByte = kW == Weight::bf16 ? 1 : 2;
    float sum[2][2][4] = {};
    for (int byte = 0;;) {
      const int bytes = kKept ? rows.row_bytes : min(rows.chunk, rows.row_bytes - byte);
      // Behind the row's last piece, which a lane then takes again, x is zeros. (So an infinite weight in that piece
      // may give a NaN where infinity was due.)
      const uint32_t w = rows.w + at.slot * kChainSlot, last = w + bytes - (rows.w_piece + 1) * kChainPiece;
      uint4 v[kChainTurns], y[kChainTurns];
#pragma unroll
      for (int j = 0; j < kChainTurns; ++j) {
        v[j] = shared16(min(w + j * rows.stride, last));
        y[j] = kKept ? rows.x[j] : x_piece_at<kW>(rows.x_at + (byte + j * rows.stride) * kPerByte);
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
      int groups = 0, until = threadIdx.x / 32;  // groups until the warp has to begin one
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
        if (rows.out) store_shared4(rows.out + sums, __float_as_uint(sum));
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
  const Ring ring{x_shared + a.x_bytes, held(shared_address(&ring_shared)), a.slots};
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

  Taker taker{parts, taken, ring, x_shared, held(shared_address(parts.part))};
  for (int i = 0; i < a.links; ++i) {
    const ChainLink& here = read_link(i % 3);
    if (tid < 32) reader.store(read_link((i + 1) % 3)), reader.load(i + 2);
    if (here.is_kda) {
      take_heads<kEight>(here.kda, heads);
      chain_sync();
    } else if (int(blockIdx.x) < here.product.skipped) {
      chain_sync();
    } else {
      XShared<kEight>(here.product, shared, taken).take();
      taker.take<kEight>(here.product);
    }
  }
#endif
}

}  // namespace kda::cuda
