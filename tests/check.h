// tests/check.h — values for tests, guarded buffers, and the comparisons every numeric test uses.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "kernels/backend.h"

namespace kda::test {

// Values in (-size,size), the same on every run, drawn from a name.
inline std::vector<float> values(const std::string& name, int64_t n, float size = 1) {
  uint64_t s = 1469598103934665603ull;
  for (char c : name) s = (s ^ uint64_t(uint8_t(c))) * 1099511628211ull;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) {
    s += 0x9e3779b97f4a7c15ull;
    uint64_t z = s;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    x = size * float(int64_t(z ^ (z >> 31)) >> 40) / float(1 << 23);
  }
  return v;
}

// f32 memory of a backend between two guards. Outputs start as NaN: what is left unwritten, or written outside, shows.
class Buffer {
 public:
  Buffer(Context& ctx, const std::vector<float>& v) : ctx_(ctx), host_(v.size() + 2 * kGuard, 7.0f) {
    std::copy(v.begin(), v.end(), host_.begin() + kGuard);
    memory_ = ctx.backend->alloc(Dtype::f32, {int64_t(host_.size())});
    ctx.backend->copy(ctx, memory_.v.data, host_.data(), host_.size() * sizeof(float));
  }
  Buffer(Context& ctx, int64_t n)
      : Buffer(ctx, std::vector<float>(static_cast<size_t>(n), std::numeric_limits<float>::quiet_NaN())) {}

  float* data() const { return memory_.v.as<float>() + kGuard; }
  View view(Shape s) const { return {data(), Dtype::f32, s}; }
  std::vector<float> fetch() {
    ctx_.backend->copy(ctx_, host_.data(), memory_.v.data, host_.size() * sizeof(float));
    return {host_.begin() + kGuard, host_.end() - kGuard};
  }
  bool guards_intact() {
    fetch();
    const auto ok = [](float x) { return x == 7.0f; };
    return std::all_of(host_.begin(), host_.begin() + kGuard, ok) && std::all_of(host_.end() - kGuard, host_.end(), ok);
  }

 private:
  static constexpr int64_t kGuard = 64;
  Context& ctx_;
  std::vector<float> host_;
  Tensor memory_;
};

// max |got - want| <= tolerance * scale, where `scale` is the size of the terms that were added up, NOT of the result:
// where terms cancel, the result is small and its rounding error is not. A NaN is infinitely far.
template <class A, class B>
testing::AssertionResult close(const A& got, const B& want, double tolerance, double scale) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << "sizes differ: " << got.size() << " and " << want.size();
  double worst = -1;
  size_t at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    double error = std::abs(double(got[i]) - double(want[i]));
    if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
    if (error > worst) worst = error, at = i;
  }
  if (got.size() == 0 || worst <= tolerance * scale) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "worst |difference| " << worst << " at " << at << " (got " << double(got[at])
                                     << ", want " << double(want[at]) << "), allowed " << tolerance << " * " << scale;
}

// ||got - want|| / ||want||; infinite where anything is NaN.
template <class A, class B>
double relative_l2(const A& got, const B& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = double(got[i]) - double(want[i]);
    error += d * d;
    norm += double(want[i]) * double(want[i]);
  }
  const double r = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  return std::isnan(r) || got.size() != want.size() ? std::numeric_limits<double>::infinity() : r;
}

// max |got - want| / max |want|
template <class A, class B>
double relative_max(const A& got, const B& want) {
  double error = 0, most = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = std::abs(double(got[i]) - double(want[i]));
    if (std::isnan(d)) return std::numeric_limits<double>::infinity();
    error = std::max(error, d);
    most = std::max(most, std::abs(double(want[i])));
  }
  return got.size() != want.size() ? std::numeric_limits<double>::infinity() : most > 0 ? error / most : error;
}

// A CPU context with its own pool and a workspace.
struct CpuContext : Context {
  explicit CpuContext(int threads = 2, Precision p = Precision::exact, size_t workspace_bytes = size_t(64) << 20)
      : pool_(threads) {
    backend = &cpu_backend();
    pool = &pool_;
    precision = p;
    workspace = host_tensor(Dtype::u8, {int64_t(workspace_bytes)});
  }

 private:
  ThreadPool pool_;
};

}  // namespace kda::test
