// The part of the chunked forward pass that goes from chunk to chunk. A warp keeps 16 rows of a state in registers, as
// the accumulators of its update; rounded to fp16 they are the A operand of the products with W and Q^, and what those
// give is the A operand of the next: nothing of a step goes through shared memory but what the chunk brings.
#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_prefill.cuh"
#include "kernels/cuda/kda_prefill_group.cuh"
#include "kernels/cuda/kda_prefill_tokens.cuh"

namespace kda::cuda::prefill {
namespace {

// Bytes of a chunk that one block of so many warps needs. u: the block's rows of U0 and their scales.
template <int K, int warps, bool summary>
struct Stage {
  static constexpr int common = summary ? int(Record<K>::summary) : int(Record<K>::u);
  static constexpr int u = common, scale = u + warps * 2048, bytes = scale + 1024;
};
template <int K, int warps, bool summary>
constexpr int shared_bytes(int stages) {
  return Stage<K, warps, summary>::bytes * stages + 1024;  // a tile begins at a multiple of 1024
}

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
// Where no warpgroup multiplies, a warp for itself: d[16,64] += a[16,16] b[16,64], 16 of the columns that b has as
// rows.
__device__ inline void warp_rows(float (&d)[8][4], const uint32_t (&a0)[4], const uint32_t (&a1)[4], uint32_t tiles,
                                 int step, int lane, int from = 0) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < from) continue;
    uint32_t b[4];
    ldmatrix(b, tiles + tile_at(8 * j + (lane & 7), 4 * step + (lane >> 3)));
    mma(d[j], a0, b[0], b[1]);
    mma(d[j], a1, b[2], b[3]);
  }
}
#endif

