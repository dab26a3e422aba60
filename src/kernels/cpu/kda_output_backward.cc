#include <algorithm>
#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/partial_sums.h"
#include "kernels/kda_backward.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_output_backward.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// A row of V. With r = 1 / sqrt(mean o^2 + eps), y = o r, s = sigmoid(g + bias), e = dy w s:
//   do = r (e - y mean(e y))    dg = e y (1 - s)    dw += dy y s
// d_o may be dy: the first pass leaves e in it.
HWY_INLINE void GatedNormRowBackward(F32 d, const float* o, const float* g, const float* bias, const float* w,
                                     const float* dy, float eps, float* d_o, float* dg, float* bias_sum, float* w_sum,
                                     int64_t n) {
  const int64_t N = int64_t(hn::Lanes(d));
  const float root = 1.0f / std::sqrt(SumOfSquares(d, o, n) / float(n) + eps);
  const VF r = hn::Set(d, root), one = hn::Set(d, 1.0f);
  VF dot = hn::Zero(d);
  for (int64_t i = 0; i < n; i += N) {
    const int64_t left = n - i;
    const VF x = hn::Neg(hn::Add(LoadPart(d, g + i, left), LoadPart(d, bias + i, left)));
    const VF tail = Exp(d, x), s = hn::Div(one, hn::Add(one, tail));
    const VF y = hn::Mul(LoadPart(d, o + i, left), r), dys = hn::Mul(LoadPart(d, dy + i, left), s);
    const VF e = hn::Mul(dys, LoadPart(d, w + i, left)), ey = hn::Mul(e, y);
    const VF gate = hn::Mul(ey, hn::Mul(tail, s));  // 1 - s without a difference
    dot = hn::Add(dot, ey);
    StorePart(hn::MulAdd(dys, y, LoadPart(d, w_sum + i, left)), d, w_sum + i, left);
    StorePart(hn::Add(gate, LoadPart(d, bias_sum + i, left)), d, bias_sum + i, left);
    StorePart(gate, d, dg + i, left);
    StorePart(e, d, d_o + i, left);
  }
  const VF mean = hn::Set(d, root * Sum(d, dot) / float(n));
  for (int64_t i = 0; i < n; i += N) {
    const int64_t left = n - i;
    const VF e = LoadPart(d, d_o + i, left);
    StorePart(hn::Mul(r, hn::NegMulAdd(LoadPart(d, o + i, left), mean, e)), d, d_o + i, left);
  }
}

// Tokens [from,to), sums over them in `sums`: V of dw, H*V of d_g_bias.
void OutputBackwardTokens(const KdaOutputBackward& a, int64_t from, int64_t to, float* sums) {
  const F32 d;
  const int64_t H = a.o.dim(1), V = a.o.dim(2);
  const float *o = a.o.as<float>(), *g = a.g.as<float>(), *bias = a.g_bias.as<float>(), *w = a.w.as<float>();
  const float* dy = a.dy.as<float>();
  float *d_o = a.d_o.as<float>(), *dg = a.dg.as<float>();
  std::fill_n(sums, V + H * V, 0.0f);
  for (int64_t t = from; t < to; ++t)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = (t * H + h) * V;
      GatedNormRowBackward(d, o + at, g + at, bias + h * V, w, dy + at, a.eps, d_o + at, dg + at, sums + V + h * V,
                           sums, V);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(OutputBackwardTokens);
}  // namespace

void kda_output_backward(Context& ctx, const KdaOutputBackward& a) {
  const int64_t T = a.o.dim(0), H = a.o.dim(1), V = a.o.dim(2), blocks = sum_blocks(T), n = V + H * V;
  float* sums =
      static_cast<float*>(workspace(ctx, kda_output_backward_workspace_bytes(ctx, T, H, V), "kda_output_backward"));
  const auto tokens = HWY_DYNAMIC_DISPATCH(OutputBackwardTokens);
  each_sum_block(*ctx.pool, T, n, sums, [&](int64_t from, int64_t to, float* own) { tokens(a, from, to, own); });
  add_partials(sums, blocks, n, V, a.dw);
  add_partials(sums + V, blocks, n, H * V, a.d_g_bias);
}

}  // namespace kda::cpu

namespace kda {

size_t kda_output_backward_workspace_bytes(const Context&, int64_t T, int64_t H, int64_t V) {
  return size_t(cpu::sum_blocks(T) * (V + H * V)) * sizeof(float);
}

}  // namespace kda
#endif
