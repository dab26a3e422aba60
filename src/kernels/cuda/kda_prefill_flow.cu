// Both parts of the chunked forward pass in one kernel (sm_90a). H * V/64 of its blocks take the states from chunk to
// chunk; all others prepare chunks, in the order of the pack, into a ring of records that the first read right behind
// them: what passes between the two stays in the L2 cache. Blocks wait for each other, so all are resident: the launch
// is cooperative.
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_prefill_group.cuh"
#include "kernels/cuda/kda_prefill_prepare.cuh"

namespace kda::cuda::prefill {
namespace {

// A stage of the ring in shared memory: one record's matrices.
template <int K>
struct FlowStage {
  enum : int { w = 0, k = 64 * K * 2, q = 2 * k, p = 3 * k, bytes = p + 64 * 128 };
};
template <int K>
constexpr int flow_shared() {
  const int chain = 2 * FlowStage<K>::bytes + 64;
  return Layout<K>::bytes > chain ? Layout<K>::bytes : chain;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What ordinary stores of any block wrote, before bulk copies read it.
__device__ inline void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ inline bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// The chunks of a pack in order, those of sequences without tokens left out.
struct Cursor {
  const Args& a;
  int n;  // the sequence
  int32_t start, tokens;
  int64_t chunk, chunks;
  bool more;
  __device__ explicit Cursor(const Args& args) : a(args), n(-1), start(0), tokens(0), chunk(0), chunks(0) {
    next_sequence();
  }
  __device__ void next_sequence() {
    for (more = ++n < a.N; more; more = ++n < a.N) {
      start = a.start[n], tokens = a.start[n + 1] - start;
      chunk = 0, chunks = (tokens + kChunk - 1) / kChunk;
      if (chunks > 0) return;
    }
  }
  __device__ void next() {
    if (++chunk == chunks) next_sequence();
  }
  __device__ int64_t slot() const { return more ? first_slot(start, n) + chunk : ~uint32_t(0); }
};

// Where a chunk number lies in the ring, and how often its place was filled with it.
struct Place {
  int64_t slot = 0;
  uint32_t at = 0, generation = 1;
  __device__ void go_to(int64_t next, uint32_t ring) {
    for (at += uint32_t(next - slot); at >= ring; at -= ring) ++generation;
    slot = next;
  }
};

__device__ inline bool has_tokens(const Args& a, int64_t slot) {
  const int n = sequence_of(a, slot);
  return a.start[n] + (slot - first_slot(a.start[n], n)) * kChunk < a.start[n + 1];
}

// Until what lies in the place of chunk number `slot` was read by all who read it.
__device__ inline void wait_for_place(const Args& a, const Flow& flow, int64_t slot, int h) {
  int64_t before = slot - flow.ring;
  while (before >= 0 && !has_tokens(a, before)) before -= flow.ring;
  for (int rows = 0; rows < a.V / 64; ++rows)
    while (before >= 0 && int64_t(load_acquired(flow.progress + rows * a.H + h)) <= before) __nanosleep(64);
}

// The thread that brings records.
template <int K>
__device__ __forceinline__ void bring(const Args& a, const Flow& flow, const int h, const int rows, const uint32_t base,
                                      const uint32_t barriers) {
  using G = FlowStage<K>;
  using R = Record<K>;
  const int64_t bytes = R::bytes(a.V);
  uint32_t* const progress = flow.progress + rows * a.H + h;
  Cursor behind(a);  // the first chunk that is not through, of that number:
  int through = 0, i = 0;
  Place place;
  store_released(progress, uint32_t(behind.slot()));
  for (Cursor at(a); at.more; at.next(), ++i) {
    const int s = i & 1;
    place.go_to(at.slot(), uint32_t(flow.ring));
    const uint32_t* const ready = flow.ready + int64_t(place.at) * a.H + h;
    // Whoever fills this place may wait for what lies there to be read, so that is told all the time.
    for (bool filled = false; !filled || through < i - 1;) {
      if (!filled) filled = load_acquired(ready) == place.generation;
      if (through < i && barrier_test(barriers + 16 + 8 * (through & 1), uint32_t(through >> 1) & 1)) {
        ++through, behind.next();
        store_released(progress, uint32_t(behind.slot()));
      }
    }
    fence_async();
    const char* const record = a.records + (int64_t(place.at) * a.H + h) * bytes;
    const uint32_t into = base + s * G::bytes, full = barriers + 8 * s;
    barrier_expect(full, G::bytes);
    copy_bulk(into + G::w, record + R::w, 64 * K * 2, full);
    copy_bulk(into + G::q, record + R::q, 64 * K * 2, full);
    copy_bulk(into + G::k, record + R::k, 64 * K * 2, full);
    copy_bulk(into + G::p, record + R::p, 64 * 128, full);
  }
}

// Four warps: 64 rows of the state of head h, of one sequence after the other.
template <int K>
__device__ __forceinline__ void chain(const Args& a, const Flow& flow, const int h, const int rows, const uint32_t base,
                                      const char* const shared, const uint32_t barriers) {
  using G = FlowStage<K>;
  using R = Record<K>;
  constexpr int NT = K / 8;
  const int tid = int(threadIdx.x), w = tid >> 5, lane = tid & 31, g = lane >> 2, tq = lane & 3;
  const int V = a.V, H = a.H, row0 = rows * 64 + w * 16;
  const int64_t bytes = R::bytes(V);
  float S[NT][4], power = 1;  // S: the state times this power of two, so that fp16 can hold it
  float o[2][4][4] = {};      // O / s of a chunk times `power`, transposed: rows of v, columns of 2 x 32 tokens
  uint32_t out[8][2] = {};    // o of the chunk before, not yet written
  const float root = rsqrtf(float(K));
  const auto load = [&](int n) {
    load_rows(S, a.in[n] >= 0 ? a.state + ((int64_t(a.in[n]) * H + h) * V + row0) * K : nullptr, g, tq);
    power = 1;
  };
  const auto store = [&](int slot) {
    if (slot >= 0) store_rows(a.state + ((int64_t(slot) * H + h) * V + row0) * K, S, inverse(power), g, tq);
  };
  __nv_bfloat16* to_o = nullptr;
  int left = 0;
  const auto write_o = [&] { write_rows(to_o, out, 8 * int64_t(H) * V, left); };
  // Sequences without tokens hand their states on.
  int done = 0;
  const auto hand_on = [&](int to) {
    for (; done < to; ++done)
      if (a.start[done] == a.start[done + 1]) load(done), store(a.out[done]);
    done = to + 1;
  };
  Place place;
  int mark = 0, i = 0;
  for (Cursor at(a); at.more; at.next(), ++i) {
    const int s = i & 1;
    if (at.chunk == 0) {
      hand_on(at.n);
      load(at.n);
      while (mark < a.marks_n && a.marks[mark].sequence < at.n) ++mark;
    }
    const char* const buffer = shared + s * G::bytes;
    const uint64_t tiles = tile(base + s * G::bytes);
    barrier_wait(barriers + 8 * s, uint32_t(i >> 1) & 1);
    place.go_to(at.slot(), uint32_t(flow.ring));
    const auto after = [&] {
      warp_arrive(barriers + 16 + 8 * s);
      if (mark < a.marks_n && a.marks[mark].sequence == at.n && a.marks[mark].tokens == (at.chunk + 1) * kChunk)
        store(a.marks[mark++].slot);
      if (at.chunk + 1 == at.chunks) store(a.out[at.n]);
    };
    uint4 u0[4];
    {
      const uint4* const from =
          reinterpret_cast<const uint4*>(a.records + (int64_t(place.at) * H + h) * bytes + R::u + rows * 8192) +
          w * 128 + lane;
#pragma unroll
      for (int x = 0; x < 4; ++x) u0[x] = __ldcg(from + x * 32);
    }
    uint32_t A[NT][2];
    const float unscale = reinterpret_cast<const float*>(buffer + G::p + spare_at(rows, 1))[w];
    if (round_rows(A, S, power, unscale)) {
      if (unscale == by_tokens()) {
        write_o();
        left = 0;
        take_tokens<K, true>(S, power, a, reinterpret_cast<const float*>(buffer + G::w),
                             reinterpret_cast<const float*>(buffer + G::p + (TokenRecord<K>::in_p - R::p)),
                             at.start + at.chunk * kChunk, int(min(int64_t(kChunk), at.tokens - at.chunk * kChunk)), h,
                             row0, true);
        after();
        continue;
      }
      fit_rows(A, S, power, unscale);
    }
    const auto a_of = [&](uint32_t(&x)[4], int step) {
      x[0] = A[2 * step][0], x[1] = A[2 * step][1], x[2] = A[2 * step + 1][0], x[3] = A[2 * step + 1][1];
    };
    {
      const char* const e_at = buffer + G::p;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float2 e = *reinterpret_cast<const float2*>(e_at + spare_at(2 * j + (tq >> 1), 0) + (tq & 1) * 8);
        S[j][0] *= e.x, S[j][1] *= e.y, S[j][2] *= e.x, S[j][3] *= e.y;
      }
    }
    float u[8][4];  // U = U0 - S W^T, transposed
    group_begin();
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
      uint32_t x[4];
      a_of(x, step);
      group_mma<0>(u, x, tiles + tile_step(G::w, step), step > 0);
    }
    group_commit();
    group_begin();
#pragma unroll
    for (int step = 0; step < K / 16; ++step) {
      uint32_t x[4];
      a_of(x, step);
      group_mma32(o[0], x, tiles + tile_step(G::q, step), step > 0);
      group_mma32(o[1], x, tiles + tile_step(G::q + 32 * 128, step), step > 0);
    }
    group_commit();
    write_o();  // while those run
    to_o = a.o + ((at.start + at.chunk * kChunk + g) * H + h) * V + row0 + 2 * tq;
    left = int(min(int64_t(kChunk), at.tokens - at.chunk * kChunk)) - g;
    group_wait<1>(u);
    uint32_t U[8][2];
    {
      const float by = unscale * power;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float2 p0 = half2_floats(u0[x].x), p1 = half2_floats(u0[x].y), p2 = half2_floats(u0[x].z),
                     p3 = half2_floats(u0[x].w);
        U[2 * x][0] = half2_bits(u[2 * x][0] + p0.x * by, u[2 * x][1] + p0.y * by);
        U[2 * x][1] = half2_bits(u[2 * x][2] + p1.x * by, u[2 * x][3] + p1.y * by);
        U[2 * x + 1][0] = half2_bits(u[2 * x + 1][0] + p2.x * by, u[2 * x + 1][1] + p2.y * by);
        U[2 * x + 1][1] = half2_bits(u[2 * x + 1][2] + p3.x * by, u[2 * x + 1][3] + p3.y * by);
      }
    }
    const auto u_of = [&](uint32_t(&x)[4], int step) {
      x[0] = U[2 * step][0], x[1] = U[2 * step][1], x[2] = U[2 * step + 1][0], x[3] = U[2 * step + 1][1];
    };
    group_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t x[4];
      u_of(x, step);
      group_mma<1>(S, x, tiles + (G::k + step * 2048) / 16);
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t x[4];
      u_of(x, step);
      if (step < 2) group_mma32(o[0], x, tiles + tile_step(G::p, step));  // no token reaches an earlier one
      group_mma32(o[1], x, tiles + tile_step(G::p + 32 * 128, step));
    }
    group_commit();
    group_wait<0>(o[0]);
    group_wait<0>(o[1]);
    group_wait<0>(S);
    {
      const float by = root * inverse(power);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float(&x)[4] = o[j >> 2][j & 3];
        out[j][0] = bf16_bits(x[0] * by, x[1] * by), out[j][1] = bf16_bits(x[2] * by, x[3] * by);
      }
    }
    after();
  }
  write_o();
  hand_on(a.N);
}
#endif