// One block: warps * 16 rows of a state, one head, one sequence or segment of one.
// summary: no outputs; rows from V on are the identity's and take no part in v.
template <int K, int kWarps, bool summary>
__global__ void __launch_bounds__(kWarps * 32, 1) scan_kernel(const Args a, const int stages) {
  using G = Stage<K, kWarps, summary>;
  using R = Record<K>;
  constexpr int NT = K / 8;  // tiles of 8 channels
  extern __shared__ __align__(1024) char unaligned[];
  char* const shared = unaligned + (-shared_address(unaligned) & 1023);
  const int tid = int(threadIdx.x), w = tid >> 5, lane = tid & 31, g = lane >> 2, tq = lane & 3;
  const int V = a.V, H = a.H, h = int(blockIdx.y), row0 = int(blockIdx.x) * kWarps * 16 + w * 16;
  const int n = a.first + int(blockIdx.z) / a.segments, segment = int(blockIdx.z) % a.segments;
  const Range range = range_of(a, n);
  const bool identity = summary && row0 >= V;

  // This segment's chunks. A sequence without tokens hands its state on.
  const int64_t length = (range.to - range.from + a.segments - 1) / a.segments;
  const int64_t from = min(range.from + segment * length, range.to), to = min(from + length, range.to);
  const bool empty = from >= to;
  if (summary ? empty || (identity && segment == 0) || segment == a.segments - 1
              : empty && !(segment == 0 && range.chunks == 0))
    return;
  const int count = empty ? 0 : int(to - from);
  const int64_t bytes = R::bytes(V), stride = H * bytes;
  const char* const records = a.records + ((range.record + from - range.from) * H + h) * bytes;
  const int32_t token_start = a.start[n], tokens = a.start[n + 1] - token_start;

  // ---- chunks come through `stages` buffers
  const uint32_t base = shared_address(shared);
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t barriers[4];
  if (tid == 0) {
    for (int s = 0; s < stages; ++s) barrier_init(shared_address(barriers + s), 1);
    barriers_made();
  }
  __syncthreads();
#endif
  const auto fetch = [&](int chunk) {
    const int s = chunk % stages;
    const uint32_t into = base + s * G::bytes;
    const char* const r = records + chunk * stride;
    const char* const u = r + R::u + int64_t(blockIdx.x) * kWarps * 2048;
    const char* const scale = r + R::scale(V) + blockIdx.x * kWarps * 4;
#if __CUDA_ARCH__ >= 900
    if (tid == 0 && chunk < count) {
      const uint32_t barrier = shared_address(barriers + s);
      barrier_expect(barrier, G::common + (identity ? 0 : kWarps * 2048 + kWarps * 4));
      copy_bulk(into, r, G::common, barrier);
      if (!identity) {
        copy_bulk(into + G::u, u, kWarps * 2048, barrier);
        copy_bulk(into + G::scale, scale, kWarps * 4, barrier);
      }
    }
#else
    if (chunk < count) {
      for (int i = tid * 16; i < G::common; i += kWarps * 32 * 16) copy_async(into + i, r + i);
      if (!identity) {
        for (int i = tid * 16; i < kWarps * 2048; i += kWarps * 32 * 16) copy_async(into + G::u + i, u + i);
        if (tid < kWarps / 4) copy_async(into + G::scale + tid * 16, scale + tid * 16);
      }
    }
    copy_async_commit();
#endif
  };
  for (int i = 0; i < stages - 1; ++i) fetch(i);

  // ---- the state to start from
  float S[NT][4];
  {
    const float* source = nullptr;
    if (!identity) {
      if (segment > 0) {
        if (!summary)
          source = a.summaries + ((int64_t(n - a.first) * (a.segments - 1) + segment - 1) * H + h) * (V + K) * K;
      } else if (range.from > 0) {
        source = a.carry_in + int64_t(h) * V * K;
      } else if (a.in[n] >= 0) {
        source = a.state + (int64_t(a.in[n]) * H + h) * V * K;
      }
    }
    load_rows(S, source ? source + int64_t(row0) * K : nullptr, g, tq);
    if (identity) {
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[j][e] = row0 - V + g + 8 * (e >> 1) == 8 * j + 2 * tq + (e & 1) ? 1.0f : 0.0f;
    }
  }
  float power = 1;  // S holds the state times this power of two, so that fp16 can hold it
  const auto store = [&](float* at) { store_rows(at + int64_t(row0) * K, S, inverse(power), g, tq); };
  int mark = 0;
  if (!summary)
    while (mark < a.marks_n &&
           (a.marks[mark].sequence < n || (a.marks[mark].sequence == n && a.marks[mark].tokens <= from * kChunk)))
      ++mark;
  const float root = rsqrtf(float(K));
  float o[8][4] = {};       // O / s of a chunk times `power`, transposed: rows of v, columns of tokens
  uint32_t out[8][2] = {};  // o of the chunk before, not yet written
  __nv_bfloat16* to_o = nullptr;
  int left = 0;
  const auto write_o = [&] { write_rows(to_o, out, 8 * int64_t(H) * V, left); };

  for (int i = 0; i < count; ++i) {
    const int s = i % stages;
    fetch(i + stages - 1);  // into the buffer of the step before, which everyone is through with
#if __CUDA_ARCH__ >= 900
    barrier_wait(shared_address(barriers + s), uint32_t(i / stages) & 1);
#else
    if (stages == 3)
      copy_async_wait<2>();
    else
      copy_async_wait<1>();
    __syncthreads();
#endif
    const char* const buffer = shared + s * G::bytes;
    const uint32_t buffer_address = base + s * G::bytes;
    const auto after = [&] {
      if constexpr (!summary)
        if (mark < a.marks_n && a.marks[mark].sequence == n && a.marks[mark].tokens == (from + i + 1) * kChunk) {
          store(a.state + (int64_t(a.marks[mark].slot) * H + h) * V * K);
          ++mark;
        }
      __syncthreads();
    };

    // ---- S as the A operand
    uint32_t A[NT][2];
    const float unscale =
        *reinterpret_cast<const float*>(buffer + (identity ? TokenRecord<K>::sign : G::scale + 4 * w));
    if (round_rows(A, S, power, unscale)) {
      if (unscale == by_tokens()) {
        if (!summary) write_o();
        left = 0;
        const int64_t t = (from + i) * kChunk;
        take_tokens<K, !summary>(S, power, a, reinterpret_cast<const float*>(buffer + TokenRecord<K>::decays),
                                 reinterpret_cast<const float*>(buffer + TokenRecord<K>::in_e), token_start + t,
                                 int(min(int64_t(kChunk), tokens - t)), h, row0, !identity);
        after();
        continue;
      }
      fit_rows(A, S, power, unscale);
    }
    const auto a_of = [&](uint32_t(&x)[4], int step) {
      x[0] = A[2 * step][0], x[1] = A[2 * step][1], x[2] = A[2 * step + 1][0], x[3] = A[2 * step + 1][1];
    };

    // ---- U = U0 - S W^T, transposed: rows of v, columns of tokens
    float u[8][4];
    {
      const float by = unscale * power;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (!identity) bits = *reinterpret_cast<const uint4*>(buffer + G::u + ((w * 4 + x) * 32 + lane) * 16);
        const float2 p0 = half2_floats(bits.x), p1 = half2_floats(bits.y), p2 = half2_floats(bits.z),
                     p3 = half2_floats(bits.w);
        u[2 * x][0] = p0.x * by, u[2 * x][1] = p0.y * by, u[2 * x][2] = p1.x * by, u[2 * x][3] = p1.y * by;
        u[2 * x + 1][0] = p2.x * by, u[2 * x + 1][1] = p2.y * by, u[2 * x + 1][2] = p3.x * by;
        u[2 * x + 1][3] = p3.y * by;
      }
    }
    uint32_t U[8][2] = {};
    const auto u_of = [&](uint32_t(&x)[4], int step) {
      x[0] = U[2 * step][0], x[1] = U[2 * step][1], x[2] = U[2 * step + 1][0], x[3] = U[2 * step + 1][1];
    };
    const auto round_u = [&] {
#pragma unroll
      for (int j = 0; j < 8; ++j) U[j][0] = half2_bits(u[j][0], u[j][1]), U[j][1] = half2_bits(u[j][2], u[j][3]);
    };
    const auto decay = [&] {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float2 e = *reinterpret_cast<const float2*>(buffer + R::e + (8 * j + 2 * tq) * 4);
        S[j][0] *= e.x, S[j][1] *= e.y, S[j][2] *= e.x, S[j][3] *= e.y;
      }
    };
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint64_t tiles = tile(buffer_address);
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    float(&early)[4][4] = reinterpret_cast<float(&)[4][4]>(o[0]),
    (&late)[4][4] = reinterpret_cast<float(&)[4][4]>(o[4]);
    decay();
    group_begin();
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
      uint32_t x[4];
      a_of(x, step);
      group_mma<0>(u, x, tiles + tile_step(R::w, step));
    }
    group_commit();
    if constexpr (!summary) {
      group_begin();
#pragma unroll
      for (int step = 0; step < K / 16; ++step) {
        uint32_t x[4];
        a_of(x, step);
        group_mma32(early, x, tiles + tile_step(R::q, step), step > 0);
        group_mma32(late, x, tiles + tile_step(R::q + 32 * 128, step), step > 0);
      }
      group_commit();
      write_o();  // while those run
      group_wait<1>(u);
    } else {
      group_wait<0>(u);
    }
    round_u();
    group_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t x[4];
      u_of(x, step);
      group_mma<1>(S, x, tiles + (R::k + step * 2048) / 16);
    }
    if constexpr (!summary) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t x[4];
        u_of(x, step);
        if (step < 2) group_mma32(early, x, tiles + tile_step(R::p, step));  // no token reaches an earlier one
        group_mma32(late, x, tiles + tile_step(R::p + 32 * 128, step));
      }
    }
    group_commit();
    if constexpr (!summary) group_wait<0>(early), group_wait<0>(late);
    group_wait<0>(S);
