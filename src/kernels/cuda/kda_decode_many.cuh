// kernels/cuda/kda_decode_many.cuh — kda_decode for at least as many heads as multiprocessors; sm_90, K = V = 128.
//
// Reading and writing of states must go on all the time at the device's full rate. A block takes every gridDim-th head
// (of all sequences), so that what is read at one time lies side by side; states pass through a ring of pieces of 32
// rows in shared memory: the copy engine brings a piece, eight warps turn its rows into the new ones, four rows each,
// and the copy engine takes it back. Four more warps find q, k, decay and v of the next head meanwhile and finish the
// head before; one thread asks for the states, a ring ahead. Every sum has the order that it has in kda_decode_kernel:
// the same bits.
#pragma once
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/kda_decode_kernel.cuh"

namespace kda::cuda {

inline constexpr int kManyWidth = 128, kManyRows = 32, kManyRing = 12, kManyThreads = 13 * 32;
inline constexpr int kManyBytes = kManyRows * kManyWidth * 4;  // of a piece

// What the eight warps need of a head.
struct alignas(16) ManyHead {
  float q[kManyWidth], k[kManyWidth], decay[kManyWidth], v[kManyWidth], o[kManyWidth];
  float q_scale, k_scale, beta;
  int in, out;  // slots
};

inline constexpr size_t kManyShared =
    128 + size_t(kManyRing) * kManyBytes + 2 * sizeof(ManyHead) + 16 * kManyRing + 4 * 8;

__global__ void __launch_bounds__(kManyThreads, 1) kda_decode_many_kernel(const __grid_constant__ KdaDecodeArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr int K = kManyWidth, kRing = kManyRing, kPieces = K / kManyRows;
  extern __shared__ uint8_t raw[];
  uint8_t* const ring = raw + (128 - hopper::shared_address(raw) % 128) % 128;
  ManyHead* const heads = reinterpret_cast<ManyHead*>(ring + kRing * kManyBytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(heads + 2);
  uint64_t *const empty = full + kRing, *const ready = empty + kRing, *const done = ready + 2;
  __shared__ float q_sums[2][4], k_sums[2][4], o_sums[2][4];  // by turns: the head before may still be read
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRing; ++s) init_barrier(full + s, 1), init_barrier(empty + s, 1);
    for (int s = 0; s < 2; ++s) init_barrier(ready + s, 4), init_barrier(done + s, 8);
    barriers_made();
  }
  __syncthreads();
  const int64_t H = a.H, channels = 3 * H * K;
  const int count = int((int64_t(a.N) * H - blockIdx.x + gridDim.x - 1) / gridDim.x);
  struct Item {
    int64_t n, h;
  };
  const auto item = [&](int j) -> Item {
    const int i = j * int(gridDim.x) + int(blockIdx.x);
    return {i / a.H, i % a.H};
  };
  const auto known = [](const int32_t* p) { return int64_t(*reinterpret_cast<const volatile int32_t*>(p)); };
  if (warp == 12) {  // ---- asks for states
    if (lane != 0) return;
    const auto place = [&](int64_t slot, int64_t h, int piece) {
      return a.state + ((slot * H + h) * K + piece * kManyRows) * K;
    };
    for (int p = 0; p < kRing && p / kPieces < count; ++p) {  // which slot is only a guess yet
      const Item it = item(p / kPieces);
      const int64_t guess = known(a.in + it.n);
      if (guess >= 0 && guess < a.slots) prefetch_bytes(place(guess, it.h, p % kPieces), kManyBytes);
    }
    wait_for_previous();
    int stage = 0;
    uint32_t phase = 1;
    for (int j = 0; j < count; ++j) {
      const Item it = item(j);
      const int64_t in = known(a.in + it.n);
      for (int piece = 0; piece < kPieces; ++piece) {
        wait_barrier(empty + stage, phase);
        if (in >= 0) {
          expect_bytes(full + stage, kManyBytes);
          load_bytes(ring + stage * kManyBytes, place(in, it.h, piece), kManyBytes, full + stage);
        } else {
          arrive(full + stage);
        }
        if (++stage == kRing) stage = 0, phase ^= 1;
      }
    }
    release_next();
    return;
  }

