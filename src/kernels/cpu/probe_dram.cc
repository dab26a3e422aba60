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
  if (streams == 4) return read_streams<4>(p, bytes, ahead);
  return read_streams<8>(p, bytes, ahead);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {
HWY_EXPORT(ReadAll);
}

namespace {
constexpr int64_t kBytes = int64_t(1) << 30, kTask = 512 << 10;
constexpr int kPasses = 5;

template <class F>
double median(F f) {
  std::vector<double> v;
  for (int i = 0; i < kPasses; ++i) v.push_back(f());
  std::sort(v.begin(), v.end());
  return v[kPasses / 2];
}
}  // namespace

DramProbe::DramProbe(ThreadPool& pool) : pool_(pool), buffer_(host_tensor(Dtype::u8, {kBytes})) {
  struct Way {
    int streams;
    int64_t ahead;
  };
  double most = 0;
  Way best{1, 0};
  for (const Way w : {Way{1, 0}, Way{1, 4096}, Way{2, 0}, Way{4, 0}, Way{4, 2048}, Way{8, 0}}) {
    streams_ = w.streams;
    ahead_ = w.ahead;
    const double rate = median([&] { return bytes_per_s(); });
    if (rate > most) most = rate, best = w;
  }
  streams_ = best.streams;
  ahead_ = best.ahead;
}

double DramProbe::bytes_per_s() {
  const auto* p = buffer_.v.as<uint8_t>();
  const auto read = HWY_DYNAMIC_DISPATCH(cpu::ReadAll);
  std::vector<uint64_t> sums(size_t(pool_.threads()) * 8);  // used below, so that the reads are not left out
  const auto from = std::chrono::steady_clock::now();
  pool_.run(kBytes / kTask,
            [&](int64_t t, int worker) { sums[size_t(worker) * 8] += read(p + t * kTask, kTask, streams_, ahead_); });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
  KDA_CHECK(std::all_of(sums.begin(), sums.end(), [](uint64_t s) { return s == 0; }), "probe: the buffer changed");
  return double(kBytes) / seconds;
}

double probe_dram_read_bytes_per_s(ThreadPool& pool) {
  DramProbe probe(pool);
  return median([&] { return probe.bytes_per_s(); });
}

}  // namespace kda
#endif
