// kernels/cuda/backend.cu — the CUDA row of the table; opening a device, or saying why there is none.
#include <algorithm>
#include <string>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/refusal.h"

namespace kda {
namespace cuda {
namespace {

// Launched once to learn whether this binary has code for the device.
__global__ void probe_kernel(int* out) {
  if (out) *out = 1;
}

// Errors after which CUDA refuses everything else in this process, with the same error.
bool lasting(cudaError_t e) {
  switch (e) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnknown: return true;
    default: return false;
  }
}

std::string advice(cudaError_t e) {
  if (e == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess)
      return cat("; ", free >> 20, " of the device's ", total >> 20, " MiB are free");
    return "";
  }
  if (e == cudaErrorECCUncorrectable || e == cudaErrorNvlinkUncorrectable || e == cudaErrorDevicesUnavailable ||
      e == cudaErrorUnknown)
    return "; the device was lost: nothing more runs on it in this process. nvidia-smi tells its state";
  if (lasting(e))
    return "; this, or a launch before it, failed on the device, and every later call in this process repeats this "
           "error. compute-sanitizer names the kernel";
  if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorUnsupportedPtxVersion)
    return cat("; this program has ", targets_in_words(KDA_CUDA_ARCHS));
  return "";
}

Found::Kernel outcome(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return Found::Kernel::ran;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: return Found::Kernel::no_code;
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx: return Found::Kernel::ptx_too_new;
    default: return Found::Kernel::failed;
  }
}

// Looks as far as each step allows.
Found look() {
  Found f;
  f.targets = KDA_CUDA_ARCHS;
  cudaRuntimeGetVersion(&f.runtime);
  if (cudaDriverGetVersion(&f.driver) != cudaSuccess) f.driver = 0;
  if (f.driver / 1000 < f.runtime / 1000) return f;
  const auto failed = [&](cudaError_t e) {
    cudaGetLastError();  // it is told; not to be seen again
    if (e != cudaSuccess) f.trouble = cudaGetErrorString(e);
    return e != cudaSuccess;
  };
  const cudaError_t listed = cudaGetDeviceCount(&f.devices);
  if (listed == cudaErrorNoDevice) {
    cudaGetLastError();
    return f;
  }
  if (failed(listed) || f.devices == 0) return f;
  cudaDeviceProp p{};
  if (failed(cudaGetDeviceProperties(&p, 0))) return f;
  f.name = p.name, f.major = p.major, f.minor = p.minor;
  if (p.major < 8) return f;
  probe_kernel<<<1, 1>>>(nullptr);
  cudaError_t e = cudaGetLastError();
  if (e == cudaSuccess) e = cudaDeviceSynchronize();
  f.kernel = outcome(e);
  failed(e);
  return f;
}

std::string unavailable() { return refusal(look()); }

void open(Context& ctx) {
  if (const std::string why = unavailable(); !why.empty()) throw Error(cat("CUDA: ", why));
  auto d = std::make_shared<Device>();
  KDA_CUDA(cudaGetDevice(&d->index));
  KDA_CUDA(cudaGetDeviceProperties(&d->properties, d->index));
  d->sms = d->properties.multiProcessorCount;
  d->l2_bytes = d->properties.l2CacheSize;
  d->shared_bytes = int64_t(d->properties.sharedMemPerBlockOptin);
  cudaFuncAttributes code{};
  KDA_CUDA(cudaFuncGetAttributes(&code, probe_kernel));
  d->arch = std::min(d->properties.major * 10 + d->properties.minor, code.ptxVersion);
  KDA_CUDA(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking));
  KDA_CUDA(cudaStreamCreateWithFlags(&d->copy_stream, cudaStreamNonBlocking));
  KDA_CUDA(cudaEventCreateWithFlags(&d->copied, cudaEventDisableTiming));
  KDA_CUDA(cudaEventCreateWithFlags(&d->computed, cudaEventDisableTiming));
  KDA_CUDA(cudaMalloc(reinterpret_cast<void**>(&d->tickets), kTickets * sizeof(unsigned)));
  KDA_CUDA(cudaMemset(d->tickets, 0, kTickets * sizeof(unsigned)));
  if (d->arch >= 90) KDA_CUDA(cudaMalloc(&d->chain_memory, kChainMemory));
  KDA_CUDA(cudaStreamSynchronize(nullptr));
  KDA_CUDA(cudaHostAlloc(&d->bounce, kBounceBytes, cudaHostAllocDefault));
  ctx.stream = d->stream;
  ctx.copy_stream = d->copy_stream;
  ctx.device = std::move(d);
}

