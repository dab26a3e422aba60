#include "text/unicode.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>

#include "base/error.h"
#include "text/unicode_reference.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

utf8proc_category_t category(uint32_t code) { return utf8proc_category(static_cast<utf8proc_int32_t>(code)); }

bool is_ascii(std::string_view s) {
  for (char c : s)
    if (static_cast<uint8_t>(c) >= 0x80) return false;
  return true;
}

bool in_mark_category(uint32_t c) {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_MN || k == UTF8PROC_CATEGORY_MC || k == UTF8PROC_CATEGORY_ME;
}

// Appends a normal form of text that holds only characters that the reference knows.
void append_normal_form(std::string& out, std::string_view s, int options) {
  if (s.empty()) return;
  utf8proc_uint8_t* result = nullptr;
  const auto n =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(s.data()), static_cast<utf8proc_ssize_t>(s.size()),
                   &result, static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  KDA_CHECK(n >= 0, "normalizing ", s.size(), " bytes: ", utf8proc_errmsg(n));
  out.append(reinterpret_cast<const char*>(result), static_cast<size_t>(n));
}

}  // namespace

bool is_whitespace(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
  return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
         c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_numeric(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(uint32_t c) {
  if (c < 0x80) return c > ' ' && c < 0x7f && !is_numeric(c) && !((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
  if (c == 0x166d || c == 0x111c9) return true;  // no longer, in Unicode 14
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO && !reference::in(reference::kUnknownPunctuation, c);
}

bool is_mark(uint32_t c) {
  if (c < 0x300) return false;
  if (c == 0x1cf2 || c == 0x1cf3) return true;  // no longer, in Unicode 14
  return in_mark_category(c) && !reference::in(reference::kUnknownMarks, c);
}

bool is_word(uint32_t c) {
  const auto k = category(c);
  if (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) return true;
  if (in_mark_category(c) || k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_PC)
    return true;
  if (c == 0x200c || c == 0x200d) return true;
  // Other_Alphabetic beyond the marks: circled, squared and negative letters.
  return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
         (c >= 0x1f170 && c <= 0x1f189);
}

std::string normal_form(std::string_view s, NormalForm form) {
  if (is_ascii(s)) return std::string(s);
  int options = UTF8PROC_STABLE;
  options |= form == NormalForm::nfc || form == NormalForm::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
  // A character it does not know stands for itself, and nothing is reordered or composed across it.
  std::string out;
  out.reserve(s.size());
  size_t from = 0;
  for (size_t at = 0; at < s.size();) {
    const size_t begin = at;
    if (!reference::in(reference::kUnknownToNormalForms, utf8_next(s, at))) continue;
    append_normal_form(out, s.substr(from, begin - from), options);
    out += s.substr(begin, at - begin);
    from = at;
  }
  append_normal_form(out, s.substr(from), options);
  return out;
}

std::string lowercase(std::string_view s) {
  std::string out;
  out.reserve(s.size());
  for (size_t i = 0; i < s.size();) {
    const uint32_t c = utf8_next(s, i);
    if (c == 0x130) {
      out += "i\xcc\x87";  // the one character whose lower case is two
    } else {
      utf8_append(out, static_cast<uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
    }
  }
  return out;
}

}  // namespace kda::text
