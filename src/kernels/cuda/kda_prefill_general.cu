// Any K and V, and devices without the shared memory of the chunked form: token by token, fp32. A warp keeps one row
// of a state in shared memory; a block's warps share the token's q, k and decays.
#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_prefill.cuh"

namespace kda::cuda::prefill {
namespace {

constexpr int kRows = 8;  // of a state, one for each warp

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int m = 16; m; m /= 2) x += __shfl_xor_sync(~0u, x, m);
  return x;
}

__global__ void __launch_bounds__(kRows * 32) general_kernel(const Args a, const int K) {
  extern __shared__ float general_shared[];
  float *const q = general_shared, *const k = q + K, *const decay = k + K, *const S = decay + K;
  __shared__ float lengths[2];
  const int w = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, h = int(blockIdx.y), n = int(blockIdx.z);
  const int V = a.V, r = int(blockIdx.x) * kRows + w;
  const int32_t start = a.start[n], tokens = a.start[n + 1] - start;
  const bool mine = r < V;
  float* const row = S + w * K;
  const int in = a.in[n], out = a.out[n];
  if (mine)
    for (int c = lane; c < K; c += 32) row[c] = in >= 0 ? a.state[((int64_t(in) * a.H + h) * V + r) * K + c] : 0.0f;
  const float A = expf(a.A_log[h]), root = rsqrtf(float(K));
  const auto store = [&](int slot) {
    if (mine)
      for (int c = lane; c < K; c += 32) a.state[((int64_t(slot) * a.H + h) * V + r) * K + c] = row[c];
  };
  int mark = 0;
  while (mark < a.marks_n && a.marks[mark].sequence < n) ++mark;

  for (int32_t t = 0; t < tokens; ++t) {
    const int64_t th = (int64_t(start) + t) * a.H + h;
    __syncthreads();
    if (w < 2) {
      const __nv_bfloat16* const from = (w ? a.k : a.q) + th * K;
      float sum = 0;
      for (int c = lane; c < K; c += 32) {
        const float x = __bfloat162float(from[c]);
        (w ? k : q)[c] = x;
        sum += x * x;
      }
      sum = warp_sum(sum);
      if (lane == 0) lengths[w] = rsqrtf(sum + kL2NormEps);
    } else {
      for (int c = int(threadIdx.x) - 64; c < K; c += kRows * 32 - 64) {
        const float z = __bfloat162float(a.f[th * K + c]) + a.dt_bias[h * K + c];
        float g;
        if (a.bounded)
          g = a.lower_bound / (1.0f + expf(-A * z));
        else
          g = -A * (z > 0 ? z + log1pf(expf(-z)) : log1pf(expf(z)));
        decay[c] = expf(g);
      }
    }
    __syncthreads();
    if (!mine) continue;
    const float length_q = lengths[0], length_k = lengths[1];
    const float beta = a.beta_scale / (1.0f + expf(-__bfloat162float(a.b[th])));
    float answer = 0;
    for (int c = lane; c < K; c += 32) answer += (row[c] *= decay[c]) * (k[c] * length_k);
    const float u = beta * (__bfloat162float(a.v[th * V + r]) - warp_sum(answer));
    float read = 0;
    for (int c = lane; c < K; c += 32) read += (row[c] += u * (k[c] * length_k)) * (q[c] * length_q);
    read = warp_sum(read);
    if (lane == 0) a.o[th * V + r] = __float2bfloat16(root * read);
    if (mark < a.marks_n && a.marks[mark].sequence == n && a.marks[mark].tokens == t + 1) store(a.marks[mark++].slot);
  }
  if (out >= 0) store(out);
}

}  // namespace

int64_t general_shared_bytes(int64_t K) { return (3 + kRows) * K * int64_t(sizeof(float)); }

void prefill_general(const Args& a, int64_t K, cudaStream_t stream) {
  const int64_t shared = general_shared_bytes(K);
  allow_shared(general_kernel, size_t(shared));
  general_kernel<<<dim3(unsigned(ceil_div(a.V, kRows)), unsigned(a.H), unsigned(a.N)), kRows * 32, size_t(shared),
                   stream>>>(a, int(K));
  check_launch("kda_prefill: token by token");
}

}  // namespace kda::cuda::prefill