template <int K>
__global__ void __launch_bounds__(kThreads, 2) flow_kernel(const Args a, const Flow flow) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared[];
  const int tid = int(threadIdx.x), chains = a.H * (a.V / 64);
  // The first block of a multiprocessor may become a chain; those after it know.
  uint32_t* const told = reinterpret_cast<uint32_t*>(shared);
  if (tid == 0) {
    uint32_t sm, role;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    uint32_t* const of_sm = flow.of_sm + 2 * (sm % kFlowSms);
    const bool first = atomicAdd(of_sm, 1u) == 0;
    if (first) {
      role = atomicAdd(flow.chain_ticket, 1u);
      store_released(of_sm + 1, role + 1);
    } else {
      while ((role = load_acquired(of_sm + 1)) == 0) {
      }
      role = int(role) <= flow.alone ? ~0u - 1 : ~0u - 2;  // nothing at all; chunks
    }
    *told = role;
  }
  __syncthreads();
  const uint32_t role = *told;
  __syncthreads();
  if (role == ~0u - 1) return;
  if (role < uint32_t(chains)) {
    const int h = int(role) % a.H, rows = int(role) / a.H;
    const uint32_t base = shared_address(shared), barriers = base + 2 * FlowStage<K>::bytes;
    if (tid == 0) {
      for (int s = 0; s < 2; ++s)
        barrier_init(barriers + 8 * s, 1), barrier_init(barriers + 16 + 8 * s, 4 * kWarpArrivals);
      barriers_made();
    }
    __syncthreads();
    if (tid >= 128) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
      if (tid == 128) bring<K>(a, flow, h, rows, base, barriers);
    } else {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
      chain<K>(a, flow, h, rows, base, shared, barriers);
    }
    return;
  }
  // Where no part of a chunk's work writes: behind a row of L.
  uint32_t* const ticket = reinterpret_cast<uint32_t*>(shared + Layout<K>::L) + at_f(63, 64);
  const uint32_t work = uint32_t(flow.slots * a.H);
  if (tid == 0) *ticket = atomicAdd(flow.ticket, 1u);
  __syncthreads();
  for (uint32_t t = *ticket; t < work; t = *ticket) {
    const int64_t slot = t / uint32_t(a.H), place = slot % flow.ring;
    const int h = int(t % uint32_t(a.H)), n = sequence_of(a, slot);
    const int64_t token0 = a.start[n] + (slot - first_slot(a.start[n], n)) * kChunk;
    const bool some = token0 < a.start[n + 1];
    const int count = int(min(int64_t(kChunk), a.start[n + 1] - token0));
    uint32_t next = 0;
    if (tid == 0) {
      next = atomicAdd(flow.ticket, 1u);
      if (some) wait_for_place(a, flow, slot, h);
    }
    __syncthreads();
    if (tid == 0) *ticket = next;
    if (some) {
      prepare_chunk<K>(a, shared, token0, count, h, a.records + (place * a.H + h) * Record<K>::bytes(a.V));
      fence_async();
    }
    __syncthreads();
    if (some && tid == 0) store_released(flow.ready + place * a.H + h, uint32_t(slot / flow.ring) + 1);
  }
