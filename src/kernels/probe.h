// kernels/probe.h — what this machine can do at most, measured: the bars that our kernels are held to.
#pragma once
#include <cstdint>
#include <memory>
#include <span>

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

// From pinned host memory to the device of a CUDA context: what loading a model is held to, beside reading its file.
double probe_pinned_copy_bytes_per_s(Context&);

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

}  // namespace kda
