#include "kernels/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace kda {

namespace {

template <class T>
void quantize_row(const T* w, int64_t K, int8_t* q, float* scale) {
  // Two passes over a row, both simple enough for the compiler to vectorise; the row stays in the first-level caches.
  uint32_t most = 0;  // the bits of |w|: they order as the values do, and a NaN is the largest
  for (int64_t k = 0; k < K; ++k) most = std::max(most, std::bit_cast<uint32_t>(float(w[k])) & 0x7fffffffu);
  *scale = std::bit_cast<float>(most) / 127;
  const float inverse = most ? 1 / *scale : 0;
  for (int64_t k = 0; k < K; ++k) {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    const float shifted = std::clamp(float(w[k]) * inverse, -127.0f, 127.0f) + 12582912.0f;
    q[k] = int8_t(std::bit_cast<int32_t>(shifted) - 0x4b400000);
  }
}

}  // namespace

QuantizedRows quantize_rows_i8(ThreadPool& pool, const ConstView& w) {
  KDA_CHECK(w.shape.rank == 2 && (w.dtype == Dtype::f32 || w.dtype == Dtype::bf16 || w.dtype == Dtype::f16),
            "quantize: a matrix must be f32, bf16 or f16 [N,K], got ", name_of(w.dtype), " ", w.shape);
  const int64_t N = w.dim(0), K = w.dim(1);
  QuantizedRows out{host_tensor(Dtype::i8, w.shape), host_tensor(Dtype::f32, {N})};
  int8_t* q = out.w.v.as<int8_t>();
  float* scale = out.scale.v.as<float>();
  constexpr int64_t kRows = 16;
  pool.run((N + kRows - 1) / kRows, [&](int64_t task, int) {
    for (int64_t n = task * kRows; n < std::min(N, (task + 1) * kRows); ++n) {
      if (w.dtype == Dtype::f32) quantize_row(w.as<float>() + n * K, K, q + n * K, scale + n);
      else if (w.dtype == Dtype::bf16) quantize_row(w.as<bf16>() + n * K, K, q + n * K, scale + n);
      else quantize_row(w.as<f16>() + n * K, K, q + n * K, scale + n);
      KDA_CHECK(std::isfinite(scale[n]), "quantize: row ", n, " of a matrix ", w.shape, " holds a value that is not finite");
    }
  });
  return out;
}

}  // namespace kda
