// Generated tokens: the weights are read once, as they lie, and meet every row of x while they are in the cache.
//
// A task is a run of rows of W, read as kStreams streams side by side: stream s goes through rows s S .. s S + S - 1 of
// it. Long streams are what the hardware's prefetchers follow, and several of them hide the gaps at page ends: reading
// neighbouring rows side by side instead, 5 KB each, came to 60 % of the speed (docs/MATMUL.md).
//
// One order of summation for a row and a column, whatever stands beside them: lane i of one accumulator adds
// x[k] w[k] for k = i, i + lanes, .. in rising order (zeros past the end), then the lanes are added up.
#include "kernels/cpu/ops.h"
#include "kernels/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matvec.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/cpu/weights-inl.h"

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// The last n < lanes elements, zeros behind them; never reads past the end.
template <class T>
HWY_INLINE VF load_n(const T* p, int64_t n) {
  T part[HWY_MAX_BYTES / 4];
  std::memset(part, 0, sizeof part);
  std::memcpy(part, p, size_t(n) * sizeof(T));
  return load(part);
}

// Registers: one accumulator for each of W rows of W and X rows of x.
constexpr int kStreams = HWY_MAX_BYTES >= 64 ? 8 : 4;
constexpr int kRowsOfX = HWY_MAX_BYTES >= 64 ? 3 : 2;

// y[j * N + i * w_step] = sum_k w[i * w_step, k] x[j, k] for W rows of W, w_step apart, and X rows of x.
template <int W, int X, class T>
HWY_INLINE void block(const T* w, int64_t w_step, const float* x, int64_t K, float* y, int64_t N, const float* scale) {
  const int64_t lanes = int64_t(hn::Lanes(DF())), stride = w_step * K;
  VF sum[W][X];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < X; ++j) sum[i][j] = hn::Zero(DF());
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    VF u[X];
    for (int j = 0; j < X; ++j) u[j] = load(x + j * K + k);
    for (int i = 0; i < W; ++i) {
      const VF v = load(w + i * stride + k);
      for (int j = 0; j < X; ++j) sum[i][j] = hn::MulAdd(v, u[j], sum[i][j]);
    }
  }
  if (k < K) {
    VF u[X];
    for (int j = 0; j < X; ++j) u[j] = load_n(x + j * K + k, K - k);
    for (int i = 0; i < W; ++i) {
      const VF v = load_n(w + i * stride + k, K - k);
      for (int j = 0; j < X; ++j) sum[i][j] = hn::MulAdd(v, u[j], sum[i][j]);
    }
  }
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < X; ++j) {
      const float s = hn::GetLane(hn::SumOfLanes(DF(), sum[i][j]));
      y[j * N + i * w_step] = scale ? s * scale[i * w_step] : s;
    }
}

// All R rows of x past W rows of W, which stay in the cache after the first.
template <int W, class T>
void rows_of_w(const T* w, int64_t w_step, const float* x, int64_t R, int64_t K, float* y, int64_t N,
               const float* scale) {
  for (int64_t r = 0; r < R;) {
    const int64_t left = R - r;
    const int64_t n = left == 1 ? 1 : left == 2 || left == 4 || kRowsOfX == 2 ? 2 : 3;
    if (n == 1)
      block<W, 1>(w, w_step, x + r * K, K, y + r * N, N, scale);
    else if (n == 2)
      block<W, 2>(w, w_step, x + r * K, K, y + r * N, N, scale);
    else
      block<W, kRowsOfX>(w, w_step, x + r * K, K, y + r * N, N, scale);
    r += n;
  }
}

template <class T>
void stream(const T* w, const MatmulSegment& s, const ConstView& x, int64_t n0, int64_t n) {
  const int64_t R = x.dim(0), K = x.dim(1), N = s.w.w.dim(0), S = n / kStreams;
  const float* xs = x.as<float>();
  const float* scale = s.w.w.dtype == Dtype::i8 ? s.w.scale.as<float>() : nullptr;
  float* y = s.y.as<float>();
  const auto at = [&](int64_t i) { return scale ? scale + i : nullptr; };
  for (int64_t i = n0; i < n0 + S; ++i) rows_of_w<kStreams>(w + i * K, S, xs, R, K, y + i, N, at(i));
  for (int64_t i = n0 + S * kStreams; i < n0 + n; ++i) rows_of_w<1>(w + i * K, 1, xs, R, K, y + i, N, at(i));
}

void Matvec(const MatmulSegment& s, const ConstView& x, int64_t n0, int64_t n) {
  switch (s.w.w.dtype) {
    case Dtype::f32: return stream(s.w.w.as<float>(), s, x, n0, n);
    case Dtype::bf16: return stream(s.w.w.as<bf16>(), s, x, n0, n);
    case Dtype::f16: return stream(s.w.w.as<f16>(), s, x, n0, n);
    default: return stream(s.w.w.as<int8_t>(), s, x, n0, n);
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(Matvec);

void matvec(Context& ctx, const Matmul& a) {
  // Tasks are large, for long streams, and the last ones small, so that all threads end together.
  constexpr int64_t kTaskBytes = 512 << 10, kLastTaskBytes = 96 << 10, kLastBytes = 2 << 20, kStep = 8;
  struct Task {
    const MatmulSegment* segment;
    int64_t n0, n;
  };
  const auto input = [&](const MatmulSegment& s) { return s.x.data ? s.x : a.x; };
  if (!a.x.dim(0)) return;
  int64_t left = 0;
  for (const auto& s : a.segments) left += int64_t(s.w.w.bytes());
  std::vector<Task> tasks;
  for (const auto& s : a.segments) {
    const int64_t N = s.w.w.dim(0), row_bytes = input(s).dim(1) * int64_t(size_of(s.w.w.dtype));
    for (int64_t n0 = 0; n0 < N;) {
      const int64_t want = left > kLastBytes ? kTaskBytes : kLastTaskBytes;
      const int64_t n = std::min(std::max<int64_t>(1, want / (kStep * row_bytes)) * kStep, N - n0);
      tasks.push_back({&s, n0, n});
      n0 += n;
      left -= n * row_bytes;
    }
  }
  const auto kernel = HWY_DYNAMIC_DISPATCH(Matvec);
  ctx.pool->run(int64_t(tasks.size()), [&](int64_t t, int) {
    const Task& task = tasks[size_t(t)];
    kernel(*task.segment, input(*task.segment), task.n0, task.n);
  });
}

}  // namespace kda::cpu

namespace kda {
size_t cpu::matvec_workspace(const Context&, int64_t, int64_t, int64_t) { return 0; }
}  // namespace kda
#endif
