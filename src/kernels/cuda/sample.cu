// kernels/cuda/sample.cu — one token from each row of logits, without sorting.
//
// A row belongs to a cluster of 8 blocks (sm_90) or to one block; each warp owns a stretch of consecutive ids. What
// top_k and top_p keep is everything from some value up, so both are a search for that value: by the bits of the
// logits, 5 at a time from the highest, summing for each of the 32 digits the weight (or the number) of the ids whose
// logits begin as found so far. Every thread has its own sums of a digit, so that they are added in one order. Then the
// ids' own order serves the draw: the stretch that the draw falls into, then the id.
#include <cooperative_groups.h>

#include "base/rng.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/sample.h"

namespace kda::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32, kDigitBits = 5, kDigits = 1 << kDigitBits;
constexpr int kClusterBlocks = 8;
constexpr float kInfinity = __builtin_huge_valf();

struct Smem {
  float bins[kDigits][kThreads];
  double box[2][kDigits];  // what the cluster's blocks tell each other, in turns
  uint64_t best[2][kWarps];
  int bad;
};

// Rises with x; equal for equal values.
__device__ uint32_t key_of(float x) {
  const uint32_t u = __float_as_uint(x + 0.0f);  // -0 is 0
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

template <int kBlocks>
struct Row {
  const float* logits;
  float temperature, most;
  int first, last;  // ids of this thread's warp
  uint32_t floor;   // keys below it are out
  Smem& m;
  int turn = 0;

  __device__ float scaled(float x) const { return temperature == 1.0f ? x : __fdiv_rn(x, temperature); }
  __device__ float weight(float x) const { return expf(x - most); }

  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) return cg::this_cluster().sync();
#endif
    __syncthreads();
  }
  // A block's memory as seen from this one.
  template <class T>
  __device__ const T* of_block(const T* p, [[maybe_unused]] int block) const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) return cg::this_cluster().map_shared_rank(p, unsigned(block));
#endif
    return p;
  }

  // f(id of the first lane, x, active) for the warp's ids in rising order, 32 at a time; lanes past the end are not
  // active. Ends early where f says so.
  template <class F>
  __device__ void each(const F& f) const {
    constexpr int kDeep = 8;  // loads on their way at once
    const int lane = int(threadIdx.x) % 32;
    for (int base = first; base < last; base += 32 * kDeep) {
      float x[kDeep];
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        const int id = base + k * 32 + lane;
        x[k] = id < last ? logits[id] : -kInfinity;
      }
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        const int id = base + k * 32;
        if (id < last && f(id, scaled(x[k]), id + lane < last)) return;
      }
    }
  }
};

struct Found {
  uint32_t key;   // of the value with which the sum comes to the limit; where one id alone has it, perhaps a lower one
  double before;  // sum of what lies above it
  double there;   // sum of all ids with that value
  double all;
  bool single;  // one id alone has it
};

// The value with which the sum of `term`, from the largest value down, comes to limit(sum of all).
template <int kBlocks, class Term, class Limit>
__device__ Found search(Row<kBlocks>& row, const Term& term, const Limit& limit_of) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  Found r{0, 0, 0, 0, false};
  double limit = 0;
  for (int shift = 32; shift > 0;) {
    const int bits = shift > kDigitBits ? kDigitBits : shift, below = shift - bits;
    for (int d = 0; d < kDigits; ++d) row.m.bins[d][threadIdx.x] = 0;
    const uint64_t prefix = uint64_t(r.key) >> shift;
    row.each([&](int, float x, bool) {
      const uint32_t key = key_of(x);
      if (x > -kInfinity && key >= row.floor && uint64_t(key) >> shift == prefix)
        row.m.bins[key >> below & (kDigits - 1) & ((1u << bits) - 1)][threadIdx.x] += term(x);
      return false;
    });
    __syncthreads();
    for (int d = warp; d < kDigits; d += kWarps) {
      double sum = 0;
      for (int i = lane; i < kThreads; i += 32) sum += double(row.m.bins[d][i]);
      for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
      if (lane == 0) row.m.box[row.turn][d] = sum;
    }
    row.sync();
    // Every warp does the rest, lane d for digit 31 - d, so that sums run from the largest.
    double digit = 0;
    for (int b = 0; b < kBlocks; ++b) digit += row.of_block(row.m.box[row.turn], b)[kDigits - 1 - lane];
    row.turn ^= 1;
    double sum = digit;
    for (int k = 1; k < 32; k <<= 1) {
      const double other = __shfl_up_sync(~0u, sum, k);
      if (lane >= k) sum += other;
    }
    if (shift == 32) r.all = __shfl_sync(~0u, sum, 31), limit = limit_of(r.all);
    const unsigned there = __ballot_sync(~0u, digit > 0);
    const unsigned enough = there & __ballot_sync(~0u, r.before + sum >= limit);
    // Rounding may leave every digit short of the limit: then the lowest.
    const int at = enough ? __ffs(int(enough)) - 1 : there ? 31 - __clz(int(there)) : 31;
    r.before += __shfl_sync(~0u, sum, at) - __shfl_sync(~0u, digit, at);
    r.there = __shfl_sync(~0u, digit, at);
    r.key |= uint32_t(kDigits - 1 - at) << below;
    shift = below;
    // Two ids would add up to twice the least that one of this prefix may have.
    if (r.there < 1.9 * double(term(value_of(r.key)))) {
      r.single = true;
      break;
    }
  }
  return r;
}

