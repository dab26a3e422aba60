#include "kernels/loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/loss.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

namespace kda::cpu {

namespace {

// Terms of one temperature share their softmaxes. cross_entropy, hinge and logistic_ranking have temperature 1.
struct Group {
  float T;
  std::vector<size_t> terms;
  bool curved = false;  // has jsd or tvd
};

std::vector<Group> groups_of(std::span<const LossTerm> terms) {
  std::vector<Group> out;
  for (size_t i = 0; i < terms.size(); ++i) {
    const LossTerm& t = terms[i];
    const bool soft = t.kind == LossKind::kl || t.kind == LossKind::jsd || t.kind == LossKind::tvd;
    const float T = soft ? t.temperature : 1.0f;
    auto g = std::find_if(out.begin(), out.end(), [&](const Group& have) { return have.T == T; });
    if (g == out.end()) g = out.insert(out.end(), {.T = T, .terms = {}});
    g->terms.push_back(i);
    g->curved |= t.kind == LossKind::jsd || t.kind == LossKind::tvd;
  }
  return out;
}

// One worker's scratch.
struct Scratch {
  float *e, *f, *gradient;                         // [V]
  double *x, *l, *log_q, *q, *log_p, *p, *G, *dx;  // [k]
  float *l32, *y32, *d32;                          // [k]

  static constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  static int64_t bytes(int64_t V, int64_t k) { return padded(V) * 3 * 4 + padded(k) * (8 * 8 + 3 * 4); }
  Scratch(std::byte* at, int64_t V, int64_t k) {
    const auto take = [&](auto*& p_, int64_t n) {
      p_ = reinterpret_cast<std::remove_reference_t<decltype(p_)>>(at);
      at += padded(n) * int64_t(sizeof(*p_));
    };
    take(e, V), take(f, V), take(gradient, V);
    take(x, k), take(l, k), take(log_q, k), take(q, k), take(log_p, k), take(p, k), take(G, k), take(dx, k);
    take(l32, k), take(y32, k), take(d32, k);
  }
};

constexpr double kLeast = 1e-8;  // what is left over beside the k ids is never taken to be less
constexpr double kLn2 = std::numbers::ln2;

// A row against a teacher known by k ids. The student's probabilities of all other ids together are one number, `rest`:
// they share one factor in the gradient.
class SparseRow {
 public:
  SparseRow(const LossPasses& passes, const Scratch& s, int64_t k) : passes_(passes), s_(s), k_(k) {}

  // x (gathered) and l are in the scratch; max and T of the row, rest_sum = sum over the other ids of exp((x-max)/T).
  void start(double max, double T, double rest_sum) {
    T_ = T;
    double sum = 0;
    for (int64_t j = 0; j < k_; ++j) sum += std::exp(s_.log_q[j] = (s_.x[j] - max) / T);
    total_ = sum + rest_sum;
    log_total_ = std::log(total_);
    for (int64_t j = 0; j < k_; ++j) s_.q[j] = std::exp(s_.log_q[j] -= log_total_);
    rest_ = rest_sum / total_;
    std::fill(s_.dx, s_.dx + k_, 0.0);
    rest_factor = 0;
    have_ = false;
  }
  double total() const { return total_; }
  double log_total() const { return log_total_; }
  void cross_entropy(double scale) {
    rest_factor += scale;
    for (int64_t j = 0; j < k_; ++j) s_.dx[j] += scale * s_.q[j];
  }
  double term(const LossTerm& t) {
    if (t.kind == LossKind::hinge) return hinge(t);
    if (t.kind == LossKind::logistic_ranking) return logistic(t);
    teacher(t.missing);
    const bool uniform = t.missing == MissingProbability::symmetric_uniform;
    const double q_rest = uniform ? std::max(rest_, kLeast) : rest_;
    const bool held = uniform && rest_ < kLeast;  // at the clamp: no gradient through it
    const double c = double(t.scale) * T_;
    double value = 0, rest_slope = 0;
    if (t.kind == LossKind::kl) {
      for (int64_t j = 0; j < k_; ++j) value += s_.p[j] == 0 ? 0 : s_.p[j] * (s_.log_p[j] - s_.log_q[j]);
      if (uniform) value += p_rest_ * (log_p_rest_ - std::log(q_rest));
      const double mass = held ? 1 - p_rest_ : 1;
      for (int64_t j = 0; j < k_; ++j) s_.dx[j] += c * (mass * s_.q[j] - s_.p[j]);
      rest_factor += c * (held ? mass : 1 - (uniform ? p_rest_ / q_rest : 0));
      return T_ * T_ * value;
    }
    if (t.kind == LossKind::jsd) {
      for (int64_t j = 0; j < k_; ++j) value += half_jsd(s_.log_p[j], s_.p[j], s_.log_q[j], s_.q[j], s_.G[j]);
      if (uniform)
        value += half_jsd(log_p_rest_, p_rest_, std::log(q_rest), q_rest, rest_slope);
      else
        value += (rest_slope = 0.5 * kLn2) * rest_;
    } else {
      const auto half_gap = [](double p, double q, double& slope) {
        slope = q > p ? 0.5 : q < p ? -0.5 : 0.0;
        return 0.5 * std::abs(p - q);
      };
      for (int64_t j = 0; j < k_; ++j) value += half_gap(s_.p[j], s_.q[j], s_.G[j]);
      if (uniform)
        value += half_gap(p_rest_, q_rest, rest_slope);
      else
        value += (rest_slope = 0.5) * rest_;
    }
    add_slopes(c, held ? 0 : rest_slope);
    return T_ * T_ * value;
  }

