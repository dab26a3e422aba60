// tests/ref/rope.h — rotary positions, plainly. T = double or complex<double>. The angle is rounded to f32 as the op's
// definition says; everything else is in double.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace kda::ref {

// x [T,H,d]
template <class T>
std::vector<T> rope(const std::vector<T>& x, const std::vector<int32_t>& position, const std::vector<float>& inv_freq,
                    size_t H, double factor) {
  const size_t half = inv_freq.size(), d = 2 * half;
  std::vector<T> y(x.size());
  for (size_t t = 0; t < position.size(); ++t)
    for (size_t h = 0; h < H; ++h)
      for (size_t i = 0; i < half; ++i) {
        const double angle = float(position[t]) * inv_freq[i];
        const double c = factor * std::cos(angle), s = factor * std::sin(angle);
        const size_t low = (t * H + h) * d + i, high = low + half;
        y[low] = x[low] * c - x[high] * s;
        y[high] = x[high] * c + x[low] * s;
      }
  return y;
}

}  // namespace kda::ref