// The largest logit and the lowest id that has it, as key << 32 | ~id; 0 where a logit is NaN or +infinity.
template <int kBlocks>
__device__ uint64_t largest(Row<kBlocks>& row) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  uint64_t best = 1;  // below every logit
  bool bad = false;
  const float* logits = row.logits;
#pragma unroll 8
  for (int id = row.first + lane; id < row.last; id += 32) {
    const float x = logits[id];
    bad |= !(x < kInfinity);
    const uint64_t mine = uint64_t(key_of(x)) << 32 | ~uint32_t(id);
    best = mine > best ? mine : best;
  }
  if (bad) best = ~uint64_t(0);
  for (int k = 16; k; k >>= 1) {
    const uint64_t other = __shfl_xor_sync(~0u, best, k);
    best = other > best ? other : best;
  }
  if (lane == 0) row.m.best[0][warp] = best;
  row.sync();
  best = 1;
  for (int i = lane; i < kBlocks * kWarps; i += 32) {
    const uint64_t other = row.of_block(row.m.best[0], i / kWarps)[i % kWarps];
    best = other > best ? other : best;
  }
  for (int k = 16; k; k >>= 1) {
    const uint64_t other = __shfl_xor_sync(~0u, best, k);
    best = other > best ? other : best;
  }
  return best == ~uint64_t(0) ? 0 : best;
}

// A value of each warp of the row, seen by every warp: lane l has those of warps l * kEach and on, in the order of ids.
template <int kBlocks>
struct WarpValues {
  static constexpr int kAll = kBlocks * kWarps, kEach = (kAll + 31) / 32;
  double value[kEach], above[kEach];  // each one's, and the sum up to and including it
  double all;

  __device__ WarpValues(Row<kBlocks>& row, double mine) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    if (lane == 0) row.m.box[row.turn][warp] = mine;
    row.sync();
    double sum = 0;
    for (int i = 0; i < kEach; ++i) {
      const int w = lane * kEach + i;
      value[i] = w < kAll ? row.of_block(row.m.box[row.turn], w / kWarps)[w % kWarps] : 0;
      sum += value[i];
      above[i] = sum;
    }
    row.turn ^= 1;
    double scan = sum;
    for (int k = 1; k < 32; k <<= 1) {
      const double other = __shfl_up_sync(~0u, scan, k);
      if (lane >= k) scan += other;
    }
    for (int i = 0; i < kEach; ++i) above[i] += scan - sum;
    all = __shfl_sync(~0u, scan, 31);
  }
};

