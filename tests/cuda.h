// tests/cuda.h — a CUDA context and device memory for tests. They compile in every build, and are skipped, with the
// reason, where no device answers.
#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/check.h"

namespace kda::test {

// Why no CUDA test can run here; empty where one can.
inline std::string no_cuda() {
  if (!cuda_backend()) return "built without CUDA";
  return cuda_backend()->unavailable();
}

#define KDA_NEEDS_CUDA() \
  if (const std::string why = ::kda::test::no_cuda(); !why.empty()) GTEST_SKIP() << why

// A CUDA context with its own pool and a workspace.
struct CudaContext : Context {
  explicit CudaContext(size_t workspace_bytes = size_t(64) << 20) : pool_(2) {
    backend = cuda_backend();
    pool = &pool_;
    backend->open(*this);
    if (workspace_bytes) workspace = backend->alloc(Dtype::u8, {int64_t(workspace_bytes)});
  }

 private:
  ThreadPool pool_;
};

// The values once they have been rounded to bf16: what a reference must be given.
inline std::vector<float> rounded(std::vector<float> v) {
  for (float& x : v) x = float(bf16(x));
  return v;
}
inline std::vector<double> wide(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// bf16 has 8 significant bits: a rounding is off by at most this share of the value.
inline constexpr double kBf16Epsilon = 1.0 / 256;

// f32, bf16 or f16 memory of a backend between two guards, written and read as floats. Outputs start as NaN.
class TypedBuffer {
 public:
  TypedBuffer(Context& ctx, Dtype d, const std::vector<float>& v) : ctx_(ctx), dtype_(d), n_(int64_t(v.size())) {
    std::vector<float> all(v.size() + 2 * kGuard, 7.0f);
    std::copy(v.begin(), v.end(), all.begin() + kGuard);
    host_.resize(all.size() * size_of(d));
    for (size_t i = 0; i < all.size(); ++i) put(i, all[i]);
    memory_ = ctx.backend->alloc(Dtype::u8, {int64_t(host_.size())});
    ctx.backend->copy(ctx, memory_.v.data, host_.data(), host_.size());
  }
  TypedBuffer(Context& ctx, Dtype d, int64_t n)
      : TypedBuffer(ctx, d, std::vector<float>(size_t(n), std::numeric_limits<float>::quiet_NaN())) {}

  View view(Shape s) const { return {static_cast<char*>(memory_.v.data) + kGuard * size_of(dtype_), dtype_, s}; }
  std::vector<float> fetch() {
    const auto all = read();
    return {all.begin() + kGuard, all.end() - kGuard};
  }
  bool guards_intact() {
    const auto all = read();
    const auto ok = [](float x) { return x == 7.0f; };
    return std::all_of(all.begin(), all.begin() + kGuard, ok) && std::all_of(all.end() - kGuard, all.end(), ok);
  }

 private:
  static constexpr int64_t kGuard = 64;
  void put(size_t i, float x) {
    const auto as = [&](auto e) { std::memcpy(host_.data() + i * sizeof e, &e, sizeof e); };
    dtype_ == Dtype::f32 ? as(x) : dtype_ == Dtype::bf16 ? as(bf16(x)) : as(f16(x));
  }
  std::vector<float> read() {
    ctx_.backend->copy(ctx_, host_.data(), memory_.v.data, host_.size());
    std::vector<float> all(size_t(n_ + 2 * kGuard));
    for (size_t i = 0; i < all.size(); ++i) {
      const auto as = [&](auto e) {
        std::memcpy(&e, host_.data() + i * sizeof e, sizeof e);
        return float(e);
      };
      all[i] = dtype_ == Dtype::f32 ? as(float{}) : dtype_ == Dtype::bf16 ? as(bf16{}) : as(f16{});
    }
    return all;
  }

  Context& ctx_;
  Dtype dtype_;
  int64_t n_;
  std::vector<char> host_;
  Tensor memory_;
};

// Plain values (ids, slots, marks) in the backend's memory.
template <class T>
class DeviceArray {
 public:
  DeviceArray(Context& ctx, const std::vector<T>& v) : ctx_(ctx), n_(v.size()) {
    memory_ = ctx.backend->alloc(Dtype::u8, {int64_t(v.size() * sizeof(T))});
    if (n_) ctx.backend->copy(ctx, memory_.v.data, v.data(), n_ * sizeof(T));
  }
  T* data() const { return static_cast<T*>(memory_.v.data); }
  ConstView view() const { return {data(), dtype_of<T>, {int64_t(n_)}}; }
  std::vector<T> fetch() const {
    std::vector<T> v(n_);
    if (n_) ctx_.backend->copy(ctx_, v.data(), data(), n_ * sizeof(T));
    return v;
  }

 private:
  Context& ctx_;
  size_t n_;
  Tensor memory_;
};

}  // namespace kda::test
