// tests/ref/attention.h — causal attention of one whole sequence, plainly. T = double or complex<double>.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <vector>

namespace kda::ref {

// The outputs of tokens [from,L): q [L,H,d], k and v [L,G,d] -> o [L-from,H,d]
template <class T>
std::vector<T> attention(const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v, size_t H, size_t G,
                         size_t d, size_t from = 0) {
  const size_t L = q.size() / (H * d);
  std::vector<T> o((L - from) * H * d);
  for (size_t t = from; t < L; ++t)
    for (size_t h = 0; h < H; ++h) {
      const size_t g = h / (H / G);
      std::vector<T> s(t + 1);
      double most = -1e300;
      for (size_t j = 0; j <= t; ++j) {
        for (size_t i = 0; i < d; ++i) s[j] += q[(t * H + h) * d + i] * k[(j * G + g) * d + i];
        s[j] /= std::sqrt(double(d));
        most = std::max(most, std::real(s[j]));
      }
      T sum = 0;
      for (T& x : s) sum += x = std::exp(x - most);
      for (size_t j = 0; j <= t; ++j)
        for (size_t i = 0; i < d; ++i) o[((t - from) * H + h) * d + i] += s[j] / sum * v[(j * G + g) * d + i];
    }
  return o;
}

}  // namespace kda::ref
