#include "kernels/probe.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/probe_dram.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include <algorithm>
#include <chrono>

#include "base/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The sum of `bytes` as u64, read in `streams` equal parts side by side, prefetching `ahead` bytes.
template <int kStreams>
uint64_t read_streams(const uint8_t* p, int64_t bytes, int64_t ahead) {
  const hn::ScalableTag<uint64_t> d;
  const int64_t lanes = int64_t(hn::Lanes(d)), part = bytes / kStreams, line = 64;
  hn::Vec<decltype(d)> sum[kStreams];
  for (auto& s : sum) s = hn::Zero(d);
  for (int64_t i = 0; i < part; i += line)
    for (int k = 0; k < kStreams; ++k) {
      const auto* q = reinterpret_cast<const uint64_t*>(p + k * part + i);
      if (ahead) hwy::Prefetch(p + k * part + i + ahead);
      for (int64_t j = 0; j < line / 8; j += lanes) sum[k] = hn::Add(sum[k], hn::Load(d, q + j));
    }
  for (int k = 1; k < kStreams; ++k) sum[0] = hn::Add(sum[0], sum[k]);
  return hn::GetLane(hn::SumOfLanes(d, sum[0]));
}

uint64_t ReadAll(const uint8_t* p, int64_t bytes, int streams, int64_t ahead) {
  if (streams == 1) return read_streams<1>(p, bytes, ahead);
  if (streams == 2) return read_streams<2>(p, bytes, ahead);
  return read_streams<4>(p, bytes, ahead);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {
HWY_EXPORT(ReadAll);
}

double probe_dram_read_bytes_per_s(ThreadPool& pool) {
  constexpr int64_t kBytes = int64_t(1) << 30, kTask = 256 << 10;
  constexpr int kPasses = 7;
  const Tensor buffer = host_tensor(Dtype::u8, {kBytes});
  const auto* p = buffer.v.as<uint8_t>();
  const auto read = HWY_DYNAMIC_DISPATCH(cpu::ReadAll);
  std::vector<uint64_t> sums(size_t(pool.threads()) * 8);  // kept, so that the reads are
  double best = 0;
  struct Way {
    int streams;
    int64_t ahead;
  };
  for (const Way w : {Way{1, 0}, Way{1, 2048}, Way{1, 8192}, Way{2, 0}, Way{2, 4096}, Way{4, 0}, Way{4, 2048}}) {
    std::vector<double> rates;
    for (int pass = 0; pass < kPasses; ++pass) {
      const auto from = std::chrono::steady_clock::now();
      pool.run(kBytes / kTask, [&](int64_t t, int worker) {
        sums[size_t(worker) * 8] += read(p + t * kTask, kTask, w.streams, w.ahead);
      });
      rates.push_back(double(kBytes) / std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count());
    }
    std::sort(rates.begin(), rates.end());
    best = std::max(best, rates[kPasses / 2]);
  }
  KDA_CHECK(std::all_of(sums.begin(), sums.end(), [](uint64_t s) { return s == 0; }), "probe: the buffer changed");
  return best;
}

}  // namespace kda
#endif