#else
    if (!summary) write_o();
#pragma unroll
    for (int p = 0; p < K / 32; ++p) {
      uint32_t a0[4], a1[4];
      a_of(a0, 2 * p), a_of(a1, 2 * p + 1);
      warp_rows(u, a0, a1, buffer_address + uint32_t(R::w), p, lane);
    }
    round_u();
    decay();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t x[4];
      u_of(x, step);
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        uint32_t b[4];
        ldmatrix_t(b, buffer_address + uint32_t(R::k) + tile_at(16 * step + (lane & 15), j + (lane >> 4)));
        mma(S[j], x, b[0], b[1]);
        mma(S[j + 1], x, b[2], b[3]);
      }
    }
    if constexpr (!summary) {
#pragma unroll
      for (int j = 0; j < 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
#pragma unroll
      for (int p = 0; p < K / 32; ++p) {
        uint32_t a0[4], a1[4];
        a_of(a0, 2 * p), a_of(a1, 2 * p + 1);
        warp_rows(o, a0, a1, buffer_address + uint32_t(R::q), p, lane);
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        uint32_t u0[4], u1[4];
        u_of(u0, 2 * p), u_of(u1, 2 * p + 1);
        warp_rows(o, u0, u1, buffer_address + uint32_t(R::p), p, lane, 4 * p);
      }
    }
#endif

    if constexpr (!summary) {
      const float by = root * inverse(power);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        out[j][0] = bf16_bits(o[j][0] * by, o[j][1] * by), out[j][1] = bf16_bits(o[j][2] * by, o[j][3] * by);
      const int64_t t = (from + i) * kChunk;
      to_o = a.o + ((token_start + t + g) * H + h) * V + row0 + 2 * tq;
      left = int(min(int64_t(kChunk), tokens - t)) - g;
    }
    after();
  }
  if (!summary) write_o();

  if constexpr (summary) {
    store(a.summaries + ((int64_t(n - a.first) * (a.segments - 1) + segment) * H + h) * (V + K) * K);
  } else if (to == range.to || range.chunks == 0) {
    if (range.to < range.chunks)
      store(a.carry_out + int64_t(h) * V * K);
    else if (a.out[n] >= 0)
      store(a.state + (int64_t(a.out[n]) * H + h) * V * K);
  }
}

