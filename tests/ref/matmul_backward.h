// tests/ref/matmul_backward.h — gradients of y = x W^T in double, with the size of the terms that were added up.
#pragma once
#include "tests/ref/matmul.h"

namespace kda::ref {

// dx[r,k] = sum_n dy[r,n] w[n,k]
inline Product matmul_dx(const std::vector<double>& dy, const std::vector<double>& w, int64_t R, int64_t N, int64_t K) {
  std::vector<double> turned(w.size());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) turned[size_t(k * N + n)] = w[size_t(n * K + k)];
  return matmul(dy, turned, R, K, N);
}

// dw[n,k] = sum_r dy[r,n] x[r,k]
inline Product matmul_dw(const std::vector<double>& dy, const std::vector<double>& x, int64_t R, int64_t N, int64_t K) {
  std::vector<double> dy_turned(dy.size()), x_turned(x.size());
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t n = 0; n < N; ++n) dy_turned[size_t(n * R + r)] = dy[size_t(r * N + n)];
    for (int64_t k = 0; k < K; ++k) x_turned[size_t(k * R + r)] = x[size_t(r * K + k)];
  }
  return matmul(dy_turned, x_turned, N, K, R);
}

}  // namespace kda::ref