  double rest_factor = 0;  // gradient of every other id: this times its probability

 private:
  // p ln(p/m)/2 + q ln(q/m)/2 and its derivative with respect to q, ln(q/m)/2
  static double half_jsd(double log_p, double p, double log_q, double q, double& slope) {
    const double log_m = std::log(0.5 * (p + q));
    const double of_q = q > 0 ? log_q - log_m : 0;
    slope = 0.5 * of_q;
    return 0.5 * ((p > 0 ? p * (log_p - log_m) : 0) + q * of_q);
  }

  // The derivatives G with respect to the probabilities (rest_slope: of all other ids), taken through the softmax.
  void add_slopes(double c, double rest_slope) {
    double mean = rest_ * rest_slope;
    for (int64_t j = 0; j < k_; ++j) mean += s_.q[j] * s_.G[j];
    for (int64_t j = 0; j < k_; ++j) s_.dx[j] += c * s_.q[j] * (s_.G[j] - mean);
    rest_factor += c * (rest_slope - mean);
  }

  void teacher(MissingProbability missing) {
    if (have_ && missing_ == missing) return;
    have_ = true;
    missing_ = missing;
    const bool uniform = missing == MissingProbability::symmetric_uniform;
    double left = 0;
    if (uniform) {
      double sum = 0;
      for (int64_t j = 0; j < k_; ++j) sum += std::exp(s_.l[j]);
      left = std::log(std::max(1 - sum, kLeast)) / T_;
    }
    double most = uniform ? left : -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = 0; j < k_; ++j) most = std::max(most, s_.log_p[j] = s_.l[j] / T_);
    for (int64_t j = 0; j < k_; ++j) sum += std::exp(s_.log_p[j] - most);
    if (uniform) sum += std::exp(left - most);
    const double log_sum = most + std::log(sum);
    for (int64_t j = 0; j < k_; ++j) s_.p[j] = std::exp(s_.log_p[j] -= log_sum);
    log_p_rest_ = left - log_sum;
    p_rest_ = uniform ? std::exp(log_p_rest_) : 0;
  }

  double hinge(const LossTerm& t) {
    for (int64_t j = 0; j < k_; ++j) s_.l32[j] = float(s_.l[j]), s_.y32[j] = float(s_.q[j]), s_.d32[j] = 0, s_.G[j] = 0;
    double value = 0;
    for (int64_t i = 0; i < k_; ++i) {
      double above = 0;
      value += passes_.hinge(s_.l32[i], s_.y32[i], s_.l32, s_.y32, t.margin, k_, s_.d32, &above);
      s_.G[i] -= above;
    }
    for (int64_t j = 0; j < k_; ++j) s_.G[j] += double(s_.d32[j]);
    add_slopes(double(t.scale), 0);
    return value;
  }

  double logistic(const LossTerm& t) {
    for (int64_t j = 0; j < k_; ++j) s_.l32[j] = float(s_.l[j]), s_.y32[j] = float(s_.x[j]), s_.d32[j] = 0;
    double value = 0;
    for (int64_t i = 0; i < k_; ++i) {
      double slope = 0;
      value += passes_.logistic(s_.l32[i], s_.y32[i], s_.l32, s_.y32, k_, s_.d32, &slope);
      s_.dx[i] -= double(t.scale) * slope;
    }
    for (int64_t j = 0; j < k_; ++j) s_.dx[j] += double(t.scale) * double(s_.d32[j]);
    return value;
  }

