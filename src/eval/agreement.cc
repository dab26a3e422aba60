#include "eval/agreement.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"

namespace kda {

namespace {

// log sum exp of a row, in double.
double log_sum(const float* x, int64_t n) {
  const double most = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(double(x[i]) - most);
  return most + std::log(sum);
}

struct Row {
  double loss = 0, other_loss = 0, kl = 0;
  bool same = false;
};

}  // namespace

void Agreement::add(ConstView logits, ConstView others, std::span<const int32_t> ids, ThreadPool& pool) {
  const int64_t R = logits.dim(0), V = logits.dim(1);
  KDA_CHECK(!others.data || others.shape == logits.shape, "agreement: logits ", logits.shape, " and ", others.shape);
  const float* a = logits.as<float>();
  const float* b = others.data ? others.as<float>() : nullptr;
  std::vector<Row> rows(static_cast<size_t>(R));
  pool.run(R, [&](int64_t r, int) {
    Row& row = rows[size_t(r)];
    const float *x = a + r * V, *y = b ? b + r * V : nullptr;
    const bool next = r + 1 < int64_t(ids.size());
    const double zx = log_sum(x, V);
    if (next) row.loss = zx - x[ids[size_t(r) + 1]];
    if (!y) return;
    const double zy = log_sum(y, V);
    if (next) row.other_loss = zy - y[ids[size_t(r) + 1]];
    for (int64_t i = 0; i < V; ++i) {
      const double q = double(y[i]) - zy;
      row.kl += std::exp(q) * (q - (double(x[i]) - zx));
    }
    row.same = std::max_element(x, x + V) - x == std::max_element(y, y + V) - y;
  });
  for (int64_t r = 0; r < R; ++r) {
    const Row& row = rows[size_t(r)];
    KDA_CHECK(std::isfinite(row.loss) && std::isfinite(row.other_loss) && std::isfinite(row.kl),
              "the model's logits are not finite at token ", positions_ + predicted_ + r, " of the text: loss ",
              row.loss);
    if (r + 1 < int64_t(ids.size())) ++predicted_, loss_ += row.loss, other_loss_ += row.other_loss;
    if (b) ++positions_, kl_ += row.kl, same_ += row.same;
  }
}

Agreement::Result Agreement::result() const {
  const double n = double(std::max<int64_t>(predicted_, 1)), m = double(std::max<int64_t>(positions_, 1));
  return {predicted_, loss_ / n, other_loss_ / n, positions_, kl_ / m, double(same_) / m};
}

}  // namespace kda
