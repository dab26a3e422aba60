// kernels/probe.h — what this machine can do at most, measured: the bars that our kernels are held to.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/parallel.h"
#include "kernels/backend.h"

namespace kda {

// Reading DRAM with all threads of the pool: a buffer of 1 GiB in huge pages, by the fastest of a few plain reading
// loops, which the constructor finds out.
class DramProbe {
 public:
  explicit DramProbe(ThreadPool&);
  double bytes_per_s();  // of one pass, now

 private:
  ThreadPool& pool_;
  Tensor buffer_;
  int streams_ = 1;
  int64_t ahead_ = 0;
};

// The median of several passes.
double probe_dram_read_bytes_per_s(ThreadPool&);

// `count` products y[rows,N] = x[rows,K] W[N,K]^T, as one layer of a model has them.
struct GemmShape {
  int64_t N, K, count;
};

// oneDNN's GEMM on one shape: bf16 operands under `fast` where the CPU has them and f32 otherwise, W packed beforehand
// in the library's own layout, each thread on blocks of columns or rows of its own. The constructor tries several ways
// of cutting y into blocks and keeps the fastest.
class GemmProbe {
 public:
  GemmProbe(ThreadPool&, int64_t rows, const GemmShape&, Precision = Precision::fast);
  ~GemmProbe();
  GemmProbe(GemmProbe&&) noexcept;

  double seconds();  // of one whole product, now

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Floating-point operations per second (2 rows N K each) over all shapes: each one's median of `passes`.
double probe_gemm_flops_per_s(ThreadPool&, int64_t rows, std::span<const GemmShape> shapes, int passes = 5);

// ---- a CUDA context's device; these throw Error on any other context

struct DeviceStatus {
  std::string name;  // as the driver has it
  int64_t memory_bytes, free_bytes;
};
DeviceStatus device_status(const Context&);

// Milliseconds from the start of what `work` puts on the compute stream to its end, by the device's clock. `before` is
// put there first and not counted: it also gives the host a start, so that launches are not waited for.
double device_ms(Context&, const std::function<void()>& before, const std::function<void()>& work);

// Reading device memory, copying within it (bytes read + bytes written), and copying to it from pinned host memory
// (what loading a model is held to, beside reading its file); the median of several passes over more than any cache
// holds.
double probe_device_read_bytes_per_s(Context&);
double probe_device_copy_bytes_per_s(Context&);
double probe_pinned_copy_bytes_per_s(Context&);

}  // namespace kda
