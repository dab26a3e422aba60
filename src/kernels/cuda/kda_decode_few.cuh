// kernels/cuda/kda_decode_few.cuh — kda_decode for few heads: a cluster of four blocks has one; sm_90, K = V = 128.
//
// Here a step is a chain of waits, not a matter of bandwidth, so each wait is made short. Eight warps of a block have
// 32 rows of the state, one to eight lanes, and a channel of q or k to a thread; four find the decay meanwhile; one v,
// beta and the gate of y. There is one barrier of the block. What the blocks exchange for the norm, each four rows' sum
// of squares, a warp sends to all four of them, where an mbarrier counts the bytes: the only wait after the state.
//
// Before the previous launch has ended nothing of its making may be read, the slots neither. They are read before it
// anyway, as a guess: to have the states in the second-level cache, and to ask for them at once when the wait is over.
// Whether the guess was right is seen when the loads have been issued; if not, they are issued again.
#pragma once
#include "kernels/cuda/kda_decode_kernel.cuh"

namespace kda::cuda {

inline constexpr int kFewWidth = 128, kFewShare = 4, kFewRows = kFewWidth / kFewShare;
inline constexpr int kFewThreads = 8 * kFewRows + kFewWidth + 32;

// p is found here, and not where it is first used, behind a wait.
template <class T>
__device__ inline void keep_here(T*& p) {
  asm volatile("" : "+l"(p));
}

__global__ void __launch_bounds__(kFewThreads, 2) kda_decode_few_kernel(const __grid_constant__ KdaDecodeArgs a) {
#if __CUDA_ARCH__ >= 900
  constexpr int K = kFewWidth;
  __shared__ __align__(16) float qk[2][K], decay[K], sums[K / 4], v[kFewRows], y_gate[kFewRows];
  __shared__ float beta_shared;
  __shared__ __align__(8) uint64_t all_sums;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int H = a.H, channels = 3 * H * K, head = int(blockIdx.x) / kFewShare, share = int(blockIdx.x) % kFewShare;
  const int n = head / H, h = head - n * H;  // heads are few: so are their values
  const int64_t per_slot = int64_t(H) * K * K, per_window = 3 * channels;
  release_next();
  const uint32_t barrier = shared_address(&all_sums);
  if (tid == 0) barrier_init(barrier, 1), barriers_made(), barrier_expect(barrier, sizeof sums);
  __syncthreads();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");

  struct Slots {
    int in, out;
  };
  const auto slots = [&]() -> Slots {
    return {reinterpret_cast<const volatile int32_t*>(a.in)[n], reinterpret_cast<const volatile int32_t*>(a.out)[n]};
  };
  const auto possible = [&](int slot) { return slot >= 0 && slot < a.slots ? slot : -1; };
  Slots slot = slots();
  slot = {possible(slot.in), possible(slot.out)};
  // find() makes addresses of the slots, load() loads from them. Returns when every block of the cluster has begun and
  // the previous launch has ended, with loads under way by the slots as they are: as guessed, or else once more.
  const auto begin = [&](auto find, auto load) {
    find();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    wait_for_previous();
    const Slots now = slots();
    load();
    if (now.in != slot.in || now.out != slot.out) slot = now, find(), load();
  };
  const auto wait_for_sums = [&] { barrier_wait(barrier, 0); };

  if (warp < 8) {  // ---- rows of the state, and a channel of q or k
    const int role = tid / K, c = tid % K, row = share * kFewRows + tid / 8, first = tid % 8 * 4;
    const float4 taps = reinterpret_cast<const float4*>(role ? a.k_conv : a.q_conv)[h * K + c];
    const int rows = (h * K + share * kFewRows) * K, piece = (h * K + row) * K + first;
    const int channel = (role * H + h) * K + c, at = head * K;
    if (slot.in >= 0) {
      if (tid < kFewRows * K / 32) prefetch_l2(a.state + slot.in * per_slot + rows + tid * 32);
      if (lane < 3) prefetch_l2(a.window + slot.in * per_window + lane * channels + channel - lane);
    }
    uint32_t there, sum_there;  // a lane sends to one of the blocks
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(lane % kFewShare));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(sum_there)
        : "r"(shared_address(sums + row / 4)), "r"(lane % kFewShare));
    const __nv_bfloat16* const token = (role ? a.k : a.q) + at + c;
    __nv_bfloat16* const y = a.y + at + row;
    float4 S[1][K / 32];
    ConvChannel x;
    const float* from;
    float* to;
    const __nv_bfloat16* past;
    begin(
        [&] {
          from = a.state + slot.in * per_slot + piece, to = a.state + slot.out * per_slot + piece;
          past = a.window + slot.in * per_window + channel;
          keep_here(from), keep_here(to), keep_here(past);
        },
        [&] {
          x.load_new(token);
          x.load_past(past, slot.in, channels);
#pragma unroll
          for (int p = 0; p < K / 32; ++p)
            S[0][p] = slot.in >= 0 ? __ldcs(reinterpret_cast<const float4*>(from + p * 32)) : float4{};
        });
    qk[role][c] = x.silu(taps);
    __syncthreads();
    float o[1];
    step_rows(
        S, decay, qk[1], qk[0], first, beta_shared, [&](int) { return v[row % kFewRows]; }, [](int, int) {}, o);
    const float sum = four_rows_total(o[0] * o[0]), gate = y_gate[row % kFewRows];
    if (lane < kFewShare)
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(sum_there),
                   "r"(__float_as_int(sum)), "r"(there)
                   : "memory");
    if (slot.out >= 0)
#pragma unroll
      for (int p = 0; p < K / 32; ++p) __stcs(reinterpret_cast<float4*>(to + p * 32), S[0][p]);
    wait_for_sums();
    if (tid % 8 == 0) *y = __float2bfloat16_rn(o[0] * norm_factor<K>(sums, a.eps) * gate);
    if (share == 0) x.store(a, slot.out, channels, channel);  // the sums tell that all blocks have read it
    return;
  }

  if (warp < 12) {  // ---- the decay
    const int c = tid - 8 * kFewRows;
    const float dt = a.dt_bias[h * K + c], A = expf(a.A_log[h]);
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    wait_for_previous();
    decay[c] = decay_of(a.gate, A, __bfloat162float(__ldcg(a.f + head * K + c)) + dt);
    __syncthreads();
    return wait_for_sums();  // a block stays while others send to it
  }

  // ---- v, the gate of y, beta
  const int row = share * kFewRows + lane;
  const int at = head * K + row, channel = (2 * H + h) * K + row;
  const float4 taps = reinterpret_cast<const float4*>(a.v_conv)[h * K + row];
  const float g_bias = a.g_bias[h * K + row], weight = a.o_norm[row];
  ConvChannel x;
  float g, b;
  const __nv_bfloat16* past;
  begin([&] { past = a.window + slot.in * per_window + channel, keep_here(past); },
        [&] {
          x.load_new(a.v + at), g = __bfloat162float(__ldcg(a.g + at)), b = __bfloat162float(__ldcg(a.b + head));
          x.load_past(past, slot.in, channels);
        });
  v[lane] = x.silu(taps);
  y_gate[lane] = weight * sigmoid(g + g_bias);
  if (lane == 0) beta_shared = a.gate.beta_scale * sigmoid(b);
  __syncthreads();
  x.store(a, slot.out, channels, channel);
  wait_for_sums();
#endif
}

}  // namespace kda::cuda
