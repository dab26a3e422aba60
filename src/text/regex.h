// text/regex.h — regular expressions as tokenizer files write them (Oniguruma, Ruby syntax), matched by PCRE2's JIT.
#pragma once
#include <memory>
#include <string>
#include <string_view>

namespace kda::text {

// What matching writes to. One per thread at a time, for any number of expressions.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  struct Data;
  std::unique_ptr<Data> data_;
};

class Regex {
 public:
  // Throws Error for what cannot be compiled or would mean something else in PCRE2 and is not translated.
  explicit Regex(std::string_view pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  struct Match {
    size_t begin, end;
  };
  // Finds the first match at or after byte `from` of `text` (valid UTF-8, `from` at a character's start).
  // Throws Error when the expression needs more steps than a limit.
  bool search(std::string_view text, size_t from, Match&, RegexScratch&) const;

  // Calls f(begin, end) for each match in turn. An empty match right behind the last match is passed over.
  template <class F>
  void for_each(std::string_view text, RegexScratch& scratch, F f) const {
    size_t from = 0, last_end = std::string_view::npos;
    Match m;
    while (from <= text.size() && search(text, from, m, scratch)) {
      if (m.begin == m.end && m.end == last_end) {
        from = step(text, from);
        continue;
      }
      f(m.begin, m.end);
      from = last_end = m.end;
    }
  }

 private:
  static size_t step(std::string_view text, size_t from);
  void* code_ = nullptr;
  bool jit_ = false;
};

// The same expression in PCRE2's syntax: \s is White_Space, \w Unicode's word characters, \h a hexadecimal digit, (?m)
// the dot that matches newlines, `{n,m}+` a repeated repetition, \p{Script} a script. Throws Error for class operators,
// subexpression calls and other constructs that PCRE2 reads differently.
std::string translate_regex(std::string_view onig);

}  // namespace kda::text
