// kernels/cuda/embedding.cu — rows of a table: bf16 or f16 widened to f32, f32 copied (gathered).
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"
#include "kernels/embedding.h"

namespace kda::cuda {

namespace {

// n elements a thread: a row is D / n groups.
template <class E, int n>
__global__ void gather(const E* table, const int32_t* ids, float* y, int64_t T, int64_t groups) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < T * groups;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t t = i / groups, c = i % groups;
    float v[n];
    load(v, table + (ids[t] * groups + c) * n);
    store(y + (t * groups + c) * n, v);
  }
}

template <class E>
void run(Context& ctx, const Embedding& a) {
  const int64_t T = a.ids.dim(0), D = a.table.dim(1);
  const auto* table = static_cast<const E*>(a.table.data);
  const auto* ids = a.ids.as<int32_t>();
  float* y = a.y.as<float>();
  const int n = D % 4 == 0 && aligned(table, 4 * sizeof(E)) && aligned(y, 16) ? 4 : 1;
  const auto grid = unsigned(std::min<int64_t>(ceil_div(T * D / n, 256), 1 << 16));
  if (n == 4)
    launch("embedding", ctx, grid, 256, 0, gather<E, 4>, table, ids, y, T, D / 4);
  else
    launch("embedding", ctx, grid, 256, 0, gather<E, 1>, table, ids, y, T, D);
}

}  // namespace

void embedding(Context& ctx, const Embedding& a) {
  if (a.y.size() == 0) return;
  switch (a.table.dtype) {
    case Dtype::f32: return run<float>(ctx, a);
    case Dtype::bf16: return run<__nv_bfloat16>(ctx, a);
    default: return run<__half>(ctx, a);
  }
}

}  // namespace kda::cuda
