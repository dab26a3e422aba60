// kernels/cuda/memory.cu — device memory, copies either way, and weights from mapped files to the device.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

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

// Each thread's two pinned buffers: one is filled while the other travels. A thread makes its own when it first needs
// them: pinning takes a millisecond for each, in which the others work.
struct Lanes {
  static constexpr size_t kBytes = size_t(2) << 20;
  struct Buffer {
    char* data = nullptr;
    cudaEvent_t sent = nullptr;
  };
  std::vector<std::array<Buffer, 2>> lane;
  std::vector<size_t> next;

  explicit Lanes(int threads) : lane(size_t(threads)), next(size_t(threads), 0) {}
  // The one of thread w that has been sent, or is new.
  Buffer& take(size_t w) {
    Buffer& b = lane[w][next[w]++ % 2];
    if (b.sent) {
      KDA_CUDA(cudaEventSynchronize(b.sent));
      return b;
    }
    void* data = nullptr;
    KDA_CUDA(cudaHostAlloc(&data, kBytes, cudaHostAllocDefault));
    b.data = static_cast<char*>(data);
    KDA_CUDA(cudaEventCreateWithFlags(&b.sent, cudaEventDisableTiming));
    return b;
  }
  ~Lanes() {
    for (auto& two : lane)
      for (Buffer& b : two) {
        if (b.sent) cudaEventSynchronize(b.sent);
        if (b.data) cudaFreeHost(b.data);
        if (b.sent) cudaEventDestroy(b.sent);
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

// Bytes at .. at + n of a source. A file is read rather than its mapping copied, whose pages would have to be entered
// one by one: twice as fast.
void fetch(const HostBytes& from, size_t at, size_t n, char* to) {
  if (from.file < 0) {
    const char* p = static_cast<const char*>(from.data) + at;
    advise(p, n, MADV_POPULATE_READ);
    std::memcpy(to, p, n);
    return;
  }
  for (size_t have = 0; have < n;) {
    const ssize_t got = pread(from.file, to + have, n - have, off_t(from.offset) + off_t(at + have));
    if (got < 0 && errno == EINTR) continue;
    KDA_CHECK(got > 0, "upload: a file ends, or cannot be read, ", from.bytes - at - have,
              " bytes early: ", got < 0 ? std::strerror(errno) : "end of file");
    have += size_t(got);
  }
}

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

// Pieces of all transfers go to whichever thread is free, which reads them into its pinned buffers and sends them: no
// thread waits for another, and the copy engine is fed by all.
void upload(Context& ctx, std::span<const Transfer> all) {
  struct Piece {
    const Transfer* of;
    size_t at, bytes;
  };
  std::vector<Piece> pieces;
  for (const Transfer& t : all) {
    if (t.from.bytes && on_device(place(t.from.data))) {
      copy(ctx, t.to, t.from.data, t.from.bytes);
      continue;
    }
    for (size_t at = 0; at < t.from.bytes; at += Lanes::kBytes)
      pieces.push_back({&t, at, std::min(Lanes::kBytes, t.from.bytes - at)});
  }
  if (pieces.empty()) return;
  if (!ctx.pool || (pieces.size() == 1 && pieces[0].bytes <= kBounceBytes && pieces[0].of->from.file < 0)) {
    for (const Piece& p : pieces)
      copy(ctx, static_cast<char*>(p.of->to) + p.at, static_cast<const char*>(p.of->from.data) + p.at, p.bytes);
    return;
  }
  Device& d = device_of(ctx);
  if (!d.upload) d.upload = std::make_shared<Lanes>(ctx.pool->threads());
  Lanes& lanes = *static_cast<Lanes*>(d.upload.get());
  const cudaStream_t to = d.copy_stream;
  KDA_CUDA(cudaEventRecord(d.computed, stream_of(ctx)));  // whoever used the targets before is done with them
  KDA_CUDA(cudaStreamWaitEvent(to, d.computed, 0));
  ctx.pool->run(int64_t(pieces.size()), [&](int64_t i, int worker) {
    KDA_CUDA(cudaSetDevice(d.index));
    const Piece& p = pieces[size_t(i)];
    const Lanes::Buffer& b = lanes.take(size_t(worker));
    fetch(p.of->from, p.at, p.bytes, b.data);
    KDA_CUDA(cudaMemcpyAsync(static_cast<char*>(p.of->to) + p.at, b.data, p.bytes, cudaMemcpyHostToDevice, to));
    KDA_CUDA(cudaEventRecord(b.sent, to));
  });
  KDA_CUDA(cudaEventRecord(d.copied, to));
  KDA_CUDA(cudaStreamWaitEvent(stream_of(ctx), d.copied, 0));
}

}  // namespace kda::cuda
