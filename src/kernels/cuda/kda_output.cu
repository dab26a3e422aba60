// kernels/cuda/kda_output.cu — gated RMSNorm of each head's values. A head's row lies in a few neighbouring lanes,
// which go down the tokens with their bias and weight in registers.
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"
#include "kernels/kda.h"

namespace kda::cuda {

namespace {

using bf = __nv_bfloat16;
constexpr int kThreads = 256, kTokens = 8, kAhead = 4;

struct Args {
  const bf *o, *g;
  const float *bias, *w;
  bf* y;
  int64_t T, H, V;
  float eps;
};

// kLanes lanes of 8 values each have a row: V = 8 kLanes.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) output_rows(Args a) {
  const int64_t width = a.H * a.V, c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (c >= width) return;  // whole rows of lanes
  const unsigned lane = threadIdx.x % 32, mask = kLanes == 32 ? ~0u : ((1u << kLanes) - 1) << (lane / kLanes * kLanes);
  float bias[8], w[8];
  load(bias, a.bias + c);
  load(w, a.w + c % a.V);
  const int64_t from = int64_t(blockIdx.y) * kTokens;
#pragma unroll
  for (int64_t t = from; t < from + kTokens; t += kAhead) {
    float o[kAhead][8], g[kAhead][8], sum[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (t + u < a.T) {
        load(o[u], a.o + (t + u) * width + c);
        load(g[u], a.g + (t + u) * width + c);
      }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (t + u >= a.T) return;  // all lanes of the block alike
      sum[u] = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[u] += o[u][e] * o[u][e];
#pragma unroll
      for (int l = kLanes / 2; l; l /= 2) sum[u] += __shfl_xor_sync(mask, sum[u], l);
      const float r = 1.0f / sqrtf(sum[u] / float(a.V) + a.eps);
#pragma unroll
      for (int e = 0; e < 8; ++e) o[u][e] *= r * w[e] * sigmoid(g[u][e] + bias[e]);
      store(a.y + (t + u) * width + c, o[u]);
    }
  }
}

// Any V: a warp has a row.
__global__ void __launch_bounds__(kThreads) output_any(Args a) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= a.T * a.H) return;
  const int64_t at = row * a.V;
  const float* bias = a.bias + row % a.H * a.V;
  float sum = 0;
  for (int64_t v = lane; v < a.V; v += 32) {
    const float o = widen(a.o[at + v]);
    sum += o * o;
  }
#pragma unroll
  for (int l = 16; l; l /= 2) sum += __shfl_xor_sync(~0u, sum, l);
  const float r = 1.0f / sqrtf(sum / float(a.V) + a.eps);
  for (int64_t v = lane; v < a.V; v += 32)
    a.y[at + v] = narrow<bf>(widen(a.o[at + v]) * (r * a.w[v]) * sigmoid(widen(a.g[at + v]) + bias[v]));
}

}  // namespace

void kda_output(Context& ctx, const KdaOutput& k) {
  const Args a{.o = bf16_of(k.o),
               .g = bf16_of(k.g),
               .bias = k.g_bias.as<float>(),
               .w = k.w.as<float>(),
               .y = bf16_of(k.y),
               .T = k.o.dim(0),
               .H = k.o.dim(1),
               .V = k.o.dim(2),
               .eps = k.eps};
  if (a.T * a.H * a.V == 0) return;
  const bool wide = aligned(a.o, 16) && aligned(a.g, 16) && aligned(a.y, 16) && aligned(a.bias, 16) && aligned(a.w, 16);
  void (*kernel)(Args) = !wide        ? nullptr
                         : a.V == 64  ? output_rows<8>
                         : a.V == 128 ? output_rows<16>
                         : a.V == 256 ? output_rows<32>
                                      : nullptr;
  const int64_t y_blocks = ceil_div(a.T, kTokens);
  if (kernel && y_blocks < 65536)
    launch("kda_output", ctx, dim3(unsigned(ceil_div(a.H * a.V, 8 * kThreads)), unsigned(y_blocks)), kThreads, 0,
           kernel, a);
  else
    launch("kda_output", ctx, unsigned(ceil_div(a.T * a.H * 32, kThreads)), kThreads, 0, output_any, a);
}

}  // namespace kda::cuda
