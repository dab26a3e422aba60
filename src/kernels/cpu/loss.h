// kernels/cpu/loss.h — passes over one row of the vocabulary, vectorised, that the losses are put together from.
// Sums are taken in fp32 over blocks of 4096 and in double over the blocks: their error does not grow with the row.
#pragma once
#include <cstdint>

namespace kda::cpu {

struct DenseSums {
  double student, teacher;  // sum e, sum f
  double cross;             // sum f (u - v)
};

// What jsd and tvd add up; p = f / sum f, q = e / sum e, m = (p + q) / 2.
struct CurvedSums {
  double p_log, q_log;  // sum p ln(p/m), sum q ln(q/m)
  double distance;      // sum |p - q|
  double q_sign;        // sum q sign(q - p)
};

struct CurvedArgs {
  float student_scale, teacher_scale;  // 1 / sum e, 1 / sum f
  float shift;                         // ln sum f - ln sum e, so that ln q - ln p = v - u + shift
  float jsd, tvd, linear;              // factors of 1/2 q ln(q/m), of 1/2 q sign(q - p), of p in the gradient
};

struct HiddenSums {
  double squares, dot, student, teacher;  // sum (a-b)^2, a b, a^2, b^2
};

struct LossPasses {
  float (*max)(const float* x, int64_t n);
  // e = exp(v), v = (x - max) / T; returns the sum
  double (*exps)(const float* x, float max, float inverse_T, int64_t n, float* e);
  // the same of student x and teacher t: f = exp(u), u = (t - t_max) / T
  DenseSums (*dense)(const float* x, float max, const float* t, float t_max, float inverse_T, int64_t n, float* e,
                     float* f);
  // f = linear p + q (jsd 1/2 ln(q/m) + tvd 1/2 sign(q - p))
  CurvedSums (*curved)(const float* x, float max, const float* t, float t_max, float inverse_T, const CurvedArgs&,
                       int64_t n, const float* e, float* f);
  // y = a e + b f, f may be nullptr; with `add` y is added to
  void (*blend)(const float* e, float a, const float* f, float b, bool add, int64_t n, float* y);
  // sums over j with l[j] < l_i of max(0, margin - (y_i - y[j])), and their number; d[j] += 1 for those above 0
  double (*hinge)(float l_i, float y_i, const float* l, const float* y, float margin, int64_t n, float* d,
                  double* above);
  // sums over j with l[j] < l_i of softplus(-(y_i - y[j])); d[j] += its derivative with respect to y[j]
  double (*logistic)(float l_i, float y_i, const float* l, const float* y, int64_t n, float* d, double* derivative);
  HiddenSums (*hidden)(const float* a, const float* b, int64_t n);
};

const LossPasses& loss_passes();

}  // namespace kda::cpu