// The state after each segment but the last, in the place of what the segment adds: S(g+1) = S(g) Phi(g) + Gamma(g).
// One block: 16 rows of one head and sequence.
template <int K>
__global__ void __launch_bounds__(K * 2) combine_kernel(const Args a) {
  extern __shared__ __align__(16) float combine_shared[];
  float* const phi = combine_shared;                                            // [K,K]
  float(*const state)[16][K] = reinterpret_cast<float(*)[16][K]>(phi + K * K);  // [2,16,K]
  const int n = a.first + int(blockIdx.z), h = int(blockIdx.y), V = a.V;
  const int c = int(threadIdx.x) % K, part = int(threadIdx.x) / K, row0 = int(blockIdx.x) * 16 + part * 8;
  const Range range = range_of(a, n);
  const int64_t length = (range.to - range.from + a.segments - 1) / a.segments, size = int64_t(V + K) * K;
  float* at = a.summaries + (int64_t(n - a.first) * (a.segments - 1) * a.H + h) * size;
  const auto row = [&](int r) { return int64_t(row0 + r) * K + c; };
  for (int r = 0; r < 8; ++r) state[0][part * 8 + r][c] = at[row(r)];
  int now = 0;
  for (int segment = 1; segment < a.segments - 1 && range.from + segment * length < range.to; ++segment) {
    at += a.H * size;
    for (int i = int(threadIdx.x) * 4; i < K * K; i += K * 2 * 4)
      copy_async(shared_address(phi + i), at + int64_t(V) * K + i);
    copy_async_commit();
    float sum[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) sum[r] = at[row(r)];
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll 4
    for (int x = 0; x < K; x += 4) {
      const float p0 = phi[x * K + c], p1 = phi[(x + 1) * K + c], p2 = phi[(x + 2) * K + c], p3 = phi[(x + 3) * K + c];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const float4 s = *reinterpret_cast<const float4*>(&state[now][part * 8 + r][x]);
        sum[r] += s.x * p0 + s.y * p1 + s.z * p2 + s.w * p3;
      }
    }
    now ^= 1;
#pragma unroll
    for (int r = 0; r < 8; ++r) at[row(r)] = state[now][part * 8 + r][c] = sum[r];
    __syncthreads();
  }
}

template <int K, int warps, bool summary>
void scan(const Args& a, int rows, cudaStream_t stream) {
  int device = 0, most = 0;
  KDA_CUDA(cudaGetDevice(&device));
  KDA_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  // Two blocks that add up segments share a multiprocessor.
  const int stages = !summary && shared_bytes<K, warps, summary>(3) <= most ? 3 : 2,
            shared = shared_bytes<K, warps, summary>(stages);
  allow_shared(scan_kernel<K, warps, summary>, size_t(shared));
  scan_kernel<K, warps, summary>
      <<<dim3(unsigned(rows / (warps * 16)), unsigned(a.H), unsigned((a.last - a.first + 1) * a.segments)), warps * 32,
         size_t(shared), stream>>>(a, stages);
  check_launch("kda_prefill: scan");
}

}  // namespace

int64_t scan_shared_bytes(int64_t K) {
  return K == 128 ? shared_bytes<128, 4, false>(2) : shared_bytes<64, 4, false>(2);
}

template <int K>
void scan_chunks(const Args& a, int warps, cudaStream_t stream) {
  if (warps == 8)
    scan<K, 8, false>(a, a.V, stream);
  else
    scan<K, 4, false>(a, a.V, stream);
}
template <int K>
void summarise_segments(const Args& a, cudaStream_t stream) {
  scan<K, 4, true>(a, a.V + K, stream);
  constexpr int shared = (K * K + 2 * 16 * K) * int(sizeof(float));
  allow_shared(combine_kernel<K>, shared);
  combine_kernel<K>
      <<<dim3(unsigned(a.V / 16), unsigned(a.H), unsigned(a.last - a.first + 1)), K * 2, shared, stream>>>(a);
  check_launch("kda_prefill: segments");
}
template void scan_chunks<64>(const Args&, int, cudaStream_t);
template void scan_chunks<128>(const Args&, int, cudaStream_t);
template void summarise_segments<64>(const Args&, cudaStream_t);
template void summarise_segments<128>(const Args&, cudaStream_t);

}  // namespace kda::cuda::prefill
