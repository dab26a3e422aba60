// bench/kernels/cuda_device.h — a CUDA context for benchmarks, timing on its stream, and what the device can do at
// most, probed in the same run.
#pragma once
#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

#include "base/parallel.h"
#include "kernels/backend.h"
#include "kernels/matmul.h"

namespace kda::bench {

// Why there is nothing to measure here; empty where a device answers.
inline std::string no_cuda() {
  return cuda_backend() ? cuda_backend()->unavailable() : "this program was built without CUDA";
}

struct CudaContext : Context {
  explicit CudaContext(size_t workspace_bytes) {
    backend = cuda_backend();
    pool = &pool_;
    backend->open(*this);
    workspace = backend->alloc(Dtype::u8, {int64_t(workspace_bytes)});
    spot_ = backend->alloc(Dtype::u8, {256});
  }
  // Waits for all that was launched.
  void wait() {
    char byte;
    backend->copy(*this, &byte, spot_.v.data, 1);
  }

 private:
  ThreadPool pool_;
  Tensor spot_;
};

// Fills device memory with bf16 (or f32) values in (-1,1): zeros would let products run faster than they do.
inline Tensor random_tensor(Context& ctx, Dtype d, Shape s, float size = 1) {
  std::vector<char> host(size_t(s.size()) * size_of(d));
  uint64_t state = 88172645463325252ull + uint64_t(s.size());
  for (int64_t i = 0; i < s.size(); ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    const float v = size * (float(int64_t(state >> 40)) / float(1 << 23) - 1);
    if (d == Dtype::bf16)
      reinterpret_cast<bf16*>(host.data())[i] = bf16(v);
    else
      reinterpret_cast<float*>(host.data())[i] = v;
  }
  Tensor t = ctx.backend->alloc(d, s);
  const Transfer all{t.v.data, {host.data(), host.size()}};
  ctx.backend->upload(ctx, {&all, 1});
  return t;
}

struct Times {
  double p10, p50, p90;  // ms of one call
};

// Groups of calls between two waits, each group some milliseconds long.
inline Times time_on_device(CudaContext& ctx, double budget_s, const std::function<void()>& f) {
  using Clock = std::chrono::steady_clock;
  const auto group = [&](int n) {
    ctx.wait();
    const auto from = Clock::now();
    for (int i = 0; i < n; ++i) f();
    ctx.wait();
    return std::chrono::duration<double, std::milli>(Clock::now() - from).count();
  };
  for (int i = 0; i < 3; ++i) f();
  const int n = std::max(3, int(4.0 / std::max(group(3) / 3, 1e-3)));
  std::vector<double> ms;
  const auto end = Clock::now() + std::chrono::duration<double>(budget_s);
  while (ms.size() < 7 || Clock::now() < end) ms.push_back(group(n) / n);
  std::sort(ms.begin(), ms.end());
  return {ms[ms.size() / 10], ms[ms.size() / 2], ms[ms.size() * 9 / 10]};
}

// Bytes read and written per second by a copy inside the device's memory.
inline double probe_device_copy(CudaContext& ctx) {
  const int64_t bytes = int64_t(1) << 30;
  const Tensor a = ctx.backend->alloc(Dtype::u8, {bytes}), b = ctx.backend->alloc(Dtype::u8, {bytes});
  const Times t = time_on_device(ctx, 0.2, [&] { ctx.backend->copy(ctx, a.v.data, b.v.data, size_t(bytes)); });
  return 2.0 * double(bytes) / (t.p50 * 1e-3);
}

// Operations per second of cuBLASLt's product of 8192 x 8192 x 8192 in bf16.
inline double probe_device_gemm(CudaContext& ctx) {
  const int64_t n = 8192;
  const Tensor x = random_tensor(ctx, Dtype::bf16, {n, n}), w = random_tensor(ctx, Dtype::bf16, {n, n}),
               y = ctx.backend->alloc(Dtype::bf16, {n, n});
  const MatmulSegment s{.w = {w, {}}, .y = y};
  const Times t = time_on_device(ctx, 0.4, [&] { matmul(ctx, {.x = x, .segments = {&s, 1}}); });
  return 2.0 * double(n) * double(n) * double(n) / (t.p50 * 1e-3);
}

}  // namespace kda::bench
