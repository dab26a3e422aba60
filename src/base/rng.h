// base/rng.h — counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
// A number depends on (seed, counter) alone, so it is the same on CPU and GPU, in any order, for any thread count.
#pragma once
#include <array>
#include <cstdint>

namespace kda {

struct Philox {
  static constexpr std::array<uint32_t, 4> block(uint64_t key, std::array<uint32_t, 4> counter) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * counter[0], b = uint64_t(0xCD9E8D57u) * counter[2];
      counter = {uint32_t(b >> 32) ^ counter[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ counter[3] ^ k1, uint32_t(a)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return counter;
  }
};

// [0,1) with 24 bits.
constexpr float uniform24(uint32_t bits) { return float(bits >> 8) * 0x1p-24f; }
// [0,1) with 53 bits, from two words.
constexpr double uniform53(uint32_t hi, uint32_t lo) {
  return double((uint64_t(hi) << 32 | lo) >> 11) * 0x1p-53;
}

}  // namespace kda
