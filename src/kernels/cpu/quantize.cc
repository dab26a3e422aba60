#include "kernels/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantize.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/cpu/weights-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// Returns the scale of a row, or NaN when the row is not finite.
template <class T>
float quantize_row(const T* w, int64_t K, int8_t* q) {
  const hn::Rebind<int32_t, DF> d32;
  const hn::Rebind<int8_t, DF> d8;
  const int64_t lanes = int64_t(hn::Lanes(DF()));
  // The bits of |w| order as integers do, infinities and NaNs above everything else.
  const auto bits = [&](VF v) { return hn::BitCast(d32, hn::Abs(v)); };
  auto most = hn::Zero(d32);
  int64_t k = 0;
  for (; k + lanes <= K; k += lanes) most = hn::Max(most, bits(load(w + k)));
  float size = std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(d32, most)));
  for (; k < K && !std::isnan(size); ++k) {
    const float a = std::abs(float(w[k]));
    if (!(a <= size)) size = a;  // takes a NaN too
  }
  if (!std::isfinite(size)) return std::numeric_limits<float>::quiet_NaN();

  const float inverse = 127 / size;
  if (!std::isfinite(inverse)) {  // all zeros, or too small (4e-37) to have an inverse
    std::fill_n(q, K, int8_t(0));
    return 0;
  }
  const VF times = hn::Set(DF(), inverse);
  for (k = 0; k + lanes <= K; k += lanes)
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(hn::Mul(load(w + k), times))), d8, q + k);
  for (; k < K; ++k) q[k] = int8_t(std::nearbyint(float(w[k]) * inverse));
  return size / 127;
}

template <class T>
int64_t quantize_rows(const T* w, int64_t K, int64_t from, int64_t to, int8_t* q, float* scale) {
  for (int64_t n = from; n < to; ++n) {
    scale[n] = quantize_row(w + n * K, K, q + n * K);
    if (std::isnan(scale[n])) return n;
  }
  return -1;
}

// Rows [from, to); returns the first that is not finite, or -1.
int64_t Quantize(const ConstView& w, int64_t from, int64_t to, int8_t* q, float* scale) {
  const int64_t K = w.dim(1);
  switch (w.dtype) {
    case Dtype::f32: return quantize_rows(w.as<float>(), K, from, to, q, scale);
    case Dtype::bf16: return quantize_rows(w.as<bf16>(), K, from, to, q, scale);
    default: return quantize_rows(w.as<f16>(), K, from, to, q, scale);
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {
HWY_EXPORT(Quantize);
}

QuantizedRows quantize_rows_i8(ThreadPool& pool, const ConstView& w) {
  KDA_CHECK(w.shape.rank == 2 && (w.dtype == Dtype::f32 || w.dtype == Dtype::bf16 || w.dtype == Dtype::f16),
            "quantize: a matrix must be f32, bf16 or f16 [N,K], got ", name_of(w.dtype), " ", w.shape);
  const int64_t N = w.dim(0), K = w.dim(1);
  QuantizedRows out{host_tensor(Dtype::i8, w.shape), host_tensor(Dtype::f32, {N})};
  if (!N || !K) return out;
  const int64_t step = std::max<int64_t>(1, (256 << 10) / (K * int64_t(size_of(w.dtype))));
  const auto kernel = HWY_DYNAMIC_DISPATCH(cpu::Quantize);
  pool.run((N + step - 1) / step, [&](int64_t t, int) {
    const int64_t bad = kernel(w, t * step, std::min(N, (t + 1) * step), out.w.v.as<int8_t>(), out.scale.v.as<float>());
    KDA_CHECK(bad < 0, "quantize: row ", bad, " of a matrix ", w.shape, " holds a value that is not finite");
  });
  return out;
}

}  // namespace kda
#endif
