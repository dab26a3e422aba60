#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace kda {

int64_t warmup_steps(const ScheduleSpec& s, int64_t steps) {
  const int64_t n = s.warmup_steps > 0 ? s.warmup_steps : int64_t(std::ceil(s.warmup_ratio * double(steps)));
  return std::min(n, steps);
}

double schedule_factor(const ScheduleSpec& s, int64_t step, int64_t steps) {
  KDA_CHECK(step >= 0 && step < steps, "schedule: step ", step, " of ", steps);
  const int64_t warmup = warmup_steps(s, steps);
  if (step < warmup) return double(step + 1) / double(warmup);
  const auto between = [&](double share) { return s.min_ratio + (1 - s.min_ratio) * share; };
  const double left = double(steps - step), rest = double(steps - warmup);
  switch (s.kind) {
    case ScheduleKind::constant: return 1;
    case ScheduleKind::linear: return between(left / rest);
    case ScheduleKind::cosine: return between(0.5 * (1 + std::cos(std::numbers::pi * (1 - left / rest))));
    case ScheduleKind::wsd: {
      const double decay = std::ceil(s.decay_ratio * double(steps));
      return left >= decay ? 1 : between(left / decay);
    }
  }
  throw Error("schedule: unknown kind");
}

}  // namespace kda
