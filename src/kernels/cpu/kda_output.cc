#include <algorithm>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/ops.h"
#include "kernels/kda.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kda_output.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

void OutputTokens(const KdaOutput& a, int64_t from, int64_t to) {
  const F32 d;
  const int64_t H = a.o.dim(1), V = a.o.dim(2);
  const float *o = a.o.as<float>(), *g = a.g.as<float>(), *bias = a.g_bias.as<float>(), *w = a.w.as<float>();
  float* y = a.y.as<float>();
  for (int64_t t = from; t < to; ++t)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = (t * H + h) * V;
      GatedNormRow(d, o + at, g + at, bias + h * V, w, a.eps, y + at, V);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(OutputTokens);
}  // namespace

void kda_output(Context& ctx, const KdaOutput& a) {
  constexpr int64_t kBlock = 8;
  const int64_t T = a.o.dim(0);
  const auto tokens = HWY_DYNAMIC_DISPATCH(OutputTokens);
  ctx.pool->run((T + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const FlushTiny flush;
    tokens(a, task * kBlock, std::min(T, (task + 1) * kBlock));
  });
}

}  // namespace kda::cpu
#endif
