// kernels/cuda/memory.cu — device memory, copies either way, and weights from mapped files to the device.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"

namespace kda::cuda {

namespace {

cudaMemoryType place(const void* p) {
  cudaPointerAttributes a{};
  if (cudaPointerGetAttributes(&a, p) != cudaSuccess) {
    cudaGetLastError();
    return cudaMemoryTypeUnregistered;
  }
  return a.type;
}

bool on_device(cudaMemoryType t) { return t == cudaMemoryTypeDevice || t == cudaMemoryTypeManaged; }

// Pinned buffers that go round: threads fill one while the others travel.
struct Ring {
  static constexpr size_t kBytes = size_t(8) << 20;
  struct Part {
    char* data = nullptr;
    cudaEvent_t sent = nullptr;
  };
  std::array<Part, 4> part;
  size_t next = 0;

  Ring() {
    for (Part& p : part) {
      void* data = nullptr;
      KDA_CUDA(cudaHostAlloc(&data, kBytes, cudaHostAllocDefault));
      p.data = static_cast<char*>(data);
      KDA_CUDA(cudaEventCreateWithFlags(&p.sent, cudaEventDisableTiming));
    }
  }
  ~Ring() {
    for (Part& p : part) {
      if (p.sent) cudaEventSynchronize(p.sent);
      if (p.data) cudaFreeHost(p.data);
      if (p.sent) cudaEventDestroy(p.sent);
    }
  }
};

// Advice on a range of a mapped file; means nothing, and does no harm, elsewhere.
void advise(const char* from, size_t bytes, int what) {
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, what);
}

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

}  // namespace

Tensor alloc(Dtype dtype, Shape shape) {
  const size_t bytes = std::max<size_t>(size_t(shape.size()) * size_of(dtype), 256);
  void* p = nullptr;
  const cudaError_t e = cudaMalloc(&p, bytes);
  if (e != cudaSuccess) fail(e, cat("allocating ", bytes, " bytes for ", name_of(dtype), " ", shape).c_str());
  Tensor t;
  t.storage = std::shared_ptr<void>(p, [](void* q) { cudaFree(q); });
  t.v = {p, dtype, shape};
  // Zeros are there before any stream can look: contexts' streams do not wait for this one.
  KDA_CUDA(cudaMemset(p, 0, bytes));
  KDA_CUDA(cudaStreamSynchronize(nullptr));
  return t;
}

void copy(Context& ctx, void* dst, const void* src, size_t bytes) {
  if (bytes == 0) return;
  Device& d = device_of(ctx);
  const cudaStream_t stream = stream_of(ctx);
  if (const cudaMemoryType to = place(dst); !on_device(to)) {
    const bool small = bytes <= kBounceBytes;  // pageable memory would go through a slower path of the driver's
    KDA_CUDA(cudaMemcpyAsync(small ? d.bounce : dst, src, bytes, cudaMemcpyDefault, stream));
    KDA_CUDA(cudaStreamSynchronize(stream));
    if (small) std::memcpy(dst, d.bounce, bytes);
    return;
  }
  KDA_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream));
  // From pageable memory the bytes have been taken by now; from pinned memory they have not.
  if (place(src) == cudaMemoryTypeHost) KDA_CUDA(cudaStreamSynchronize(stream));
}

// Threads read the file, or copy from memory, into pinned memory, ahead of the copy engine. Reading is twice as fast as
// copying from the mapping, whose pages would have to be entered one by one. Returns when the source has been read; what
// comes later on the compute stream finds dst filled.
void upload(Context& ctx, void* dst, const HostBytes& source) {
  const void* const src = source.data;
  const size_t bytes = source.bytes;
  constexpr size_t kTask = size_t(512) << 10, kAhead = size_t(64) << 20;
  if (bytes <= kBounceBytes || !ctx.pool || on_device(place(src))) return copy(ctx, dst, src, bytes);
  Device& d = device_of(ctx);
  if (!d.upload) d.upload = std::make_shared<Ring>();
  Ring& ring = *static_cast<Ring*>(d.upload.get());
  const cudaStream_t to = d.copy_stream;
  KDA_CUDA(cudaEventRecord(d.computed, stream_of(ctx)));  // whoever used dst before is done with it
  KDA_CUDA(cudaStreamWaitEvent(to, d.computed, 0));
  const char* from = static_cast<const char*>(src);
  if (source.file < 0) advise(from, std::min(bytes, kAhead), MADV_WILLNEED);
  for (size_t at = 0; at < bytes; at += Ring::kBytes) {
    if (source.file < 0 && at + kAhead < bytes)
      advise(from + at + kAhead, std::min(Ring::kBytes, bytes - at - kAhead), MADV_WILLNEED);
    Ring::Part& part = ring.part[ring.next++ % ring.part.size()];
    const size_t n = std::min(Ring::kBytes, bytes - at);
    KDA_CUDA(cudaEventSynchronize(part.sent));
    ctx.pool->run(int64_t((n + kTask - 1) / kTask), [&](int64_t task, int) {
      const size_t b = size_t(task) * kTask, m = std::min(kTask, n - b);
      if (source.file < 0) {
        advise(from + at + b, m, MADV_POPULATE_READ);
        std::memcpy(part.data + b, from + at + b, m);
        return;
      }
      for (size_t have = 0; have < m;) {
        const ssize_t got = pread(source.file, part.data + b + have, m - have, off_t(source.offset) + off_t(at + b + have));
        if (got < 0 && errno == EINTR) continue;
        KDA_CHECK(got > 0, "upload: the file ends or fails ", bytes - (at + b + have), " bytes early: ",
                  got < 0 ? std::strerror(errno) : "end of file");
        have += size_t(got);
      }
    });
    KDA_CUDA(cudaMemcpyAsync(static_cast<char*>(dst) + at, part.data, n, cudaMemcpyHostToDevice, to));
    KDA_CUDA(cudaEventRecord(part.sent, to));
  }
  KDA_CUDA(cudaEventRecord(d.copied, to));
  KDA_CUDA(cudaStreamWaitEvent(stream_of(ctx), d.copied, 0));
}

}  // namespace kda::cuda
