#include "text/utf8.h"

#include <simdjson.h>

namespace kda::text {

Utf8Char utf8_read(const char* p, const char* end) {
  const auto at = [&](int i) { return static_cast<uint32_t>(static_cast<uint8_t>(p[i])); };
  const uint32_t b = at(0);
  if (b < 0x80) return {b, 1, true};
  if (b < 0xc2 || b > 0xf4) return {0, 1, false};
  const uint32_t need = b < 0xe0 ? 2 : b < 0xf0 ? 3 : 4;
  uint32_t code = b & (0x7fu >> need);
  for (uint32_t i = 1; i < need; ++i) {
    if (p + i == end) return {0, 0, false};
    const uint32_t c = at(static_cast<int>(i));
    // The second byte's range is narrower where it would otherwise give an overlong form, a surrogate or > U+10FFFF.
    const uint32_t low = i > 1 ? 0x80 : b == 0xe0 ? 0xa0 : b == 0xf0 ? 0x90 : 0x80;
    const uint32_t high = i > 1 ? 0xbf : b == 0xed ? 0x9f : b == 0xf4 ? 0x8f : 0xbf;
    if (c < low || c > high) return {0, i, false};
    code = code << 6 | (c & 0x3f);
  }
  return {code, need, true};
}

void utf8_append(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t b) { out.push_back(static_cast<char>(b)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f)), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  }
}

size_t utf8_invalid_at(std::string_view s) {
  if (simdjson::validate_utf8(s.data(), s.size())) return std::string_view::npos;
  const char* end = s.data() + s.size();
  for (const char* p = s.data(); p < end;) {
    const Utf8Char c = utf8_read(p, end);
    if (!c.valid) return static_cast<size_t>(p - s.data());
    p += c.length;
  }
  return std::string_view::npos;
}

size_t utf8_lossy(std::string_view bytes, std::string& out) {
  const char* end = bytes.data() + bytes.size();
  const char* from = bytes.data();  // start of the valid characters not yet copied
  for (const char* p = from; p < end;) {
    const Utf8Char c = utf8_read(p, end);
    if (c.valid) {
      p += c.length;
      if (p == end) out.append(from, p);
      continue;
    }
    out.append(from, p);
    if (c.length == 0) return static_cast<size_t>(end - p);
    out += kReplacementCharacter;
    from = p += c.length;
  }
  return 0;
}

}  // namespace kda::text
