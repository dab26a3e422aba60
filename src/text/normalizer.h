// text/normalizer.h — what is done to the text between added tokens before it is cut into words.
#pragma once
#include <simdjson.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "text/regex.h"
#include "text/unicode.h"

namespace kda::text {

// NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, StripAccents, ByteLevel and Sequence, in the order of the
// file.
class Normalizer {
 public:
  Normalizer() = default;
  // Throws Error for other types.
  explicit Normalizer(simdjson::dom::element);

  bool empty() const { return steps_.empty(); }
  // Valid UTF-8 in and out. `at_start` says that the text's first character is the first of the whole input; it becomes
  // false when that character is taken away.
  std::string apply(std::string text, bool& at_start, RegexScratch&) const;

 private:
  enum class Kind { normal_form, lowercase, prepend, replace, strip, strip_accents, byte_level };
  struct Step {
    Kind kind;
    NormalForm form = NormalForm::nfc;
    bool left = false, right = false;  // strip
    std::string literal, content;      // replace: what, by what; prepend: content
    std::optional<Regex> regex;        // replace, when not a literal
  };
  void add(simdjson::dom::element, int depth);
  std::vector<Step> steps_;
};

}  // namespace kda::text
