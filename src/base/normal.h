// base/normal.h — standard normal numbers from the words of a Philox block (Box and Muller, 1958).
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "base/rng.h"

namespace kda {

// Two, independent of each other.
inline std::array<double, 2> normals(const std::array<uint32_t, 4>& words) {
  const double radius = std::sqrt(-2 * std::log(1 - uniform53(words[0], words[1])));
  const double angle = 2 * std::numbers::pi * uniform53(words[2], words[3]);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

}  // namespace kda
