// text/utf8.h — UTF-8: one character at a time, validation with the place of the fault, and lossy decoding of a stream.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kda::text {

// The character at the start of bytes [p, end), p < end.
//   length > 0, valid:       a whole character of `length` bytes, its code point in `code`
//   length > 0, not valid:   the longest piece that can start no character (Unicode 3.9, "maximal subpart"); one U+FFFD
//   length == 0:             the bytes up to `end` are the start of a character whose rest is not there
struct Utf8Char {
  uint32_t code = 0;
  uint32_t length = 0;
  bool valid = false;
};
Utf8Char utf8_read(const char* p, const char* end);

// Code point of the valid character at s[i]; i moves past it. Only for text known to be valid.
inline uint32_t utf8_next(std::string_view s, size_t& i) {
  const auto byte = [&](size_t k) { return static_cast<uint32_t>(static_cast<uint8_t>(s[k])); };
  const uint32_t b = byte(i);
  if (b < 0x80) return ++i, b;
  if (b < 0xe0) return i += 2, (b & 0x1f) << 6 | (byte(i - 1) & 0x3f);
  if (b < 0xf0) return i += 3, (b & 0x0f) << 12 | (byte(i - 2) & 0x3f) << 6 | (byte(i - 1) & 0x3f);
  i += 4;
  return (b & 0x07) << 18 | (byte(i - 3) & 0x3f) << 12 | (byte(i - 2) & 0x3f) << 6 | (byte(i - 1) & 0x3f);
}

// Start of the valid character that ends before s[i], i > 0.
inline size_t utf8_previous(std::string_view s, size_t i) {
  --i;
  while (i > 0 && (static_cast<uint8_t>(s[i]) & 0xc0) == 0x80) --i;
  return i;
}

// Bytes of the character that starts with `lead`, in valid text.
inline size_t utf8_length(char lead) {
  const auto b = static_cast<uint8_t>(lead);
  return b < 0x80 ? 1 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
}

void utf8_append(std::string& out, uint32_t code);

// The first byte that belongs to no valid character, or npos.
size_t utf8_invalid_at(std::string_view s);

// Appends the characters of `bytes` to `out`, U+FFFD for each maximal invalid piece. Returns how many bytes at the end
// were left: the start of a character that may yet be completed (at most 3).
size_t utf8_lossy(std::string_view bytes, std::string& out);

inline constexpr std::string_view kReplacementCharacter = "\xef\xbf\xbd";

}  // namespace kda::text
