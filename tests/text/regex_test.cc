// What Oniguruma's Ruby syntax says, in PCRE2. The expected matches were found with Hugging Face `tokenizers`
// (pre_tokenizers.Split(Regex(..), "isolated")).
#include "text/regex.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace kda::text {
namespace {

// The matches, each between [ and ], with what lies between them.
std::string marked(const std::string& pattern, const std::string& text) {
  const Regex regex(pattern);
  RegexScratch scratch;
  std::string out;
  size_t from = 0;
  regex.for_each(text, scratch, [&](size_t begin, size_t end) {
    out += text.substr(from, begin - from) + "[" + text.substr(begin, end - begin) + "]";
    from = end;
  });
  return out + text.substr(from);
}

TEST(Regex, MeansWhatOnigurumaMeans) {
  EXPECT_EQ(marked("a+", "baac"), "b[aa]c");
  EXPECT_EQ(marked("\\s", "x\u180ey\u00a0z\u0085"), "x\u180ey[\u00a0]z[\u0085]");  // U+180E is no space
  EXPECT_EQ(marked("\\w+", "naïve_x² e\u0301-Ⓐ½"), "[naïve_x²] [e\u0301]-[Ⓐ½]");
  EXPECT_EQ(marked("\\h+", "xyz12FFg"), "xyz[12FF]g");
  EXPECT_EQ(marked("[\\h-]+", "x-1f"), "x[-1f]");
  EXPECT_EQ(marked("a{2}+", "aaaaa"), "[aaaa]a");  // a repeated repetition, not a possessive one
  EXPECT_EQ(marked("a{1,3}+a", "aaaa"), "[aaaa]");
  EXPECT_EQ(marked("a++a", "aaaa"), "aaaa");  // these are possessive
  EXPECT_EQ(marked("a{,2}b", "aaab"), "a[aab]");
  EXPECT_EQ(marked("x{,}", "x{,}"), "[x{,}]");                 // no repetition: literal
  EXPECT_EQ(marked("^b|c$", "a\nb\nc\nd"), "a\n[b]\n[c]\nd");  // lines
  EXPECT_EQ(marked("a.b", "a\nb"), "a\nb");
  EXPECT_EQ(marked("(?m:a.b)", "a\nb"), "[a\nb]");
  EXPECT_EQ(marked("(?i)straße|x", "STRAßE X"), "[STRAßE] [X]");
  EXPECT_EQ(marked("(?i:'s|'ll)", "'S 'ſ 'LL"), "['S] ['ſ] ['LL]");
  EXPECT_EQ(marked("\\p{Han}+", "日本語、かな"), "[日本語]、かな");
  EXPECT_EQ(marked("\\p{^L}+", "ab12"), "ab[12]");
  EXPECT_EQ(marked("\\bb", "ab b ²b"), "ab [b] ²b");
  EXPECT_EQ(marked("\\x{1F600}|\\u00e9|\\x41", "A😀é"), "[A][😀][é]");
  EXPECT_EQ(marked("\\v", "\x0b\n"), "[\x0b]\n");
  EXPECT_EQ(marked("(?<name>a)(?#comment)b", "ab"), "[ab]");
}

TEST(Regex, EmptyMatches) {
  EXPECT_EQ(marked("x*", "axb"), "[]a[x]b[]");
  EXPECT_EQ(marked("(?=b)", "abé"), "a[]bé");
  EXPECT_EQ(marked("x*", "éé"), "[]é[]é[]");
  EXPECT_EQ(marked("x*", ""), "[]");
}

TEST(Regex, RefusesWhatWouldMeanSomethingElse) {
  for (const char* pattern :
       {"[a&&b]", "[a[bc]]", "[[:alpha:]]",  "(*UTF)a",  "\\g<1>", "\\Qa",       "a(?i)b|c", "(?x)a b",
        "\\xff",  "(?~a)",   "a**)",         "(a",       "a)",     "*a",         "[",        "[]",
        "\\",     "\\p{L",   "\\p{No such}", "(?P<n>a)", "a{3,1}", "\\x{110000}"})
    EXPECT_THROW(Regex{pattern}, Error) << pattern;
  EXPECT_THROW(Regex(std::string(1000, '(') + std::string(1000, ')')), Error);
}

// Long runs need more stack than the machine code starts with.
TEST(Regex, LongTexts) {
  const std::string a(200000, 'a');
  EXPECT_EQ(marked("(?:a|b)+", a), "[" + a + "]");
  const std::string spaces(300000, ' ');
  EXPECT_EQ(marked("\\s+(?!\\S)|\\s+", spaces + "x"), "[" + spaces.substr(1) + "][ ]x");
}

}  // namespace
}  // namespace kda::text