  const LossPasses& passes_;
  const Scratch& s_;
  const int64_t k_;
  double T_ = 1, total_ = 1, log_total_ = 0, rest_ = 0;
  bool have_ = false;
  MissingProbability missing_{};
  double p_rest_ = 0, log_p_rest_ = 0;
};

struct Rows {
  const LossPasses& passes;
  const LogitsLoss& a;
  const std::vector<Group>& groups;
  int64_t R, V, k;

  void run(int64_t r, const Scratch& s) const {
    float* x = a.logits.as<float>() + r * V;
    float* value = a.value.as<float>() + r;
    const int32_t label = a.labels.as<int32_t>()[r];
    KDA_CHECK(label < V, "logits_loss: row ", r, ": label ", label, " outside the vocabulary of ", V);
    if (label < 0) {
      std::fill(x, x + V, 0.0f);
      for (size_t i = 0; i < a.terms.size(); ++i) value[int64_t(i) * R] = 0;
      return;
    }
    const float x_label = x[label];
    const float max = passes.max(x, V);
    const int32_t* ids = nullptr;
    if (a.ids.data) {
      ids = a.ids.as<int32_t>() + r * k;
      const float* l = a.logprobs.as<float>() + r * k;
      for (int64_t j = 0; j < k; ++j) {
        KDA_CHECK(ids[j] >= 0 && ids[j] < V, "logits_loss: row ", r, ": id ", ids[j], " outside the vocabulary of ", V);
        s.x[j] = double(x[ids[j]]);
        s.l[j] = double(l[j]);
      }
      // With these out of the row, the sum of the others is exact however little of the probability it is.
      for (int64_t j = 0; j < k; ++j) x[ids[j]] = -std::numeric_limits<float>::infinity();
    }
    const float* t = a.teacher.data ? a.teacher.as<float>() + r * V : nullptr;
    const float t_max = t ? passes.max(t, V) : 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      float* y = groups.size() == 1 ? x : s.gradient;
      if (ids)
        sparse(groups[g], s, x, max, ids, label, x_label, g > 0, y, value);
      else
        dense(groups[g], s, x, max, t, t_max, label, x_label, g > 0, y, value);
    }
    if (groups.size() > 1) std::copy(s.gradient, s.gradient + V, x);
  }

  void dense(const Group& group, const Scratch& s, const float* x, float max, const float* t, float t_max,
             int32_t label, float x_label, bool add, float* y, float* value) const {
    const double T = double(group.T);
    const float inverse_T = float(1 / T);
    const bool soft = t && std::any_of(group.terms.begin(), group.terms.end(),
                                       [&](size_t i) { return a.terms[i].kind != LossKind::cross_entropy; });
    DenseSums sums{};
    if (soft)
      sums = passes.dense(x, max, t, t_max, inverse_T, V, s.e, s.f);
    else
      sums.student = passes.exps(x, max, inverse_T, V, s.e);
    const double log_x = std::log(sums.student), log_t = soft ? std::log(sums.teacher) : 0;
    double of_q = 0, of_p = 0, jsd = 0, tvd = 0, label_scale = 0;
    for (const size_t i : group.terms) {
      const double c = double(a.terms[i].scale) * T;
      switch (a.terms[i].kind) {
        case LossKind::cross_entropy: of_q += c, label_scale += c; break;
        case LossKind::kl: of_q += c, of_p -= c; break;
        case LossKind::jsd: jsd += c; break;
        default: tvd += c;
      }
    }
    CurvedSums curved{};
    if (group.curved) {
      curved = passes.curved(x, max, t, t_max, inverse_T,
                             {.student_scale = float(1 / sums.student),
                              .teacher_scale = float(1 / sums.teacher),
                              .shift = float(log_t - log_x),
                              .jsd = float(jsd),
                              .tvd = float(tvd),
                              .linear = float(of_p)},
                             V, s.e, s.f);
      of_q -= 0.5 * (jsd * curved.q_log + tvd * curved.q_sign);
    }
    const float f_scale = group.curved ? 1.0f : soft ? float(of_p / sums.teacher) : 0.0f;
    passes.blend(s.e, float(of_q / sums.student), soft ? s.f : nullptr, f_scale, add, V, y);
    y[label] -= float(label_scale);
    for (const size_t i : group.terms) {
      double v;
      switch (a.terms[i].kind) {
        case LossKind::cross_entropy: v = double(max) - double(x_label) + log_x; break;
        case LossKind::kl: v = T * T * (sums.cross / sums.teacher - log_t + log_x); break;
        case LossKind::jsd: v = T * T * 0.5 * (curved.p_log + curved.q_log); break;
        default: v = T * T * 0.5 * curved.distance;
      }
      value[int64_t(i) * R] = float(v);
    }
  }

