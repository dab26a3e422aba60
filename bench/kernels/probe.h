// bench/kernels/probe.h — what a kernel's figures are measured against, and how they are timed.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/backend.h"

namespace kda::bench {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sorted ms of f, run for `budget` seconds and at least 5 times.
inline std::vector<double> time_ms(double budget, const std::function<void()>& f) {
  f();
  std::vector<double> ms;
  for (const double end = seconds() + budget; ms.size() < 5 || seconds() < end;) {
    const double t = seconds();
    f();
    ms.push_back((seconds() - t) * 1e3);
  }
  std::sort(ms.begin(), ms.end());
  return ms;
}

// Eight independent chains of the compiler's widest vectors, for each target the CPU may have.
__attribute__((target_clones("avx512f", "avx2,fma", "default"), noinline)) inline float multiply_adds(int64_t rounds) {
  constexpr int kLanes = 128;
  float a[kLanes];
  for (int l = 0; l < kLanes; ++l) a[l] = float(l);
  for (int64_t i = 0; i < rounds; ++i)
    for (int l = 0; l < kLanes; ++l) a[l] = __builtin_fmaf(a[l], 0.999f, 0.5f);
  float sum = 0;
  for (float x : a) sum += x;
  return sum;
}

// Multiplications and additions per second of fp32 on registers, all threads.
inline double probe_flops(Context& ctx) {
  constexpr int64_t kRounds = 4000000;
  std::vector<float> sink(size_t(ctx.pool->threads()));
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const double t = seconds();
    ctx.pool->run(ctx.pool->threads(), [&](int64_t n, int) { sink[size_t(n)] = multiply_adds(kRounds); });
    best = std::max(best, 2.0 * 128 * kRounds * ctx.pool->threads() / (seconds() - t));
  }
  return best;
}

// Bytes read and written per second by a copy of memory larger than any cache.
inline double probe_copy(Context& ctx) {
  const int64_t block = 1 << 20, blocks = 256;
  Tensor a = host_tensor(Dtype::u8, {block * blocks}), b = host_tensor(Dtype::u8, {block * blocks});
  double best = 0;
  for (int i = 0; i < 4; ++i) {
    const double t = seconds();
    ctx.pool->run(blocks, [&](int64_t n, int) {
      std::memcpy(b.v.as<uint8_t>() + n * block, a.v.as<uint8_t>() + n * block, size_t(block));
    });
    if (i) best = std::max(best, 2.0 * double(block) * double(blocks) / (seconds() - t));
  }
  return best;
}

}  // namespace kda::bench
