// tests/ref/optimizer.h — AdamW in double, as arXiv:1711.05101 with PyTorch's order: decay first, then the step.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace kda::ref {

struct AdamWState {
  std::vector<double> p, m, v;
};

inline void adamw(AdamWState& s, const std::vector<double>& g, double lr, double b1, double b2, double eps,
                  double decay, int64_t step, double grad_scale) {
  for (size_t i = 0; i < g.size(); ++i) {
    const double x = g[i] * grad_scale;
    s.m[i] = b1 * s.m[i] + (1 - b1) * x;
    s.v[i] = b2 * s.v[i] + (1 - b2) * x * x;
    const double m = s.m[i] / (1 - std::pow(b1, double(step))), v = s.v[i] / (1 - std::pow(b2, double(step)));
    s.p[i] -= lr * decay * s.p[i];
    s.p[i] -= lr * m / (std::sqrt(v) + eps);
  }
}

}  // namespace kda::ref
