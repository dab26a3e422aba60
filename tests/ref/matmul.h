// tests/ref/matmul.h — y = x W^T in double, and the size of the terms that were added up.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace kda::ref {

struct Product {
  std::vector<double> y;      // [R,N]
  std::vector<double> terms;  // [R,N]  sum_k |x[r,k] w[n,k]|
};

inline Product matmul(const std::vector<double>& x, const std::vector<double>& w, int64_t R, int64_t N, int64_t K) {
  Product p;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double y = 0, terms = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double t = x[size_t(r * K + k)] * w[size_t(n * K + k)];
        y += t;
        terms += std::abs(t);
      }
      p.y.push_back(y);
      p.terms.push_back(terms);
    }
  return p;
}

}  // namespace kda::ref
