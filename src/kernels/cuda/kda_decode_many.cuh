// kernels/cuda/kda_decode_many.cuh — kda_decode for at least as many heads as multiprocessors; sm_90, K = V = 128.
//
// Reading and writing of states must go on all the time at the device's full rate. A block begins with two heads by its
// number, of all sequences' heads, and then draws tickets for more, as late as it can: what is read at one time lies
// side by side, and blocks that are served slower take fewer. States pass through a ring of pieces of 32 rows in shared
// memory: the copy engine brings a piece, eight warps turn its rows into the new ones, four rows each, and the copy
// engine takes it back. Four more warps find q, k, decay and v of the next head meanwhile and finish the head before;
// one thread asks for the states, a ring ahead. Every sum has the order that it has in kda_decode_kernel: the same
// bits.
#pragma once
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/kda_decode_kernel.cuh"

namespace kda::cuda {

inline constexpr int kManyWidth = 128, kManyRows = 32, kManyRing = 8, kManyThreads = 13 * 32;
inline constexpr int kManyBytes = kManyRows * kManyWidth * 4;  // of a piece
inline constexpr int kManyAhead = 6;  // pieces fetched before the previous launch has ended; more evict each other

// What the eight warps need of a head, and what they leave.
struct alignas(16) ManyHead {
  float q[kManyWidth], k[kManyWidth], decay[kManyWidth], v[kManyWidth], o[kManyWidth];
  float sums[kManyWidth / 4];  // of the squares of four values of o each
  float beta;
  int h, in, out;  // in: a slot, -1 for zeros, or kNoHead after the last one
};
inline constexpr int kNoHead = -2;

// A block's heads, of all sequences: number j lies at j % kPlaces, from the thread that asks for states to those that
// find the vectors. There are more places than the one can be ahead of the others.
struct ManyItems {
  static constexpr int kPlaces = 8;
  uint64_t given[kPlaces];  // barriers
  int item[kPlaces];
};

inline constexpr size_t kManyShared =
    128 + size_t(kManyRing) * (kManyBytes + 16) + 2 * sizeof(ManyHead) + 4 * 8 + sizeof(ManyItems);

// ticket: zero, and left so.
__global__ void __launch_bounds__(kManyThreads, 1)
    kda_decode_many_kernel(const __grid_constant__ KdaDecodeArgs a, unsigned* ticket) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int K = kManyWidth, kRing = kManyRing, kPieces = K / kManyRows, kPlaces = ManyItems::kPlaces;
  static_assert(kRing / kPieces + 2 < kPlaces);
  constexpr bool kOneArrives = kWarpArrivals == 1;  // one thread tells that a place is empty; all 256 for racecheck
  extern __shared__ uint8_t raw[];
  uint8_t* const ring = raw + (128 - hopper::shared_address(raw) % 128) % 128;
  ManyHead* const heads = reinterpret_cast<ManyHead*>(ring + kRing * kManyBytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(heads + 2);
  uint64_t *const empty = full + kRing, *const ready = empty + kRing, *const done = ready + 2;
  ManyItems& items = *reinterpret_cast<ManyItems*>(done + 2);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRing; ++s) init_barrier(full + s, 1), init_barrier(empty + s, kOneArrives ? 1 : 256);
    for (int s = 0; s < 2; ++s) init_barrier(ready + s, 4 * kWarpArrivals), init_barrier(done + s, 8 * kWarpArrivals);
    for (int s = 0; s < kPlaces; ++s) init_barrier(items.given + s, 1);
    barriers_made();
  }
  __syncthreads();
  const int64_t H = a.H, channels = 3 * H * K;
  const int total = a.N * a.H, blocks = int(gridDim.x), first_item = int(blockIdx.x);
  const auto known = [](const int32_t* p) { return int(*reinterpret_cast<const volatile int32_t*>(p)); };
  const auto slot_of = [&](int item) { return known(a.in + item / a.H); };
  // Before the previous launch has ended, the slots are only a guess.
  const auto guess_of = [&](int item) {
    const int slot = slot_of(item);
    return slot >= 0 && slot < a.slots ? slot : -1;
  };
  if (warp == 12) {  // ---- asks for states
    if (lane != 0) return;
    const auto place = [&](int64_t slot, int item, int piece) {
      return a.state + ((slot * H + item % a.H) * K + piece * kManyRows) * K;
    };
    for (int p = 0; p < kManyAhead; ++p) {
      const int item = first_item + p / kPieces * blocks, guess = item < total ? guess_of(item) : -1;
      if (guess >= 0) prefetch_l2(place(guess, item, p % kPieces), kManyBytes);
    }
    wait_for_previous();
    const auto give = [&](int j, int item) {
      items.item[j % kPlaces] = item;
      arrive(items.given + j % kPlaces);
    };
    int item = first_item, next = first_item + blocks, in = slot_of(item), next_in = next < total ? slot_of(next) : -1;
    give(0, item), give(1, next);
    int stage = 0;
    uint32_t phase = 1;
    for (int j = 0; item < total; ++j) {
      for (int piece = 0; piece < kPieces; ++piece) {
        wait_barrier(empty + stage, phase);
        if (in >= 0) {
          expect_bytes(full + stage, kManyBytes);
          load_bytes(ring + stage * kManyBytes, place(in, item, piece), kManyBytes, full + stage);
        } else {
          arrive(full + stage);
        }
        if (++stage == kRing) stage = 0, phase ^= 1;
        // A block that had a second head draws until it is given none, which makes total - blocks draws in all: the
        // last of them leaves zero.
        if (j > 0 && piece == 0) next = 2 * blocks + int(atomicInc(ticket, unsigned(total - blocks - 1)));
        if (j > 0 && piece == 1) give(j + 1, next), next_in = next < total ? slot_of(next) : -1;
      }
      item = next, in = next_in;
    }
    release_next();
    return;
  }

  if (warp >= 8) {  // ---- vectors of the heads: a thread has a channel of each
    const int c = int(threadIdx.x) - 256;
    struct Raw {
      ConvChannel q, k, v;
      __nv_bfloat16 f, g, b;
      int item, in, out;
      float4 q_taps, k_taps, v_taps;
      float A, dt, g_bias;
    } next{};
    const auto load_weights = [&](Raw& r) {
      const int64_t h = r.item % a.H;
      r.q_taps = reinterpret_cast<const float4*>(a.q_conv)[h * K + c];
      r.k_taps = reinterpret_cast<const float4*>(a.k_conv)[h * K + c];
      r.v_taps = reinterpret_cast<const float4*>(a.v_conv)[h * K + c];
      r.A = a.A_log[h], r.dt = a.dt_bias[h * K + c], r.g_bias = a.g_bias[h * K + c];
    };
    const auto load_token = [&](Raw& r) {
      const int64_t at = int64_t(r.item) * K + c;
      r.q.load_new(a.q + at), r.k.load_new(a.k + at), r.v.load_new(a.v + at);
      r.f = __ldcg(a.f + at), r.g = __ldcg(a.g + at), r.b = __ldcg(a.b + r.item);
    };
    const auto load_windows = [&](Raw& r) {
      const int64_t h = r.item % a.H;
      r.q.load_past(a, r.in, channels, h * K + c);
      r.k.load_past(a, r.in, channels, (H + h) * K + c);
      r.v.load_past(a, r.in, channels, (2 * H + h) * K + c);
    };
    const auto fetch = [&](int j, Raw& r) {
      wait_barrier(items.given + j % kPlaces, uint32_t(j / kPlaces % 2));
      r.item = items.item[j % kPlaces];
      if (r.item >= total) return;
      r.in = slot_of(r.item), r.out = known(a.out + r.item / a.H);
      load_weights(r), load_token(r), load_windows(r);
    };
    const float o_weight = a.o_norm[c];
    // Finds the vectors of head number j, whose values are in `next`, and asks for those of the head after it. Returns
    // which head it is; from `total` on there is none.
    const auto prepare = [&](int j, float& gate) -> int {
      const Raw r = next;
      ManyHead& to_head = heads[j % 2];
      if (r.item >= total) {
        if (c == 0) to_head.in = kNoHead;
        warp_arrive(shared_address(ready + j % 2));
        return r.item;
      }
      to_head.q[c] = r.q.silu(r.q_taps), to_head.k[c] = r.k.silu(r.k_taps), to_head.v[c] = r.v.silu(r.v_taps);
      to_head.decay[c] = decay_of(a.gate, expf(r.A), __bfloat162float(r.f) + r.dt);
      const int64_t h = r.item % a.H;
      if (c == 0) {
        to_head.beta = a.gate.beta_scale * sigmoid(__bfloat162float(r.b));
        to_head.h = int(h), to_head.in = max(r.in, -1), to_head.out = r.out;
      }
      warp_arrive(shared_address(ready + j % 2));
      fetch(j + 1, next);
      gate = o_weight * sigmoid(__bfloat162float(r.g) + r.g_bias);
      r.q.store(a, r.out, channels, h * K + c);
      r.k.store(a, r.out, channels, (H + h) * K + c);
      r.v.store(a, r.out, channels, (2 * H + h) * K + c);
      return r.item;
    };
    next.item = first_item, next.in = guess_of(first_item);
    load_weights(next);
    if (lane < 3 * 3 && next.in >= 0)
      prefetch_l2(a.window + (int64_t(next.in) * 3 + lane / 3) * channels + (lane % 3 * H + first_item % a.H) * K + c -
                  lane);
    wait_for_previous();
    const int in = slot_of(first_item);
    next.out = known(a.out + first_item / a.H);
    load_token(next), load_windows(next);
    if (in != next.in) next.in = in, load_windows(next);
    float gate = 0, next_gate = 0;
    int item = prepare(0, gate);
    for (int j = 0; item < total; ++j) {
      const int next_item = prepare(j + 1, next_gate);
      wait_barrier(done + j % 2, uint32_t(j / 2 % 2));
      const float y = heads[j % 2].o[c] * norm_factor<K>(heads[j % 2].sums, a.eps) * gate;
      a.y[int64_t(item) * K + c] = __float2bfloat16_rn(y);
      gate = next_gate, item = next_item;
    }
    return;
  }

  // ---- the recurrence: eight lanes to a row
  wait_for_previous();
  int stage = 0, before = -1;
  uint32_t phase = 0;
  for (int j = 0;; ++j) {
    ManyHead& head = heads[j % 2];
    wait_barrier(ready + j % 2, uint32_t(j / 2 % 2));
    const int in = head.in, out = head.out;
    if (in == kNoHead) break;
    const float beta = head.beta;
    float* const to_head = a.state + (int64_t(out < 0 ? 0 : out) * H + head.h) * K * K;
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      const int row = warp * 4 + lane / 8, v_row = piece * kManyRows + row, first = lane % 8 * 4;
      float* const mine = reinterpret_cast<float*>(ring + stage * kManyBytes) + row * K + first;
      wait_barrier(full + stage, phase);
      float4 S[1][K / 32];
#pragma unroll
      for (int p = 0; p < K / 32; ++p) S[0][p] = in >= 0 ? *reinterpret_cast<const float4*>(mine + p * 32) : float4{};
      float o[1];
      step_rows(
          S, head.decay, head.k, head.q, first, beta, [&](int) { return head.v[v_row]; },
          [&](int, int p) { *reinterpret_cast<float4*>(mine + p * 32) = S[0][p]; }, o);
      publish_to_copy_engine();
      sync_some(3, 256);
      if (threadIdx.x == 0) {
        if (out >= 0) store_bytes(to_head + piece * kManyRows * K, ring + stage * kManyBytes, kManyBytes);
        commit_stores();
        wait_stores_read_but<1>();
      }
      // The piece before has left: its place may be filled again.
      if (before >= 0 && (threadIdx.x == 0 || !kOneArrives)) arrive(empty + before);
      before = stage;
      if (++stage == kRing) stage = 0, phase ^= 1;
      const float sum = four_rows_total(o[0] * o[0]);
      if (lane % 8 == 0) head.o[v_row] = o[0];
      if (lane == 0) head.sums[v_row / 4] = sum;
    }
    warp_arrive(shared_address(done + j % 2));
  }
  if (threadIdx.x == 0) wait_stores_read();
#endif
}

}  // namespace kda::cuda
