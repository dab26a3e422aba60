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
constexpr int kThreads = 128;

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
  const int64_t width = a.H * a.V, at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8, c = at % width;
  if (at >= a.T * width) return;  // whole rows of lanes
  const unsigned lane = threadIdx.x % 32, mask = kLanes == 32 ? ~0u : ((1u << kLanes) - 1) << (lane / kLanes * kLanes);
  Raw<8> o, g;
  o.load(a.o + at);
  g.load(a.g + at);
  float bias[8], w[8], y[8], sum = 0;
  load(bias, a.bias + c);
  load(w, a.w + c % a.V);
#pragma unroll
  for (int e = 0; e < 8; ++e) sum += o[e] * o[e];
#pragma unroll
  for (int l = kLanes / 2; l; l /= 2) sum += __shfl_xor_sync(mask, sum, l);
  const float r = 1.0f / sqrtf(sum / float(a.V) + a.eps);
#pragma unroll
  for (int e = 0; e < 8; ++e) y[e] = o[e] * (r * w[e]) * sigmoid(g[e] + bias[e]);
  store(a.y + at, y);
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
  if (kernel)
    launch("kda_output", ctx, unsigned(ceil_div(a.T * a.H * a.V, 8 * kThreads)), kThreads, 0, kernel, a);
  else
    launch("kda_output", ctx, unsigned(ceil_div(a.T * a.H * 32, kThreads)), kThreads, 0, output_any, a);
}

}  // namespace kda::cuda
