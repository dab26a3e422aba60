// text/byte_level.h — GPT-2's alphabet: a visible character for every byte.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace kda::text {

struct ByteLevel {
  struct Character {
    char bytes[2];
    uint8_t length;
  };
  std::array<Character, 256> character{};  // of byte b: itself where it is visible in Latin-1, else U+0100 + n
  std::array<int16_t, 0x144> byte{};       // of code point c, or -1

  constexpr ByteLevel() {
    for (auto& b : byte) b = -1;
    int spare = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool visible = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
      const int c = visible ? b : spare++;
      byte[static_cast<size_t>(c)] = static_cast<int16_t>(b);
      auto& out = character[static_cast<size_t>(b)];
      if (c < 0x80) {
        out = {{static_cast<char>(c), 0}, 1};
      } else {
        out = {{static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 0x3f))}, 2};
      }
    }
  }

  void append(std::string& out, std::string_view bytes) const {
    for (char b : bytes) {
      const auto& c = character[static_cast<uint8_t>(b)];
      out.append(c.bytes, c.length);
    }
  }
};

inline constexpr ByteLevel kByteLevel;

}  // namespace kda::text