template <int kBlocks>
__device__ int draw(Row<kBlocks>& row, const SampleRow& p, int this_warp) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t lowest = row.floor;  // key
  double ties_kept = 0, ties = 0;
  if (p.top_p < 1) {
    const Found f = search(
        row, [&](float x) { return row.weight(x); }, [&](double all) { return double(p.top_p) * all; });
    lowest = max(f.key, row.floor);
    const double one = double(row.weight(value_of(f.key)));
    if (!f.single && one > 0) {
      ties = rint(f.there / one);
      ties_kept = fmax(1.0, ceil((double(p.top_p) * f.all - f.before) / one));
    }
  }
  double rank = 0;                       // among the ties, of the warp's first
  const bool ranked = ties_kept < ties;  // some of the equals go
  if (ranked) {
    int count = 0;
    row.each([&](int, float x, bool active) {
      count += __popc(__ballot_sync(~0u, active && key_of(x) == lowest));
      return false;
    });
    const WarpValues<kBlocks> counts(row, count);
    for (int i = 0; i < WarpValues<kBlocks>::kEach; ++i) {
      const int owner = this_warp / WarpValues<kBlocks>::kEach;
      if (this_warp % WarpValues<kBlocks>::kEach == i)
        rank = __shfl_sync(~0u, counts.above[i] - counts.value[i], owner);
    }
  }
  // f(id, weight) for the warp's ids in rising order; weight 0: not kept. Ends early where f says so.
  const auto kept = [&](const auto& f) {
    double before = rank;
    row.each([&](int id, float x, bool active) {
      const uint32_t key = key_of(x);
      float w = x > -kInfinity && key >= lowest ? row.weight(x) : 0.0f;
      if (ranked) {
        const unsigned same = __ballot_sync(~0u, active && key == lowest);
        if (active && key == lowest && before + __popc(same & ((1u << lane) - 1)) >= ties_kept) w = 0;
        before += __popc(same);
      }
      if (p.min_p > 0 && w < p.min_p) w = 0;
      return f(id, w);
    });
  };
  double mine = 0;
  kept([&](int, float w) { return mine += double(w), false; });
  for (int k = 16; k; k >>= 1) mine += __shfl_xor_sync(~0u, mine, k);
  const WarpValues<kBlocks> masses(row, mine);
  const auto words = Philox::block(p.seed, {p.sequence, p.position, 0, 0});
  const double target = uniform53(words[0], words[1]) * masses.all;
  // The first warp whose sum goes beyond the target; where rounding hides it, the last that has anything.
  constexpr int kEach = WarpValues<kBlocks>::kEach;
  int beyond = 1 << 30, holder = -1;
  for (int i = kEach - 1; i >= 0; --i)
    if (masses.value[i] > 0) {
      if (masses.above[i] > target) beyond = lane * kEach + i;
      if (holder < 0) holder = lane * kEach + i;
    }
  beyond = __reduce_min_sync(~0u, beyond);
  holder = __reduce_max_sync(~0u, holder);
  const int owner = beyond < (1 << 30) ? beyond : holder;
  if (owner != this_warp) return -1;
  double sum = 0;
  for (int i = 0; i < kEach; ++i)
    if (owner % kEach == i) sum = __shfl_sync(~0u, masses.above[i] - masses.value[i], owner / kEach);
  int chosen = -1, last = -1;
  kept([&](int id, float w) {
    double scan = double(w);
    for (int k = 1; k < 32; k <<= 1) {
      const double other = __shfl_up_sync(~0u, scan, k);
      if (lane >= k) scan += other;
    }
    const unsigned some = __ballot_sync(~0u, w > 0);
    const unsigned over = some & __ballot_sync(~0u, sum + scan > target);
    if (some) last = id + 31 - __clz(int(some));
    if (over) chosen = id + __ffs(int(over)) - 1;
    sum += __shfl_sync(~0u, scan, 31);
    return over != 0;
  });
  return chosen >= 0 ? chosen : last;
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* logits, int vocabulary, const SampleRow* rows, int32_t* ids) {
  extern __shared__ __align__(16) unsigned char raw[];
  const int block = int(blockIdx.x), warp = int(threadIdx.x) / 32;
  const SampleRow p = rows[blockIdx.y];
  const int each = (vocabulary + kBlocks * kWarps - 1) / (kBlocks * kWarps), this_warp = block * kWarps + warp;
  Row<kBlocks> row{.logits = logits + int64_t(blockIdx.y) * vocabulary,
                   .temperature = p.temperature,
                   .most = 0,
                   .first = min(this_warp * each, vocabulary),
                   .last = min((this_warp + 1) * each, vocabulary),
                   .floor = 0,
                   .m = *reinterpret_cast<Smem*>(raw)};
  const uint64_t best = largest(row);
  const uint32_t key = uint32_t(best >> 32);
  const int likeliest = int(~uint32_t(best));
  const bool none = best == 0 || key <= key_of(-kInfinity);
  int id = none ? -1 : likeliest;
  bool mine = block == 0 && threadIdx.x == 0;
  if (!none && p.temperature != 0) {
    row.most = row.scaled(row.logits[likeliest]);
    if (row.most < kInfinity && row.most > -kInfinity) {
      if (p.top_k > 0 && p.top_k < vocabulary)
        row.floor = search(
                        row, [](float) { return 1.0f; }, [&](double) { return double(p.top_k); })
                        .key;
      id = draw(row, p, this_warp);
      mine = id >= 0 && threadIdx.x % 32 == 0;
    } else {
      id = -1;
    }
  }
  if (mine) ids[blockIdx.y] = id;
  row.sync();  // no block leaves while others read its memory
}

}  // namespace

void sample(Context& ctx, const Sample& a) {
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1);
  if (R == 0) return;
  KDA_CHECK(V < (int64_t(1) << 31) - kThreads * kClusterBlocks && R <= 65535, "sample: ", R, " rows of ", V,
            " logits, CUDA takes up to 65535 rows of 2^31");
  const float* logits = a.logits.as<float>();
  if (device_of(ctx).arch < 90) {  // no clusters
    allow_shared(sample_kernel<1>, sizeof(Smem));
    return launch("sample", ctx, dim3(1, unsigned(R)), kThreads, sizeof(Smem), sample_kernel<1>, logits, int(V), a.rows,
                  a.ids);
  }
  const auto kernel = sample_kernel<kClusterBlocks>;
  allow_shared(kernel, sizeof(Smem));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kClusterBlocks, unsigned(R));
  config.blockDim = kThreads;
  config.dynamicSmemBytes = sizeof(Smem);
  config.stream = stream_of(ctx);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, logits, int(V), a.rows, a.ids), "sample");
}

}  // namespace kda::cuda
