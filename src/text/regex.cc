#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/regex.h"

#include <pcre2.h>

#include <array>
#include <utility>

#include "base/error.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

struct CompileContext {
  pcre2_compile_context* c = pcre2_compile_context_create(nullptr);
  ~CompileContext() { pcre2_compile_context_free(c); }
};

constexpr size_t kLongestPattern = 1 << 16;
constexpr size_t kJitStackStart = 32 << 10, kJitStackMost = 8 << 20;

}  // namespace

struct RegexScratch::Data {
  pcre2_match_data* match = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = nullptr;
  ~Data() {
    pcre2_match_data_free(match);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

RegexScratch::RegexScratch() : data_(std::make_unique<Data>()) {
  KDA_CHECK(data_->match && data_->context, "regular expressions: out of memory");
}
RegexScratch::~RegexScratch() = default;

Regex::Regex(std::string_view pattern) {
  KDA_CHECK(pattern.size() <= kLongestPattern, "tokenizer: a regular expression of ", pattern.size(),
            " bytes, at most ", kLongestPattern);
  const std::string translated = translate_regex(pattern);
  CompileContext context;
  KDA_CHECK(context.c, "regular expressions: out of memory");
  pcre2_set_newline(context.c, PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE where = 0;
  // MULTILINE: in Ruby's syntax ^ and $ are always the ends of lines.
  auto* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &where, context.c);
  KDA_CHECK(code, "tokenizer: regular expression \"", pattern, "\": ", pcre_message(error), " (byte ", where, " of \"",
            translated, "\")");
  code_ = code;
  // Where no machine code may be made the interpreter gives the same answers, slower.
  jit_ = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
}

Regex::~Regex() { pcre2_code_free(static_cast<pcre2_code*>(code_)); }
Regex::Regex(Regex&& o) noexcept : code_(std::exchange(o.code_, nullptr)), jit_(o.jit_) {}
Regex& Regex::operator=(Regex&& o) noexcept {
  std::swap(code_, o.code_);
  std::swap(jit_, o.jit_);
  return *this;
}

size_t Regex::step(std::string_view text, size_t from) {
  return from < text.size() ? from + utf8_length(text[from]) : from + 1;
}

bool Regex::search(std::string_view text, size_t from, Match& m, RegexScratch& scratch) const {
  auto* code = static_cast<const pcre2_code*>(code_);
  auto& d = *scratch.data_;
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data() ? text.data() : "");
  const auto run = [&] {
    return jit_ ? pcre2_jit_match(code, subject, text.size(), from, 0, d.match, d.context)
                : pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, d.match, d.context);
  };
  int rc = run();
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT && !d.stack) {
    d.stack = pcre2_jit_stack_create(kJitStackStart, kJitStackMost, nullptr);
    KDA_CHECK(d.stack, "regular expressions: out of memory");
    pcre2_jit_stack_assign(d.context, nullptr, d.stack);
    rc = run();
  }
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  KDA_CHECK(rc >= 0, "tokenizer: matching a regular expression at byte ", from, " of ", text.size(), ": ",
            pcre_message(rc));
  const PCRE2_SIZE* o = pcre2_get_ovector_pointer(d.match);
  // \\K in a lookahead can report a start behind the end, or before `from`; either would make the search stand still.
  KDA_CHECK(o[0] <= o[1] && o[0] >= from, "tokenizer: a regular expression reports a match that ends before it begins");
  m = {o[0], o[1]};
  return true;
}

}  // namespace kda::text