  void sparse(const Group& group, const Scratch& s, const float* x, float max, const int32_t* ids, int32_t label,
              float x_label, bool add, float* y, float* value) const {
    const double rest = passes.exps(x, max, float(1 / double(group.T)), V, s.e);
    SparseRow row(passes, s, k);
    row.start(double(max), double(group.T), rest);
    double label_scale = 0;
    for (const size_t i : group.terms) {
      const LossTerm& t = a.terms[i];
      double v;
      if (t.kind == LossKind::cross_entropy) {
        v = double(max) - double(x_label) + row.log_total();
        row.cross_entropy(double(t.scale));
        label_scale += double(t.scale);
      } else {
        v = row.term(t);
      }
      value[int64_t(i) * R] = float(v);
    }
    passes.blend(s.e, float(row.rest_factor / row.total()), nullptr, 0, add, V, y);
    for (int64_t j = 0; j < k; ++j) y[ids[j]] += float(s.dx[j]);
    y[label] -= float(label_scale);
  }
};

}  // namespace

void logits_loss(Context& ctx, const LogitsLoss& a) {
  const int64_t R = a.logits.dim(0), V = a.logits.dim(1), k = a.ids.data ? a.ids.dim(1) : 0;
  a.value.as<float>(), a.logits.as<float>();
  const auto groups = groups_of(a.terms);
  const Rows rows{loss_passes(), a, groups, R, V, k};
  auto* memory = static_cast<std::byte*>(workspace(ctx, logits_loss_workspace_bytes(ctx, R, V, k), "logits_loss"));
  const int64_t step = std::max<int64_t>(1, 16384 / V), tasks = (R + step - 1) / step;
  ctx.pool->run(tasks, [&](int64_t task, int worker) {
    const FlushTiny flush;
    const Scratch s(memory + worker * Scratch::bytes(V, k), V, k);
    for (int64_t r = task * step; r < std::min(R, (task + 1) * step); ++r) rows.run(r, s);
  });
}

void hidden_loss(Context& ctx, const HiddenLoss& a) {
  const int64_t R = a.student.dim(0), D = a.student.dim(1);
  const LossPasses& passes = loss_passes();
  const float *x = a.student.as<float>(), *t = a.teacher.as<float>();
  const int32_t* labels = a.labels.as<int32_t>();
  float *dx = a.d_student.as<float>(), *value = a.value.as<float>();
  in_pieces(*ctx.pool, R, D, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      if (labels[r] < 0) {
        value[r] = 0;
        continue;
      }
      const float *p = x + r * D, *q = t + r * D;
      const HiddenSums s = passes.hidden(p, q, D);
      double of_x, of_t;  // dx += of_x x + of_t t
      if (a.kind == HiddenLossKind::mse) {
        value[r] = float(s.squares / double(D));
        of_x = 2 * double(a.scale) / double(D);
        of_t = -of_x;
      } else {
        // As torch's cosine_similarity: each length is at least 1e-8.
        const double n = std::max(std::sqrt(s.student), 1e-8), m = std::max(std::sqrt(s.teacher), 1e-8);
        const double cosine = s.dot / (n * m);
        value[r] = float(1 - cosine);
        of_t = -double(a.scale) / (n * m);
        of_x = double(a.scale) * cosine / (n * n);
      }
      passes.blend(p, float(of_x), q, float(of_t), true, D, dx + r * D);
    }
  });
}

}  // namespace kda::cpu

namespace kda {
size_t logits_loss_workspace_bytes(const Context& ctx, int64_t, int64_t V, int64_t k) {
  return size_t(ctx.pool->threads()) * size_t(cpu::Scratch::bytes(V, k));
}
}  // namespace kda