class Graph final : public Recorded {
 public:
  explicit Graph(cudaGraphExec_t exec) : exec_(exec) {}
  ~Graph() override { cudaGraphExecDestroy(exec_); }
  void run(Context& ctx) override { KDA_CUDA(cudaGraphLaunch(exec_, stream_of(ctx))); }

 private:
  cudaGraphExec_t exec_;
};

std::unique_ptr<Recorded> record(Context& ctx, const std::function<void()>& work) {
  Device& device = device_of(ctx);
  cudaGraph_t graph = nullptr;
  KDA_CUDA(cudaStreamBeginCapture(stream_of(ctx), cudaStreamCaptureModeThreadLocal));
  device.recording = true;
  try {
    work();
    stream_of(ctx);  // launches what waits
  } catch (...) {
    device.recording = device.chain_waits = false;
    device.chain.reset();
    cudaStreamEndCapture(stream_of(ctx), &graph);
    cudaGetLastError();
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  device.recording = false;
  KDA_CUDA(cudaStreamEndCapture(stream_of(ctx), &graph));
  cudaGraphExec_t exec = nullptr;
  const cudaError_t e = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check(e, "cudaGraphInstantiate");
  return std::make_unique<Graph>(exec);
}

}  // namespace

void fail(cudaError_t e, const char* what) {
  if (!lasting(e)) cudaGetLastError();  // the next call starts anew
  throw Error(cat("CUDA: ", what, ": ", cudaGetErrorString(e), " (", cudaGetErrorName(e), ")", advice(e)));
}

// At the end of a program the driver may be gone before the last context: what fails here is of no interest.
Device::~Device() {
  if (stream) cudaStreamSynchronize(stream);
  gemm.reset();
  attention.reset();
  upload.reset();
  chain.reset();
  if (tickets) cudaFree(tickets);
  if (chain_memory) cudaFree(chain_memory);
  if (bounce) cudaFreeHost(bounce);
  if (copied) cudaEventDestroy(copied);
  if (computed) cudaEventDestroy(computed);
  if (stream) cudaStreamDestroy(stream);
  if (copy_stream) cudaStreamDestroy(copy_stream);
}

}  // namespace cuda

const Backend* cuda_backend() {
  static const Backend table{
      .name = "cuda",
      .activation = Dtype::bf16,
      .unavailable = cuda::unavailable,
      .open = cuda::open,
      .alloc = cuda::alloc,
      .copy = cuda::copy,
      .upload = cuda::upload,
      .record = cuda::record,
      .matmul_workspace = cuda::matmul_workspace,
      .matvec_workspace = cuda::matvec_workspace,
      .attention_workspace = cuda::attention_workspace,
      .kda_prefill_workspace = cuda::kda_prefill_workspace,
      .kda_decode_workspace = cuda::kda_decode_workspace,
      .embedding = cuda::embedding,
      .rms_norm = cuda::rms_norm,
      .add_rms_norm = cuda::add_rms_norm,
      .matmul = cuda::matmul,
      .matmul_relu2 = cuda::matmul_relu2,
      .matvec = cuda::matvec,
      .norm_matvec = cuda::norm_matvec,
      .norm_matvec_relu2 = cuda::norm_matvec_relu2,
      .matvec_add = cuda::matvec_add,
      .add_rows = cuda::add_rows,
      .add_bias = cuda::add_bias,
      .relu2 = cuda::relu2,
      .swiglu = cuda::swiglu,
      .rope = cuda::rope,
      .attention = cuda::attention,
      .conv_silu = cuda::conv_silu,
      .kda_prefill = cuda::kda_prefill,
      .kda_output = cuda::kda_output,
      .kda_decode = cuda::kda_decode,
      .sample = cuda::sample,
      .quantize_rows = cuda::quantize_rows,
  };
  return &table;
}

}  // namespace kda
