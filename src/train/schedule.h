// train/schedule.h — the learning rate's course over a stage.
#pragma once
#include <cstdint>

#include "train/run_file.h"

namespace kda {

// Factor on every learning rate in step `step` of [0,steps): rises linearly over the warm-up, whose first step has
// 1 / warm-up of the peak, then constant, falling linearly or by a cosine to min_ratio, or (wsd) constant and falling
// linearly over the last decay_ratio of the steps. The last step of a falling schedule has nearly min_ratio:
// the value at `steps` would be min_ratio itself.
double schedule_factor(const ScheduleSpec&, int64_t step, int64_t steps);

// Steps of warm-up, of so many in all.
int64_t warmup_steps(const ScheduleSpec&, int64_t steps);

}  // namespace kda
