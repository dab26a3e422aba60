// kernels/cuda/rope.cu — rotary positions in place. A block has a token: its angles are found once for all heads.
#include "kernels/rope.h"

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using bf = __nv_bfloat16;

// n channels and their partners d/2 further at once.
template <int n>
__global__ void turn(bf* x, const int32_t* position, const float* inv_freq, int H, int half, float factor) {
  extern __shared__ float angles[];  // cos [half], sin [half]
  const float at = float(position[blockIdx.x]);
  for (int i = int(threadIdx.x); i < half; i += int(blockDim.x)) {
    float s, c;
    sincosf(at * inv_freq[i], &s, &c);
    angles[i] = factor * c;
    angles[half + i] = factor * s;
  }
  __syncthreads();
  bf* row = x + int64_t(blockIdx.x) * H * 2 * half;
  const int groups = half / n;
  for (int j = int(threadIdx.x); j < H * groups; j += int(blockDim.x)) {
    const int i = j % groups * n;
    bf* low = row + j / groups * 2 * half + i;
    float a[n], b[n], u[n], v[n];
    load(a, low);
    load(b, low + half);
#pragma unroll
    for (int e = 0; e < n; ++e) {
      const float c = angles[i + e], s = angles[half + i + e];
      u[e] = a[e] * c - b[e] * s;
      v[e] = b[e] * c + a[e] * s;
    }
    store(low, u);
    store(low + half, v);
  }
}

}  // namespace

void rope(Context& ctx, const Rope& a) {
  const int64_t T = a.x.dim(0), H = a.x.dim(1), half = a.x.dim(2) / 2;
  if (T * H * half == 0) return;
  const size_t shared = 2 * size_t(half) * sizeof(float);
  const bool wide = half % 8 == 0 && aligned(a.x.data, 16);
  const auto kernel = wide ? turn<8> : turn<1>;
  const int64_t work = H * half / (wide ? 8 : 1);
  const auto threads = unsigned(std::clamp<int64_t>(ceil_div(work, 32) * 32, 32, 256));
  launch("rope", ctx, unsigned(T), threads, shared, kernel, bf16_of(a.x), a.position.as<int32_t>(),
         a.inv_freq.as<float>(), int(H), int(half), a.factor);
}

}  // namespace kda::cuda
