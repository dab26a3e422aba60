// Generated tokens: the weights are read once, as they lie, and meet every row of x while they are in the cache.
//
// One order of summation for a row and a column, whatever stands beside them: lane i of one accumulator adds
// x[k] w[k] for k = i, i + lanes, .. in rising order (zeros past the end), then the lanes are added up.
#include "kernels/cpu/ops.h"
#include "kernels/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matvec.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include <algorithm>
#include <cstring>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

HWY_INLINE VF load(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE VF load(const bf16* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<uint32_t, DF> d32;
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)))));
}
HWY_INLINE VF load(const f16* p) {
  const hn::Rebind<hwy::float16_t, DF> d16;
  return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE VF load(const int8_t* p) {
  const hn::Rebind<int8_t, DF> d8;
  const hn::Rebind<int32_t, DF> d32;
  return hn::ConvertTo(DF(), hn::PromoteTo(d32, hn::LoadU(d8, p)));
}

// The last n < lanes elements, zeros behind them; never reads past the end.
template <class T>
HWY_INLINE VF load_n(const T* p, int64_t n) {
  T part[HWY_MAX_BYTES / 4];
  std::memset(part, 0, sizeof part);
  std::memcpy(part, p, size_t(n) * sizeof(T));
  return load(part);
}

// y[j * y_stride + i] = sum_k w[i,k] x[j,k] for WB rows of W and RB rows of x.
template <int WB, int RB, class T>
HWY_INLINE void block(const T* w, const float* x, int64_t K, float* y, int64_t y_stride, const float* scale) {
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  VF sum[WB][RB];
  for (int i = 0; i < WB; ++i)
    for (int j = 0; j < RB; ++j) sum[i][j] = hn::Zero(DF());
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) {
    VF v[WB];
    for (int i = 0; i < WB; ++i) v[i] = load(w + i * K + k);
    for (int j = 0; j < RB; ++j) {
      const VF u = load(x + j * K + k);
      for (int i = 0; i < WB; ++i) sum[i][j] = hn::MulAdd(v[i], u, sum[i][j]);
    }
  }
  if (k < K) {
    for (int j = 0; j < RB; ++j) {
      const VF u = load_n(x + j * K + k, K - k);
      for (int i = 0; i < WB; ++i) sum[i][j] = hn::MulAdd(load_n(w + i * K + k, K - k), u, sum[i][j]);
    }
  }
  for (int i = 0; i < WB; ++i)
    for (int j = 0; j < RB; ++j) {
      const float s = hn::GetLane(hn::SumOfLanes(DF(), sum[i][j]));
      y[j * y_stride + i] = scale ? s * scale[i] : s;
    }
}

template <int WB, class T>
void rows_of_w(const T* w, const float* x, int64_t R, int64_t K, float* y, int64_t y_stride, const float* scale) {
  for (int64_t r = 0; r < R; r += 4) {
    const float* xr = x + r * K;
    float* yr = y + r * y_stride;
    switch (R - r) {
      case 1: block<WB, 1>(w, xr, K, yr, y_stride, scale); break;
      case 2: block<WB, 2>(w, xr, K, yr, y_stride, scale); break;
      case 3: block<WB, 3>(w, xr, K, yr, y_stride, scale); break;
      default: block<WB, 4>(w, xr, K, yr, y_stride, scale); break;
    }
  }
}

template <class T>
void stream(const T* w, const MatmulSegment& s, const ConstView& x, int64_t n0, int64_t n) {
  const int64_t R = x.dim(0), K = x.dim(1), N = s.w.w.dim(0);
  const float* xs = x.as<float>();
  const float* scale = s.w.w.dtype == Dtype::i8 ? s.w.scale.as<float>() : nullptr;
  float* y = s.y.as<float>();
  int64_t i = n0;
  for (; i + 4 <= n0 + n; i += 4) rows_of_w<4>(w + i * K, xs, R, K, y + i, N, scale ? scale + i : nullptr);
  for (; i < n0 + n; ++i) rows_of_w<1>(w + i * K, xs, R, K, y + i, N, scale ? scale + i : nullptr);
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
  constexpr int64_t kTaskBytes = 128 << 10;
  struct Task {
    const MatmulSegment* segment;
    int64_t n0, n;
  };
  const int64_t K = a.x.dim(1);
  if (!a.x.dim(0)) return;
  std::vector<Task> tasks;
  for (const auto& s : a.segments) {
    const int64_t N = s.w.w.dim(0), row_bytes = K * int64_t(size_of(s.w.w.dtype));
    const int64_t step = std::max<int64_t>(1, kTaskBytes / (4 * row_bytes)) * 4;
    for (int64_t n0 = 0; n0 < N; n0 += step) tasks.push_back({&s, n0, std::min(step, N - n0)});
  }
  const auto kernel = HWY_DYNAMIC_DISPATCH(Matvec);
  ctx.pool->run(int64_t(tasks.size()), [&](int64_t t, int) {
    const Task& task = tasks[size_t(t)];
    kernel(*task.segment, a.x, task.n0, task.n);
  });
}

}  // namespace kda::cpu

namespace kda {
size_t matvec_workspace_bytes(const Context&, int64_t, int64_t, int64_t) { return 0; }
}  // namespace kda
#endif
