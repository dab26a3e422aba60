// kernels/cuda/attention_general.cu — appending to the cache, and attention for heads of any width: one warp a row, 32
// keys at a time, each lane a key's whole score and then a share of the channels. No tensor cores.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/device.h"

namespace kda::cuda {
namespace {

constexpr int kWarps = 4;

// E: what one thread copies.
template <class E>
__global__ void append_kernel(const AttentionCall a, int64_t row) {
  const int n = blockIdx.z, token0 = a.start[n], slot = a.slot[n];
  if (slot < 0) return;
  const int64_t most = a.capacity - a.past[n], tokens = a.start[n + 1] - token0;
  const int64_t count = (tokens < most ? tokens : most) * row;
  const int64_t from = token0 * row, to = (slot * a.capacity + a.past[n]) * row;
  const bool key = blockIdx.y == 0;
  const E* src = reinterpret_cast<const E*>(key ? a.k : a.v) + from;
  E* dst = reinterpret_cast<E*>(key ? a.k_cache : a.v_cache) + to;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    dst[i] = src[i];
}

__global__ void __launch_bounds__(kWarps * 32) general_kernel(const AttentionCall a) {
  extern __shared__ float smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = a.d;
  const int n = blockIdx.z, h = blockIdx.y, g = h / (a.H / a.G), slot = a.slot[n];
  const int local = int(blockIdx.x) * kWarps + warp, token = a.start[n] + local;
  if (token >= a.start[n + 1]) return;  // whole warps leave; none waits for another
  float* q = smem + warp * 2 * d;
  float* o = q + d;
  const int64_t row = (int64_t(token) * a.H + h) * d;
  for (int i = lane; i < d; i += 32) q[i] = __bfloat162float(a.q[row + i]) * a.scale_log2, o[i] = 0;
  __syncwarp();
  const int64_t stride = int64_t(a.G) * d, base = (int64_t(slot) * a.capacity * a.G + g) * d;
  const int64_t keys = slot < 0 ? 0 : min(int64_t(a.past[n]) + local + 1, a.capacity);
  float most = -__builtin_huge_valf(), sum = 0;
  for (int64_t first = 0; first < keys; first += 32) {
    const bool there = first + lane < keys;
    float score = -__builtin_huge_valf();
    if (there) {
      const __nv_bfloat16* k = a.k_cache + base + (first + lane) * stride;
      score = 0;
      for (int i = 0; i < d; ++i) score = fmaf(q[i], __bfloat162float(k[i]), score);
    }
    float top = score;
    for (int m = 16; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
    const float before = most;
    most = fmaxf(most, top);
    const float shrink = exp2f(before - most), p = there ? exp2f(score - most) : 0.0f;
    float total = p;
    for (int m = 16; m; m >>= 1) total += __shfl_xor_sync(~0u, total, m);
    sum = fmaf(sum, shrink, total);
    const int count = int(min(int64_t(32), keys - first));
    for (int i = lane; i < (d + 31) / 32 * 32; i += 32) {
      float x = i < d ? o[i] * shrink : 0;
      for (int j = 0; j < count; ++j) {
        const float weight = __shfl_sync(~0u, p, j);
        if (i < d) x = fmaf(weight, __bfloat162float(a.v_cache[base + (first + j) * stride + i]), x);
      }
      if (i < d) o[i] = x;
    }
  }
  for (int i = lane; i < d; i += 32) a.o[row + i] = __float2bfloat16(keys ? o[i] / sum : 0.0f);
}

template <class E>
void append(Context& ctx, const AttentionCall& a) {
  const int64_t row = int64_t(a.G) * a.d * int64_t(sizeof(__nv_bfloat16)) / int64_t(sizeof(E));
  const int64_t blocks = std::min<int64_t>(ceil_div(a.longest * row, 256), 1024);
  launch("attention: appending", ctx, dim3(unsigned(blocks), 2, unsigned(a.N)), 256, 0, append_kernel<E>, a, row);
}

}  // namespace

void attention_append(Context& ctx, const AttentionCall& a) {
  a.G* a.d % 8 == 0 ? append<uint4>(ctx, a) : append<uint16_t>(ctx, a);
}

void attention_general(Context& ctx, const AttentionCall& a) {
  const size_t bytes = size_t(kWarps) * 2 * size_t(a.d) * sizeof(float);
  launch("attention of any width", ctx, dim3(unsigned(ceil_div(a.longest, kWarps)), unsigned(a.H), unsigned(a.N)),
         kWarps * 32, bytes, general_kernel, a);
}

}  // namespace kda::cuda
