// tests/ref/norm.h — RMSNorm, plainly. T = double, or complex<double> for the gradient by complex step.
#pragma once
#include <cmath>
#include <complex>
#include <vector>

namespace kda::ref {

template <class T>
std::vector<T> rms_norm(const std::vector<T>& x, const std::vector<T>& w, double eps) {
  const size_t D = w.size(), R = D ? x.size() / D : 0;
  std::vector<T> y(x.size());
  for (size_t r = 0; r < R; ++r) {
    T sum = 0;
    for (size_t d = 0; d < D; ++d) sum += x[r * D + d] * x[r * D + d];
    for (size_t d = 0; d < D; ++d) y[r * D + d] = x[r * D + d] / std::sqrt(sum / double(D) + eps) * w[d];
  }
  return y;
}

}  // namespace kda::ref