  if (warp >= 8) {  // ---- vectors of the heads: a thread has a channel of each
    const int c = int(threadIdx.x) - 256;
    if (lane < 3 * 3) {  // the first head's windows, of the slot that is only a guess yet
      const Item it = item(0);
      const int64_t guess = known(a.in + it.n);
      if (guess >= 0 && guess < a.slots)
        prefetch_l2(a.window + (guess * 3 + lane / 3) * channels + (lane % 3 * H + it.h) * K + c - lane);
    }
    wait_for_previous();
    struct Raw {
      ConvChannel q, k, v;
      __nv_bfloat16 f, g, b;
      int in, out;
      float4 q_taps, k_taps, v_taps;
      float A, dt, g_bias;
    } next{};
    const auto fetch = [&](int j, Raw& r) {
      const auto [n, h] = item(j);
      const int64_t at = (n * H + h) * K + c;
      r.q_taps = reinterpret_cast<const float4*>(a.q_conv)[h * K + c];
      r.k_taps = reinterpret_cast<const float4*>(a.k_conv)[h * K + c];
      r.v_taps = reinterpret_cast<const float4*>(a.v_conv)[h * K + c];
      r.A = a.A_log[h], r.dt = a.dt_bias[h * K + c], r.g_bias = a.g_bias[h * K + c];
      r.in = int(known(a.in + n)), r.out = int(known(a.out + n));
      r.q.load_past(a, r.in, channels, h * K + c), r.q.load_new(a.q + at);
      r.k.load_past(a, r.in, channels, (H + h) * K + c), r.k.load_new(a.k + at);
      r.v.load_past(a, r.in, channels, (2 * H + h) * K + c), r.v.load_new(a.v + at);
      r.f = a.f[at], r.g = a.g[at], r.b = a.b[n * H + h];
    };
    const float o_weight = a.o_norm[c];
    // Finds the vectors of head number j, whose values are in `next`; asks for those of the head after it.
    const auto prepare = [&](int j, float& gate) {
      const int64_t h = item(j).h;
      const Raw r = next;
      if (j + 1 < count) fetch(j + 1, next);
      ManyHead& to_head = heads[j % 2];
      const float q = r.q.silu(r.q_taps), k = r.k.silu(r.k_taps);
      to_head.q[c] = q, to_head.k[c] = k, to_head.v[c] = r.v.silu(r.v_taps);
      to_head.decay[c] = decay_of(a.gate, expf(r.A), __bfloat162float(r.f) + r.dt);
      const float qq = warp_total(q * q), kk = warp_total(k * k);
      if (lane == 0) q_sums[j % 2][warp - 8] = qq, k_sums[j % 2][warp - 8] = kk;
      sync_some(2, 128);
      if (c == 0) {
        float q_total = 0, k_total = 0;
        for (int w = 0; w < 4; ++w) q_total += q_sums[j % 2][w], k_total += k_sums[j % 2][w];
        to_head.k_scale = rsqrtf(k_total + kL2NormEps);
        to_head.q_scale = rsqrtf(q_total + kL2NormEps) / sqrtf(float(K));
        to_head.beta = a.gate.beta_scale * sigmoid(__bfloat162float(r.b));
        to_head.in = r.in, to_head.out = r.out;
      }
      __syncwarp();
      if (lane == 0) arrive(ready + j % 2);
      gate = sigmoid(__bfloat162float(r.g) + r.g_bias);
      r.q.store(a, r.out, channels, h * K + c);
      r.k.store(a, r.out, channels, (H + h) * K + c);
      r.v.store(a, r.out, channels, (2 * H + h) * K + c);
    };
    float gate = 0, next_gate = 0;
    fetch(0, next);
    prepare(0, gate);
    for (int j = 0; j < count; ++j) {
      if (j + 1 < count) prepare(j + 1, next_gate);
      wait_barrier(done + j % 2, uint32_t(j / 2 % 2));
      const float o = heads[j % 2].o[c], oo = warp_total(o * o);
      if (lane == 0) o_sums[j % 2][warp - 8] = oo;
      sync_some(2, 128);
      float sum = 0;
      for (int w = 0; w < 4; ++w) sum += o_sums[j % 2][w];
      const float y = o * (1.0f / sqrtf(sum / float(K) + a.eps)) * o_weight * gate;
      const auto [n, h] = item(j);
      a.y[(n * H + h) * K + c] = __float2bfloat16_rn(y);
      gate = next_gate;
    }
    return;
  }

