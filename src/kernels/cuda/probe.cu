// kernels/cuda/probe.cu — what a device can do at most, and its clock.
#include <algorithm>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/probe.h"

namespace kda {

namespace {

using namespace cuda;

constexpr int64_t kPassBytes = int64_t(2) << 30;
constexpr int kPasses = 9;

// Sixteen bytes a load, `kDeep` loads on their way a thread.
template <int kDeep>
__global__ void __launch_bounds__(256) read_kernel(const uint4* from, int64_t n, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x, me = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  for (int64_t i = me; i < n; i += kDeep * threads) {
    uint4 x[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) x[k] = __ldcs(from + min(i + k * threads, n - 1));
#pragma unroll
    for (int k = 0; k < kDeep; ++k) sum += x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  if (sum == 0x12345678) *sink = sum;  // so that the loads matter
}

__global__ void fill_kernel(uint32_t* to, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = uint32_t(i) * 2654435761u;
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { KDA_CUDA(cudaEventCreate(&event)); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

void need_cuda(const Context& ctx) {
  KDA_CHECK(ctx.backend == cuda_backend() && ctx.device, "a probe of a CUDA device needs a CUDA context, got one of ",
            ctx.backend ? ctx.backend->name : "nothing");
}

// Per second, the median of kPasses.
double rate(Context& ctx, double bytes, const std::function<void()>& work) {
  std::vector<double> ms;
  work();
  for (int i = 0; i < kPasses; ++i)
    ms.push_back(device_ms(
        ctx, [] {}, work));
  std::sort(ms.begin(), ms.end());
  return bytes / ms[kPasses / 2] * 1e3;
}

Tensor filled(Context& ctx) {
  Tensor t = ctx.backend->alloc(Dtype::u8, {kPassBytes});
  launch("probe", ctx, 1024, 256, 0, fill_kernel, static_cast<uint32_t*>(t.v.data), kPassBytes / 4);
  return t;
}

}  // namespace

DeviceStatus device_status(const Context& ctx) {
  need_cuda(ctx);
  size_t free = 0, total = 0;
  KDA_CUDA(cudaMemGetInfo(&free, &total));
  return {device_of(ctx).properties.name, int64_t(total), int64_t(free)};
}

double device_ms(Context& ctx, const std::function<void()>& before, const std::function<void()>& work) {
  need_cuda(ctx);
  const Event from, to;
  before();
  KDA_CUDA(cudaEventRecord(from.event, stream_of(ctx)));
  work();
  KDA_CUDA(cudaEventRecord(to.event, stream_of(ctx)));
  KDA_CUDA(cudaEventSynchronize(to.event));
  float ms = 0;
  KDA_CUDA(cudaEventElapsedTime(&ms, from.event, to.event));
  return ms;
}

double probe_device_read_bytes_per_s(Context& ctx) {
  need_cuda(ctx);
  const Tensor memory = filled(ctx), sink = ctx.backend->alloc(Dtype::i32, {1});
  const auto* from = static_cast<const uint4*>(memory.v.data);
  const int64_t n = kPassBytes / int64_t(sizeof(uint4));
  double best = 0;
  for (int blocks : {4, 8})
    for (const auto kernel : {read_kernel<4>, read_kernel<8>})
      best = std::max(best, rate(ctx, double(kPassBytes), [&] {
                        launch("probe", ctx, unsigned(blocks * device_of(ctx).sms), 256, 0, kernel, from, n,
                               static_cast<uint32_t*>(sink.v.data));
                      }));
  return best;
}

double probe_device_copy_bytes_per_s(Context& ctx) {
  need_cuda(ctx);
  const Tensor a = filled(ctx), b = filled(ctx);
  return rate(ctx, 2.0 * double(kPassBytes), [&] {
    KDA_CUDA(cudaMemcpyAsync(b.v.data, a.v.data, size_t(kPassBytes), cudaMemcpyDeviceToDevice, stream_of(ctx)));
  });
}

double probe_pinned_copy_bytes_per_s(Context& ctx) {
  need_cuda(ctx);
  constexpr size_t kBytes = size_t(512) << 20;
  void* pinned = nullptr;
  KDA_CUDA(cudaHostAlloc(&pinned, kBytes, cudaHostAllocDefault));
  const std::shared_ptr<void> owner(pinned, [](void* p) { cudaFreeHost(p); });
  std::fill_n(static_cast<uint8_t*>(pinned), kBytes, uint8_t(7));
  const Tensor to = ctx.backend->alloc(Dtype::u8, {int64_t(kBytes)});
  return rate(ctx, double(kBytes),
              [&] { KDA_CUDA(cudaMemcpyAsync(to.v.data, pinned, kBytes, cudaMemcpyHostToDevice, stream_of(ctx))); });
}

}  // namespace kda
