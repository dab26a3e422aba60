#include "kernels/top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/loss.h"
#include "kernels/cpu/ops.h"

namespace kda::cpu {

namespace {

struct Candidate {
  float x;
  int32_t id;
};
bool before(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

// Leaves the k first of `best` in order. Only values above the k-th best so far are looked at twice.
void choose(const float* x, int64_t V, int64_t k, std::vector<Candidate>& best) {
  const size_t room = size_t(std::min(V, std::max<int64_t>(4 * k, 64)));
  best.clear();
  float least = -std::numeric_limits<float>::infinity();
  bool full = false;
  for (int64_t i = 0; i < V; ++i) {
    if (full && !(x[i] > least)) continue;
    best.push_back({std::isnan(x[i]) ? -std::numeric_limits<float>::infinity() : x[i], int32_t(i)});
    if (best.size() >= room && int64_t(best.size()) > k) {
      std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), before);
      best.resize(size_t(k));
      least = best.back().x;
      full = true;
    }
  }
  std::partial_sort(best.begin(), best.begin() + k, best.end(), before);
}

}  // namespace

void top_k(Context& ctx, const TopK& a) {
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1), k = a.ids.dim(1);
  const float* logits = a.logits.as<float>();
  int32_t* ids = a.ids.as<int32_t>();
  float* logprobs = a.logprobs.as<float>();
  const LossPasses& passes = loss_passes();
  const int64_t step = std::max<int64_t>(1, 16384 / V);
  ctx.pool->run((R + step - 1) / step, [&](int64_t task, int) {
    std::vector<Candidate> best;
    std::vector<float> e(static_cast<size_t>(V));
    for (int64_t r = task * step; r < std::min(R, (task + 1) * step); ++r) {
      const float* x = logits + r * V;
      choose(x, V, k, best);
      const float max = best[0].x;
      const double log_sum = double(max) + std::log(passes.exps(x, max, 1, V, e.data()));
      for (int64_t j = 0; j < k; ++j) {
        ids[r * k + j] = best[size_t(j)].id;
        logprobs[r * k + j] = float(double(best[size_t(j)].x) - log_sum);
      }
    }
  });
}

}  // namespace kda::cpu
