// tests/ref/kda_backward.h — gradients of a KDA layer's ops. The recurrence token by token, backwards; of everything,
// the complex step: for analytic f, f'(x) = Im f(x + ih) / h, exact to rounding for tiny h.
#pragma once
#include <complex>
#include <cstdint>
#include <vector>

#include "tests/ref/kda.h"

namespace kda::ref {

using Complexes = std::vector<std::complex<double>>;
inline Complexes complexes(const std::vector<double>& x) { return {x.begin(), x.end()}; }

// d f / d x[i] for every i; f: Complexes -> complex
template <class F>
std::vector<double> complex_step(const F& f, const std::vector<double>& x) {
  constexpr double h = 1e-30;
  Complexes at = complexes(x);
  std::vector<double> g(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    at[i] = {x[i], h};
    g[i] = f(at).imag() / h;
    at[i] = x[i];
  }
  return g;
}

// sum_i weight[i] y[i]
inline std::complex<double> weighted(const std::vector<double>& weight, const Complexes& y) {
  std::complex<double> sum = 0;
  for (size_t i = 0; i < y.size(); ++i) sum += weight[i] * y[i];
  return sum;
}

struct RecurrenceGradients {
  std::vector<double> q, k, v, g, beta, S;  // S: of the state before the first token
};

// As recurrence(): q, k, g [n,K], v, d_o [n,V], beta [n], S and dS [V,K]; dS is the gradient of the last state.
inline RecurrenceGradients recurrence_backward(const std::vector<double>& q, const std::vector<double>& k,
                                               const std::vector<double>& v, const std::vector<double>& g,
                                               const std::vector<double>& beta, const std::vector<double>& S0,
                                               const std::vector<double>& d_o, const std::vector<double>& dS_last,
                                               int64_t K, int64_t V) {
  const int64_t n = int64_t(beta.size());
  const double s = 1 / std::sqrt(double(K));
  RecurrenceGradients d{std::vector<double>(size_t(n * K)), std::vector<double>(size_t(n * K)),
                        std::vector<double>(size_t(n * V)), std::vector<double>(size_t(n * K)),
                        std::vector<double>(size_t(n)),     dS_last};
  std::vector<std::vector<double>> decayed(size_t(n), S0);  // the state that token t corrects
  std::vector<double> wrong(size_t(n * V));                 // v - S k
  std::vector<double> S = S0;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < V; ++r)
      for (int64_t c = 0; c < K; ++c) S[size_t(r * K + c)] *= std::exp(g[size_t(t * K + c)]);
    decayed[size_t(t)] = S;
    for (int64_t r = 0; r < V; ++r) {
      double x = v[size_t(t * V + r)];
      for (int64_t c = 0; c < K; ++c) x -= S[size_t(r * K + c)] * k[size_t(t * K + c)];
      wrong[size_t(t * V + r)] = x;
      for (int64_t c = 0; c < K; ++c) S[size_t(r * K + c)] += beta[size_t(t)] * x * k[size_t(t * K + c)];
    }
  }
  for (int64_t t = n - 1; t >= 0; --t)
    for (int64_t r = 0; r < V; ++r) {
      double* dS = d.S.data() + r * K;
      const double* before = decayed[size_t(t)].data() + r * K;
      const double x = wrong[size_t(t * V + r)], u = beta[size_t(t)] * x, o = s * d_o[size_t(t * V + r)];
      double du = 0;
      for (int64_t c = 0; c < K; ++c) {
        const size_t at = size_t(t * K + c);
        d.q[at] += o * (before[c] + u * k[at]);
        dS[c] += o * q[at];
        du += dS[c] * k[at];
        d.k[at] += dS[c] * u;
      }
      d.beta[size_t(t)] += du * x;
      const double dx = beta[size_t(t)] * du;
      d.v[size_t(t * V + r)] = dx;
      for (int64_t c = 0; c < K; ++c) {
        const size_t at = size_t(t * K + c);
        dS[c] -= dx * k[at];
        d.k[at] -= dx * before[c];
        d.g[at] += dS[c] * before[c];
        dS[c] *= std::exp(g[at]);
      }
    }
  return d;
}

}  // namespace kda::ref
