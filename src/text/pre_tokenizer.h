// text/pre_tokenizer.h — cutting text into the words that the model merges within.
#pragma once
#include <simdjson.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"

namespace kda::text {

// A text and the pieces of it that count, in order. Steps cut pieces into smaller ones, drop some, or write a new text.
struct Pieces {
  struct Range {
    size_t begin, end;
  };
  std::string_view text;
  std::vector<Range> ranges;
  size_t original = 0;    // bytes of the text before the first step
  bool at_start = false;  // text[0] is the first character of the whole input
  std::string own;        // text's bytes, once a step has rewritten them

  std::vector<Range> next;  // room for the step at work
  std::string next_own;
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(Pieces&, RegexScratch&) const = 0;
};

// The steps of the file's `pre_tokenizer`: Sequence, ByteLevel, Split, Digits, Punctuation, Whitespace,
// WhitespaceSplit, Metaspace. Throws Error for other types.
struct PreTokenizers {
  std::vector<std::unique_ptr<PreTokenizer>> steps;
  // The last step writes every byte as a character of its own. It is left out of `steps` and done where a word is
  // looked up, so that words already known need not be rewritten.
  bool bytes_last = false;
};
PreTokenizers parse_pre_tokenizer(simdjson::dom::element);

}  // namespace kda::text
