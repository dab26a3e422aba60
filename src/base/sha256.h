// base/sha256.h — SHA-256 (FIPS 180-4), for fingerprints of models. Ours, since the only other use of a crypto library
// would be this one function.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kda {

class Sha256 {
 public:
  // Five times as fast by the processor's instructions, where it has them.
  explicit Sha256(bool instructions = true);
  Sha256& add(const void* data, size_t bytes);
  Sha256& add(std::string_view s) { return add(s.data(), s.size()); }
  std::string hex();  // ends the stream: 64 lower-case digits; call once

 private:
  void block(const uint8_t* p);
  bool instructions_;
  std::array<uint32_t, 8> h_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_{};
  uint64_t bytes_ = 0;
};

}  // namespace kda
