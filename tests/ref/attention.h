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

struct AttentionGradient {
  std::vector<double> dq, dk, dv;
  std::vector<double> lse;  // [L,H]
};

// The gradient of sum d_o o, by the chain rule through the softmax. Linear in d_o.
inline AttentionGradient attention_backward(const std::vector<double>& q, const std::vector<double>& k,
                                            const std::vector<double>& v, const std::vector<double>& d_o, size_t H,
                                            size_t G, size_t d) {
  const size_t L = q.size() / (H * d);
  const double scale = 1 / std::sqrt(double(d));
  AttentionGradient out{std::vector<double>(q.size()), std::vector<double>(k.size()), std::vector<double>(v.size()),
                        std::vector<double>(L * H)};
  const auto dot = [&](const double* a, const double* b) {
    double sum = 0;
    for (size_t i = 0; i < d; ++i) sum += a[i] * b[i];
    return sum;
  };
  for (size_t t = 0; t < L; ++t)
    for (size_t h = 0; h < H; ++h) {
      const size_t g = h / (H / G), at = (t * H + h) * d;
      std::vector<double> p(t + 1), dp(t + 1);
      double most = -1e300, sum = 0, mean = 0;
      for (size_t j = 0; j <= t; ++j) most = std::max(most, p[j] = scale * dot(&q[at], &k[(j * G + g) * d]));
      for (double& x : p) sum += x = std::exp(x - most);
      out.lse[t * H + h] = most + std::log(sum);
      for (size_t j = 0; j <= t; ++j) {
        p[j] /= sum;
        dp[j] = dot(&d_o[at], &v[(j * G + g) * d]);
        mean += p[j] * dp[j];
      }
      for (size_t j = 0; j <= t; ++j) {
        const size_t to = (j * G + g) * d;
        const double ds = scale * p[j] * (dp[j] - mean);
        for (size_t i = 0; i < d; ++i) {
          out.dq[at + i] += ds * k[to + i];
          out.dk[to + i] += ds * q[at + i];
          out.dv[to + i] += p[j] * d_o[at + i];
        }
      }
    }
  return out;
}

}  // namespace kda::ref
