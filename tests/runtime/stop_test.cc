#include "runtime/stop.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/rng.h"

namespace kda {
namespace {

TEST(StopMatcher, HoldsBackWhatMayBecomeAStop) {
  StopMatcher m({"Question:", "</s>"});
  EXPECT_EQ(m.push("The answer is 4.\n"), "The answer is 4.\n");
  EXPECT_EQ(m.push("Ques"), "");
  EXPECT_EQ(m.push("t, Q"), "Quest, ");
  EXPECT_EQ(m.push("uestion"), "");
  EXPECT_FALSE(m.stopped());
  EXPECT_EQ(m.push(": what?"), "");
  EXPECT_TRUE(m.stopped());
  EXPECT_EQ(m.hit(), 0);
  EXPECT_EQ(m.push("more"), "");
  EXPECT_EQ(m.finish(), "");
}

TEST(StopMatcher, FinishGivesWhatWasHeldBack) {
  StopMatcher m({"abc"});
  EXPECT_EQ(m.push("xab"), "x");
  EXPECT_EQ(m.finish(), "ab");
  EXPECT_FALSE(m.stopped());
  EXPECT_EQ(m.hit(), -1);
}

TEST(StopMatcher, OverlapsAndSeveralStops) {
  StopMatcher a({"aab"});
  EXPECT_EQ(a.push("aaa"), "a");
  EXPECT_EQ(a.push("b"), "");
  EXPECT_TRUE(a.stopped());
  StopMatcher b({"bc", "abc"});  // completed by the same byte: the longer one
  EXPECT_EQ(b.push("xabcd"), "x");
  EXPECT_EQ(b.hit(), 1);
  StopMatcher c({"abcd", "bc"});  // "bc" is complete first
  EXPECT_EQ(c.push("xabcd"), "xa");
  EXPECT_EQ(c.hit(), 1);
  StopMatcher none({});
  EXPECT_EQ(none.push("all of it"), "all of it");
  EXPECT_EQ(none.finish(), "");
}

TEST(StopMatcher, MultiByteText) {
  StopMatcher m({"né!", "終"});
  EXPECT_EQ(m.push("garçon, n"), "garçon, ");
  EXPECT_EQ(m.push("è né"), "nè ");
  EXPECT_EQ(m.push("? 絵"), "né? 絵");
  EXPECT_EQ(m.push("終わり"), "");
  EXPECT_EQ(m.hit(), 1);
}

TEST(StopMatcher, RefusesAnEmptyStop) { EXPECT_THROW(StopMatcher({"a", ""}), Error); }

// What comes out depends on the text, not on its pieces, and never shows a stop text.
TEST(StopMatcher, AnyCutGivesTheSame) {
  const std::vector<std::string> stops{"abab", "bb", "cabc", "aaaa"};
  for (uint32_t round = 0; round < 400; ++round) {
    std::string text;
    for (uint32_t i = 0; i < 30; ++i) text += char('a' + Philox::block(1, {round, i, 0, 0})[0] % 3);
    StopMatcher whole(stops);
    std::string want = whole.push(text);
    want += whole.finish();
    // By definition: the shortest beginning of the text that ends with a stop, less the longest such stop.
    std::string plain = text;
    for (size_t end = 1; end <= text.size() && plain.size() == text.size(); ++end)
      for (const auto& s : stops)
        if (text.substr(0, end).ends_with(s))
          plain = std::min(plain, text.substr(0, end - s.size()), [](auto& x, auto& y) { return x.size() < y.size(); });
    EXPECT_EQ(want, plain) << text;
    StopMatcher cut(stops);
    std::string got;
    for (size_t at = 0; at < text.size();) {
      const size_t n = 1 + Philox::block(2, {round, uint32_t(at), 0, 0})[0] % 4;
      got += cut.push(std::string_view(text).substr(at, n));
      at += n;
    }
    got += cut.finish();
    EXPECT_EQ(got, want) << text;
    EXPECT_EQ(cut.hit(), whole.hit());
  }
}

}  // namespace
}  // namespace kda