  // ---- the recurrence: eight lanes to a row
  wait_for_previous();
  int stage = 0, before = -1;
  uint32_t phase = 0;
  for (int j = 0; j < count; ++j) {
    ManyHead& head = heads[j % 2];
    wait_barrier(ready + j % 2, uint32_t(j / 2 % 2));
    const float k_scale = head.k_scale, q_scale = head.q_scale, beta = head.beta;
    const int in = head.in, out = head.out;
    float* const to_head = a.state + (int64_t(out < 0 ? 0 : out) * H + item(j).h) * K * K;
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      const int row = warp * 4 + lane / 8, v_row = piece * kManyRows + row, first = lane % 8 * 4;
      float* const mine = reinterpret_cast<float*>(ring + stage * kManyBytes) + row * K + first;
      wait_barrier(full + stage, phase);
      float4 s[4];
      float dot = 0, read = 0;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        s[p] = in >= 0 ? *reinterpret_cast<const float4*>(mine + p * 32) : float4{};
        const float4 d4 = *reinterpret_cast<const float4*>(head.decay + p * 32 + first);
        const float4 k4 = *reinterpret_cast<const float4*>(head.k + p * 32 + first);
        s[p].x *= d4.x, s[p].y *= d4.y, s[p].z *= d4.z, s[p].w *= d4.w;
        dot = fmaf(s[p].x, k4.x, dot), dot = fmaf(s[p].y, k4.y, dot);
        dot = fmaf(s[p].z, k4.z, dot), dot = fmaf(s[p].w, k4.w, dot);
      }
      for (int m = 4; m; m >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, m);
      const float u = beta * (head.v[v_row] - dot * k_scale) * k_scale;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float4 k4 = *reinterpret_cast<const float4*>(head.k + p * 32 + first);
        const float4 q4 = *reinterpret_cast<const float4*>(head.q + p * 32 + first);
        s[p].x = fmaf(u, k4.x, s[p].x), s[p].y = fmaf(u, k4.y, s[p].y);
        s[p].z = fmaf(u, k4.z, s[p].z), s[p].w = fmaf(u, k4.w, s[p].w);
        read = fmaf(s[p].x, q4.x, read), read = fmaf(s[p].y, q4.y, read);
        read = fmaf(s[p].z, q4.z, read), read = fmaf(s[p].w, q4.w, read);
        *reinterpret_cast<float4*>(mine + p * 32) = s[p];
      }
      publish_to_copy_engine();
      sync_some(3, 256);
      if (threadIdx.x == 0) {
        if (out >= 0) store_bytes(to_head + piece * kManyRows * K, ring + stage * kManyBytes, kManyBytes);
        commit_stores();
        wait_stores_read_but<1>();  // the piece before has left: its place may be filled again
        if (before >= 0) arrive(empty + before);
      }
      before = stage;
      if (++stage == kRing) stage = 0, phase ^= 1;
      for (int m = 4; m; m >>= 1) read += __shfl_xor_sync(0xffffffffu, read, m);
      if (lane % 8 == 0) head.o[v_row] = read * q_scale;
    }
    __syncwarp();
    if (lane == 0) arrive(done + j % 2);
  }
  if (threadIdx.x == 0) wait_stores_read();
#endif
}

}  // namespace kda::cuda
