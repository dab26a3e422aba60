// tests/ref/gradient.h — gradients by complex step: df/dx_i = Im f(x + i h e_i) / h, exact to rounding for any h that
// does not vanish (Squire and Trapp 1998).
#pragma once
#include <complex>
#include <vector>

namespace kda::ref {

using Complex = std::complex<double>;

inline std::vector<Complex> complex_of(const std::vector<double>& x) { return {x.begin(), x.end()}; }

// The gradient with respect to x of sum_i cotangent_i f(x)_i.
template <class F>
std::vector<double> gradient(const F& f, const std::vector<double>& x, const std::vector<double>& cotangent) {
  constexpr double kStep = 1e-60;
  std::vector<double> g(x.size());
  std::vector<Complex> z = complex_of(x);
  for (size_t i = 0; i < x.size(); ++i) {
    z[i] = {x[i], kStep};
    const std::vector<Complex> y = f(z);
    for (size_t j = 0; j < y.size(); ++j) g[i] += cotangent[j] * y[j].imag() / kStep;
    z[i] = x[i];
  }
  return g;
}

}  // namespace kda::ref