#endif
}

}  // namespace

bool flow_code() {
  cudaFuncAttributes code{};
  const bool there = cudaFuncGetAttributes(&code, flow_kernel<128>) == cudaSuccess && code.ptxVersion >= 90;
  cudaGetLastError();
  return there;
}
int64_t flow_shared_bytes(int64_t K) { return K == 128 ? flow_shared<128>() : flow_shared<64>(); }
int64_t flow_bytes(int64_t H, int64_t V, int64_t ring) { return (ring * H + H * (V / 64) + 2 + 2 * kFlowSms) * 4; }

template <int K>
void flow_chunks(Args a, int64_t ring, int64_t slots, int alone, char* control, int blocks, cudaStream_t stream) {
  a.from = 0, a.to = slots, a.first = 0, a.last = a.N - 1, a.segments = 1;
  Flow f{};
  f.ring = ring, f.slots = slots;
  f.ready = reinterpret_cast<uint32_t*>(control);
  f.progress = f.ready + ring * a.H;
  f.ticket = f.progress + a.H * (a.V / 64);
  f.chain_ticket = f.ticket + 1, f.of_sm = f.chain_ticket + 1;
  f.alone = std::min(alone, int(a.H * (a.V / 64)));
  KDA_CUDA(cudaMemsetAsync(control, 0, size_t(flow_bytes(a.H, a.V, ring)), stream));
  constexpr int shared = flow_shared<K>();
  allow_shared(flow_kernel<K>, shared);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = &together, config.numAttrs = 1;
  KDA_CUDA(cudaLaunchKernelEx(&config, flow_kernel<K>, a, f));
}
template void flow_chunks<64>(Args, int64_t, int64_t, int, char*, int, cudaStream_t);
template void flow_chunks<128>(Args, int64_t, int64_t, int, char*, int, cudaStream_t);

}  // namespace kda::cuda::prefill
