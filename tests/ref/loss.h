// tests/ref/loss.h — distillation losses of one row, plainly. T = double, or complex<double> for the gradient by
// complex step (every function here is analytic but for |.| and max, which go by the real part).
#pragma once
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

#include "kernels/loss.h"

namespace kda::ref {

inline double real(double x) { return x; }
inline double real(const std::complex<double>& x) { return x.real(); }

template <class T>
T magnitude(T x) {
  return real(x) > 0 ? x : real(x) < 0 ? -x : T(0);
}

template <class T>
std::vector<T> log_softmax(std::vector<T> x) {
  double most = real(x[0]);
  for (const T& v : x) most = std::max(most, real(v));
  T sum = 0;
  for (const T& v : x) sum += std::exp(v - most);
  for (T& v : x) v -= most + std::log(sum);
  return x;
}

// What the student is compared with: all logits, or some ids with log-probabilities made at temperature 1.
struct Target {
  std::vector<double> logits;
  std::vector<int32_t> ids;
  std::vector<double> logprobs;
};

template <class T>
T divergence(LossKind kind, const std::vector<T>& log_p, const std::vector<T>& log_q) {
  T sum = 0;
  for (size_t i = 0; i < log_p.size(); ++i) {
    const T p = std::exp(log_p[i]), q = std::exp(log_q[i]);
    if (kind == LossKind::kl) {
      sum += p * (log_p[i] - log_q[i]);
    } else if (kind == LossKind::jsd) {
      const T log_m = std::log(0.5 * (p + q));
      sum += 0.5 * (p * (log_p[i] - log_m) + q * (log_q[i] - log_m));
    } else {
      sum += 0.5 * magnitude(p - q);
    }
  }
  return sum;
}

// As kernels/loss.h, without `scale`.
template <class T>
T row_loss(const LossTerm& t, std::vector<T> x, const Target& target, int32_t label) {
  if (t.kind == LossKind::cross_entropy) return -log_softmax(x)[size_t(label)];
  const size_t k = target.ids.size();
  if (t.kind == LossKind::hinge || t.kind == LossKind::logistic_ranking) {
    const std::vector<T> log_q = log_softmax(x);
    T sum = 0;
    for (size_t a = 0; a < k; ++a)
      for (size_t b = 0; b < k; ++b) {
        if (!(target.logprobs[a] > target.logprobs[b])) continue;
        const size_t i = size_t(target.ids[a]), j = size_t(target.ids[b]);
        if (t.kind == LossKind::hinge) {
          const T over = double(t.margin) - (std::exp(log_q[i]) - std::exp(log_q[j]));
          if (real(over) > 0) sum += over;
        } else {
          sum += std::log(1.0 + std::exp(-(x[i] - x[j])));
        }
      }
    return sum;
  }
  const double temperature = double(t.temperature), squared = temperature * temperature;
  for (T& v : x) v /= temperature;
  const std::vector<T> log_q = log_softmax(x);
  std::vector<T> log_p;
  if (!target.logits.empty()) {
    for (double v : target.logits) log_p.push_back(v / temperature);
    return squared * divergence(t.kind, log_softmax(log_p), log_q);
  }
  std::vector<T> of_k;
  T rest = 1;
  double left = 1;
  for (size_t j = 0; j < k; ++j) {
    log_p.push_back(target.logprobs[j] / temperature);
    of_k.push_back(log_q[size_t(target.ids[j])]);
    rest -= std::exp(of_k.back());
    left -= std::exp(target.logprobs[j]);
  }
  if (t.missing == MissingProbability::symmetric_uniform) {
    log_p.push_back(std::log(std::max(left, 1e-8)) / temperature);
    of_k.push_back(std::log(real(rest) < 1e-8 ? T(1e-8) : rest));
    return squared * divergence(t.kind, log_softmax(log_p), of_k);
  }
  const T sum = divergence(t.kind, log_softmax(log_p), of_k);
  if (t.kind == LossKind::jsd) return squared * (sum + 0.5 * std::log(2.0) * rest);
  if (t.kind == LossKind::tvd) return squared * (sum + 0.5 * rest);
  return squared * sum;
}

inline std::vector<double> row_gradient(const LossTerm& t, const std::vector<double>& x, const Target& target,
                                        int32_t label) {
  constexpr double h = 1e-30;
  std::vector<std::complex<double>> z(x.begin(), x.end());
  std::vector<double> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    z[i] = {x[i], h};
    out[i] = row_loss(t, z, target, label).imag() / h;
    z[i] = x[i];
  }
  return out;
}

}  // namespace kda::ref
