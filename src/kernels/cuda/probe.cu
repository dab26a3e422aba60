// kernels/cuda/probe.cu — what the way from pinned host memory to the device can carry.
#include "kernels/probe.h"

#include <algorithm>

#include "kernels/cuda/device.h"

namespace kda {

double probe_pinned_copy_bytes_per_s(Context& ctx) {
  constexpr size_t kBytes = size_t(256) << 20;
  const Tensor there = ctx.backend->alloc(Dtype::u8, {int64_t(kBytes)});
  void* here = nullptr;
  KDA_CUDA(cudaHostAlloc(&here, kBytes, cudaHostAllocDefault));
  const std::shared_ptr<void> owner(here, [](void* p) { cudaFreeHost(p); });
  cudaEvent_t from = nullptr, to = nullptr;
  KDA_CUDA(cudaEventCreate(&from));
  KDA_CUDA(cudaEventCreate(&to));
  const cudaStream_t stream = cuda::device_of(ctx).copy_stream;
  float best = 0;
  for (int i = 0; i < 5; ++i) {
    KDA_CUDA(cudaEventRecord(from, stream));
    KDA_CUDA(cudaMemcpyAsync(there.v.data, here, kBytes, cudaMemcpyHostToDevice, stream));
    KDA_CUDA(cudaEventRecord(to, stream));
    KDA_CUDA(cudaEventSynchronize(to));
    float ms = 0;
    KDA_CUDA(cudaEventElapsedTime(&ms, from, to));
    if (i) best = best == 0 ? ms : std::min(best, ms);
  }
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  return double(kBytes) / (double(best) * 1e-3);
}

}  // namespace kda
