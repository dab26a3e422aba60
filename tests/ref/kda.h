// tests/ref/kda.h — a KDA layer's ops in their plainest form, for any number type: T = double is the oracle,
// T = complex<double> gives derivatives (complex step). One sequence and one head at a time, or one row.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace kda::ref {

template <class T>
T sigmoid(const T& x) {
  using std::exp;
  return std::real(x) >= 0 ? T(1) / (T(1) + exp(-x)) : exp(x) / (T(1) + exp(x));
}

// ln(1 + e) for |e| small or not, of double or complex
inline double log_1p(double e) { return std::log1p(e); }
inline std::complex<double> log_1p(const std::complex<double>& e) {
  return {std::log1p(e.real()), e.imag() / (1 + e.real())};  // to first order in the imaginary part: a complex step
}

template <class T>
T softplus(const T& x) {
  using std::exp;
  return std::real(x) > 0 ? x + log_1p(exp(-x)) : log_1p(exp(x));
}

template <class T>
struct ConvOut {
  std::vector<T> y, window;
};

// x [n,C], w [C,4], window [3,C] oldest first -> y [n,C] and the window after the last token
template <class T>
ConvOut<T> conv_silu(const std::vector<T>& x, const std::vector<T>& w, const std::vector<T>& window, int64_t n,
                     int64_t C) {
  std::vector<T> all = window;
  all.insert(all.end(), x.begin(), x.end());
  ConvOut<T> out{std::vector<T>(size_t(n * C)), std::vector<T>(all.end() - 3 * C, all.end())};
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = 0; c < C; ++c) {
      T sum = 0;
      for (int64_t j = 0; j < 4; ++j) sum += w[size_t(c * 4 + j)] * all[size_t((t + j) * C + c)];
      out.y[size_t(t * C + c)] = sum * sigmoid(sum);
    }
  return out;
}

// x / sqrt(sum x^2 + 1e-6) for each row of K
template <class T>
std::vector<T> unit_rows(const std::vector<T>& x, int64_t K) {
  using std::sqrt;
  std::vector<T> y(x.size());
  for (size_t r = 0; r < x.size(); r += size_t(K)) {
    T sum = 1e-6;
    for (size_t d = r; d < r + size_t(K); ++d) sum += x[d] * x[d];
    for (size_t d = r; d < r + size_t(K); ++d) y[d] = x[d] / sqrt(sum);
  }
  return y;
}

// f [n,H,K], A_log [H], dt_bias [H*K]; lower = 0 is the softplus gate
template <class T>
std::vector<T> log_decay(const std::vector<T>& f, const std::vector<T>& A_log, const std::vector<T>& dt_bias, int64_t H,
                         int64_t K, double lower) {
  using std::exp;
  std::vector<T> g(f.size());
  for (size_t i = 0; i < f.size(); ++i) {
    const size_t hk = i % size_t(H * K);
    const T z = f[i] + dt_bias[hk], a = exp(A_log[hk / size_t(K)]);
    g[i] = lower == 0 ? -a * softplus(z) : lower * sigmoid(T(a * z));
  }
  return g;
}

template <class T>
std::vector<T> beta(const std::vector<T>& b, double scale) {
  std::vector<T> y(b.size());
  for (size_t i = 0; i < b.size(); ++i) y[i] = scale * sigmoid(b[i]);
  return y;
}

// Token by token. q, k, g [n,K], v [n,V], beta [n], S [V,K] in and out -> o [n,V]
template <class T>
std::vector<T> recurrence(const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& v,
                          const std::vector<T>& g, const std::vector<T>& beta, std::vector<T>& S, int64_t K,
                          int64_t V) {
  using std::exp;
  const int64_t n = int64_t(beta.size());
  const double s = 1 / std::sqrt(double(K));
  std::vector<T> o(size_t(n * V));
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = 0; r < V; ++r) {
      T* row = S.data() + r * K;
      const size_t at = size_t(t * K);
      T answer = 0, read = 0;
      for (int64_t d = 0; d < K; ++d) {
        row[d] *= exp(g[at + size_t(d)]);
        answer += row[d] * k[at + size_t(d)];
      }
      const T u = beta[size_t(t)] * (v[size_t(t * V + r)] - answer);
      for (int64_t d = 0; d < K; ++d) {
        row[d] += u * k[at + size_t(d)];
        read += row[d] * q[at + size_t(d)];
      }
      o[size_t(t * V + r)] = s * read;
    }
  return o;
}

// o, g [n,H,V], bias [H*V], w [V]
template <class T>
std::vector<T> gated_norm(const std::vector<T>& o, const std::vector<T>& g, const std::vector<T>& bias,
                          const std::vector<T>& w, double eps, int64_t H, int64_t V) {
  using std::sqrt;
  std::vector<T> y(o.size());
  for (size_t r = 0; r < o.size(); r += size_t(V)) {
    T sum = 0;
    for (size_t i = r; i < r + size_t(V); ++i) sum += o[i] * o[i];
    const T norm = sqrt(sum / double(V) + eps);
    for (size_t i = r; i < r + size_t(V); ++i)
      y[i] = o[i] / norm * w[i % size_t(V)] * sigmoid(T(g[i] + bias[i % size_t(H * V)]));
  }
  return y;
}

// What of x [n,H,D] belongs to head h of tokens [from,to): [to-from, D]
template <class A>
std::vector<typename A::value_type> head(const A& x, int64_t from, int64_t to, int64_t H, int64_t h, int64_t D) {
  std::vector<typename A::value_type> y;
  for (int64_t t = from; t < to; ++t) y.insert(y.end(), x.begin() + (t * H + h) * D, x.begin() + (t * H + h + 1) * D);
  return y;
}

}  // namespace kda::ref
