// tests/ref/logits.h — what scoring needs of logits, plainly. T = double or complex<double>.
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace kda::ref {

// -log softmax(logits[r])[target[r]]; 0 where target[r] is -1.
template <class T>
std::vector<T> token_loss(const std::vector<T>& logits, const std::vector<int32_t>& target) {
  const size_t R = target.size(), V = R ? logits.size() / R : 0;
  std::vector<T> loss(R);
  for (size_t r = 0; r < R; ++r) {
    if (target[r] < 0) continue;
    double most = -1e300;
    for (size_t j = 0; j < V; ++j) most = std::max(most, std::real(logits[r * V + j]));
    T sum = 0;
    for (size_t j = 0; j < V; ++j) sum += std::exp(logits[r * V + j] - most);
    loss[r] = most + std::log(sum) - logits[r * V + size_t(target[r])];
  }
  return loss;
}

}  // namespace kda::ref
