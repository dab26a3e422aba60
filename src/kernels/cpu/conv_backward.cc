#include "kernels/conv_backward.h"

#include <algorithm>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/partial_sums.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/conv_backward.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// N channels from c on, tokens [from,to) of the sequence [start,end); dw [4,kConvGroup] is added to. ds of the three
// tokens after `to` is made again: the neighbour block makes it too.
HWY_INLINE void ConvBackwardColumns(const ConvBackward& a, const float* taps, int64_t c, int64_t left, int64_t start,
                                    int64_t end, int64_t from, int64_t to, float* dw) {
  const F32 d;
  const int64_t channels = a.x.dim(1);
  const float *x = a.x.as<float>() + c, *dy = a.dy.as<float>() + c;
  float* dx = a.dx.as<float>() + c;
  const auto at = [&](int64_t t) { return t >= start ? LoadPart(d, x + t * channels, left) : hn::Zero(d); };
  const VF one = hn::Set(d, 1.0f);
  VF w[4], sum[4], ds[4];  // ds[j]: of token t-3+j
  for (int j = 0; j < 4; ++j) w[j] = hn::LoadU(d, taps + j * kConvGroup), sum[j] = ds[j] = hn::Zero(d);
  VF x0 = at(from - 3), x1 = at(from - 2), x2 = at(from - 1);
  for (int64_t t = from; t < to + 3; ++t) {
    ds[0] = ds[1], ds[1] = ds[2], ds[2] = ds[3], ds[3] = hn::Zero(d);
    if (t < std::min(end, to + 3)) {
      const VF x3 = at(t);
      const VF s = hn::MulAdd(x3, w[3], hn::MulAdd(x2, w[2], hn::MulAdd(x1, w[1], hn::Mul(x0, w[0]))));
      // silu' = p (1 + s (1 - p)), p = sigmoid(s), 1 - p without a difference
      const VF e = Exp(d, hn::Neg(hn::Abs(s))), p1 = hn::Div(one, hn::Add(one, e)), p0 = hn::Mul(e, p1);
      const auto negative = hn::Lt(s, hn::Zero(d));
      const VF p = hn::IfThenElse(negative, p0, p1), rest = hn::IfThenElse(negative, p1, p0);
      ds[3] = hn::Mul(LoadPart(d, dy + t * channels, left), hn::Mul(p, hn::MulAdd(s, rest, one)));
      if (t < to) {
        sum[0] = hn::MulAdd(ds[3], x0, sum[0]);
        sum[1] = hn::MulAdd(ds[3], x1, sum[1]);
        sum[2] = hn::MulAdd(ds[3], x2, sum[2]);
        sum[3] = hn::MulAdd(ds[3], x3, sum[3]);
      }
      x0 = x1, x1 = x2, x2 = x3;
    }
    if (t - 3 >= from) {  // token t-3 went into s of itself (tap 3) up to t (tap 0)
      const VF g = hn::MulAdd(w[3], ds[0], hn::MulAdd(w[2], ds[1], hn::MulAdd(w[1], ds[2], hn::Mul(w[0], ds[3]))));
      StorePart(g, d, dx + (t - 3) * channels, left);
    }
  }
  for (int j = 0; j < 4; ++j) {
    float* y = dw + j * kConvGroup;
    hn::StoreU(hn::Add(hn::LoadU(d, y), sum[j]), d, y);
  }
}

// Tokens [from,to) of the pack; dw [C,4] is what they add.
void ConvBackwardTokens(const ConvBackward& a, int64_t from, int64_t to, float* dw) {
  const F32 d;
  const int64_t channels = a.x.dim(1), N = int64_t(hn::Lanes(d));
  const int32_t* starts = a.packing.start;
  const int64_t first = std::upper_bound(starts, starts + a.packing.N() + 1, int32_t(from)) - starts - 1;
  for (int64_t c = 0; c < channels; c += kConvGroup) {
    const int64_t n = std::min(kConvGroup, channels - c);
    float taps[4 * kConvGroup] = {}, sums[4 * kConvGroup] = {};
    ConvTaps(a.w.as<float>() + 4 * c, n, taps);
    for (int64_t s = first; s < a.packing.N() && starts[s] < to; ++s) {
      const int64_t start = starts[s], end = starts[s + 1], b = std::max(from, start), e = std::min(to, end);
      for (int64_t i = 0; b < e && i < n; i += N)
        ConvBackwardColumns(a, taps + i, c + i, n - i, start, end, b, e, sums + i);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < 4; ++j) dw[4 * (c + i) + j] = sums[j * kConvGroup + i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(ConvBackwardTokens);
}  // namespace

// A task is a block of the pack's tokens, wherever sequences begin.
void conv_silu_backward(Context& ctx, const ConvBackward& a) {
  const int64_t T = a.x.dim(0), C = a.x.dim(1), blocks = sum_blocks(T);
  float* sums =
      static_cast<float*>(workspace(ctx, conv_silu_backward_workspace_bytes(ctx, T, C), "conv_silu_backward"));
  const auto tokens = HWY_DYNAMIC_DISPATCH(ConvBackwardTokens);
  each_sum_block(*ctx.pool, T, 4 * C, sums, [&](int64_t from, int64_t to, float* own) { tokens(a, from, to, own); });
  add_partials(sums, blocks, 4 * C, 4 * C, a.dw);
}

}  // namespace kda::cpu

namespace kda {

size_t conv_silu_backward_workspace_bytes(const Context&, int64_t T, int64_t C) {
  return size_t(cpu::sum_blocks(T) * 4 * C) * sizeof(float);
}

}  // namespace kda
#endif
