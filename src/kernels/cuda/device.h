// kernels/cuda/device.h — what the CUDA bodies share: the device behind a context, checked calls, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <utility>

#include "kernels/backend.h"

namespace kda::cuda {

// Behind Context::device, made by open(). One context is used by one thread at a time.
struct Device {
  int index = 0;
  cudaDeviceProp properties{};
  int sms = 0;
  int64_t l2_bytes = 0;
  int64_t shared_bytes = 0;  // that a block may ask for
  int arch = 0;              // 90 for sm_90; less where this binary brings only PTX of an older one
  cudaStream_t stream = nullptr, copy_stream = nullptr;
  cudaEvent_t copied = nullptr, computed = nullptr;  // where either stream waits for the other
  unsigned* tickets = nullptr;  // zeros, kTickets of them: where the blocks of a launch count who comes last
  void* chain_memory = nullptr;                      // kChainMemory bytes, from sm_90 on (chain.cu)
  void* bounce = nullptr;                            // pinned: small copies to the host go through it
  // Handles and plans of the libraries, made by the files that use them, at first use.
  std::shared_ptr<void> gemm, attention, upload;
  void* encode_tensor_map = nullptr;  // the driver's cuTensorMapEncodeTiled, once it was looked for
  std::shared_ptr<void> chain;  // ops of few rows that wait to be launched together (chain.h)
  bool chain_waits = false;     // there are such
  bool recording = false;
  int sm90a_code = -1;  // whether this binary has machine code for sm_90a that runs here; -1: not known yet

  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();
};

inline constexpr size_t kBounceBytes = 64 << 10;
inline constexpr size_t kTickets = 1024;
inline constexpr size_t kChainMemory = size_t(8) << 20;

inline Device& device_of(const Context& ctx) { return *static_cast<Device*>(ctx.device.get()); }
void launch_chain(const Context&);
// To launch something on, or to wait for: what waits in the chain is launched before.
inline cudaStream_t stream_of(const Context& ctx) {
  if (device_of(ctx).chain_waits) launch_chain(ctx);
  return static_cast<cudaStream_t>(ctx.stream);
}

// Throws Error with what was called, CUDA's words for the failure and what to do about it.
[[noreturn]] void fail(cudaError_t, const char* what);
inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) fail(e, what);
}
// After a launch: throws where it was refused, or where an earlier launch is known to have failed.
inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

#define KDA_CUDA(call) ::kda::cuda::check((call), #call)

// launch(op, ctx, grid, block, shared_bytes, kernel, arguments..): a checked launch on the context's stream.
template <class... P, class... A>
void launch(const char* op, const Context& ctx, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...),
            A&&... a) {
  kernel<<<grid, block, shared_bytes, stream_of(ctx)>>>(static_cast<P>(std::forward<A>(a))...);
  check_launch(op);
}

// The same, and where the device can (sm_90) the kernel starts while the one before it drains: it must call
// wait_for_previous() before it touches what that one writes or reads.
template <class... P, class... A>
void launch_early(const char* op, const Context& ctx, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...),
                  A&&... a) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = &early;
  config.numAttrs = device_of(ctx).arch >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(a))...), op);
}

#ifdef __CUDACC__
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// Lets the next kernel of the stream start, where that was launched early.
__device__ inline void release_next() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
#endif

// Raises a kernel's limit of dynamic shared memory above 48 KB. Once per kernel and size is enough; it is cheap.
template <class... P>
void allow_shared(void (*kernel)(P...), size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
}

// Elements of a view, as the device's type.
inline const __nv_bfloat16* bf16_of(const ConstView& v) { return reinterpret_cast<const __nv_bfloat16*>(v.as<bf16>()); }
inline __nv_bfloat16* bf16_of(const View& v) { return reinterpret_cast<__nv_bfloat16*>(v.as<bf16>()); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kda::cuda
