// tests/ref/pointwise.h — elementwise ops, plainly. T = double or complex<double>.
#pragma once
#include <cmath>
#include <complex>
#include <vector>

namespace kda::ref {

template <class T>
std::vector<T> relu2(const std::vector<T>& x) {
  std::vector<T> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = std::real(x[i]) > 0 ? x[i] * x[i] : T(0);
  return y;
}

template <class T>
std::vector<T> swiglu(const std::vector<T>& gate, const std::vector<T>& up) {
  std::vector<T> y(gate.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
  return y;
}

}  // namespace kda::ref
