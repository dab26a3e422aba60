// text/unicode.h — character properties and normal forms as the reference implementation has them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace kda::text {

// Unicode 14 (utf8proc 2.8), but for what text/unicode_reference.h lists.
bool is_whitespace(uint32_t code);   // White_Space
bool is_numeric(uint32_t code);      // Nd, Nl, No
bool is_punctuation(uint32_t code);  // P*, and ASCII's symbols
bool is_mark(uint32_t code);         // M*
bool is_word(uint32_t code);         // UTS #18 \w: Alphabetic, M*, Nd, Pc, Join_Control

enum class NormalForm { nfc, nfd, nfkc, nfkd };
// `s` must be valid UTF-8.
std::string normal_form(std::string_view s, NormalForm);

// Each character's full lower-case mapping, without context (a final sigma is not looked for).
std::string lowercase(std::string_view s);

}  // namespace kda::text
