#include "kernels/conv.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/conv.cc"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
// foreach_target.h comes before highway.h
#include <hwy/highway.h>

#include "kernels/cpu/kda_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu {
namespace HWY_NAMESPACE {

// Tokens [from,to) of a sequence of which x holds the first token; `before` holds the window it starts from.
void ConvTokens(const Conv& a, const float* x, const float* before, float* y, int64_t from, int64_t to) {
  const F32 d;
  const int64_t C = a.x.dim(1), channels = a.window.dim(2);
  const float* w = a.w.as<float>();
  float taps[4 * kConvGroup] = {};
  static constexpr float kZeros[kConvGroup] = {};
  for (int64_t c = 0; c < C; c += kConvGroup) {
    const int64_t n = std::min(kConvGroup, C - c);
    ConvTaps(w + 4 * c, n, taps);
    const auto row = [&](int64_t t) {
      return t >= 0 ? x + t * C + c : before ? before + (t + 3) * channels + c : kZeros;
    };
    for (int64_t t = from; t < to; ++t) ConvRow(d, row(t - 3), row(t - 2), row(t - 1), row(t), taps, y + t * C + c, n);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kda::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {
namespace {
HWY_EXPORT(ConvTokens);

// The last three inputs after T tokens; older window rows move up when the sequence brought fewer. out may be in.
void keep_window(const float* x, const float* in, float* out, int64_t T, int64_t C, int64_t channels) {
  for (int64_t j = 0; j < 3; ++j) {
    const int64_t t = T - 3 + j;
    float* to = out + j * channels;
    if (t >= 0)
      std::copy_n(x + t * C, C, to);
    else if (in)
      std::memmove(to, in + (t + 3) * channels, size_t(C) * sizeof(float));
    else
      std::fill_n(to, C, 0.0f);
  }
}
}  // namespace

// A task is a block of one sequence's tokens. The first block alone reads the window, and then writes the new one.
void conv_silu(Context& ctx, const Conv& a) {
  constexpr int64_t kBlock = 16;
  const int64_t C = a.x.dim(1), channels = a.window.dim(2), N = a.packing.N();
  const auto blocks = [&](int64_t n) {
    const int64_t T = a.packing.host_start[size_t(n) + 1] - a.packing.host_start[size_t(n)];
    return std::max<int64_t>(1, (T + kBlock - 1) / kBlock);
  };
  int64_t tasks = 0;
  for (int64_t n = 0; n < N; ++n) tasks += blocks(n);
  const auto tokens = HWY_DYNAMIC_DISPATCH(ConvTokens);

  ctx.pool->run(tasks, [&](int64_t task, int) {
    int64_t n = 0;
    for (int64_t b; task >= (b = blocks(n)); ++n) task -= b;
    const int64_t start = a.packing.start[n], T = a.packing.start[n + 1] - start;
    const float* x = a.x.as<float>() + start * C;
    float* window = a.window.as<float>() + a.channel;
    const int32_t in = a.slots.in[n], out = a.slots.out[n];
    const float* before = in < 0 ? nullptr : window + in * 3 * channels;
    const int64_t from = task * kBlock, to = std::min(T, from + kBlock);
    tokens(a, x, before, a.y.as<float>() + start * C, from, to);
    if (task == 0 && out >= 0) keep_window(x, before, window + out * 3 * channels, T, C, channels);
    if (task == 0)
      for (const StateMark& m : a.marks.host)
        if (m.sequence == n) keep_window(x, before, window + m.slot * 3 * channels, m.tokens, C, channels);
  });
}

}  // namespace kda::cpu
#endif
