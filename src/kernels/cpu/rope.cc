#include "kernels/rope.h"

#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

namespace kda::cpu {

namespace {
// `sense` 1 turns by the angle, -1 by minus the angle.
void turn(Context& ctx, const Rope& a, float sense) {
  float* x = a.x.as<float>();
  const int32_t* position = a.position.as<int32_t>();
  const float* inv_freq = a.inv_freq.as<float>();
  const int64_t H = a.x.dim(1), d = a.x.dim(2), half = d / 2;
  const float factor = a.factor;
  // A sine costs as much as some twenty multiplications, hence the weight of a channel beyond its heads.
  in_pieces(*ctx.pool, a.x.dim(0), (H + 20) * d, [=](int64_t from, int64_t to) {
    constexpr int64_t kChannels = 64;
    float c[kChannels], s[kChannels];
    for (int64_t t = from; t < to; ++t)
      for (int64_t first = 0; first < half; first += kChannels) {
        const int64_t n = std::min(kChannels, half - first);
        for (int64_t i = 0; i < n; ++i) {
          const float angle = float(position[t]) * inv_freq[first + i];
          c[i] = std::cos(angle) * factor;
          s[i] = std::sin(angle) * factor * sense;
        }
        for (int64_t h = 0; h < H; ++h) {
          float* low = x + (t * H + h) * d + first;
          float* high = low + half;
          for (int64_t i = 0; i < n; ++i) {
            const float u = low[i], v = high[i];
            low[i] = u * c[i] - v * s[i];
            high[i] = v * c[i] + u * s[i];
          }
        }
      }
  });
}
}  // namespace

void rope(Context& ctx, const Rope& a) { turn(ctx, a, 1); }
void rope_backward(Context& ctx, const Rope& a) { turn(ctx, a, -1); }

}  // namespace kda::cpu
