// Questions: reading them from JSONL, and needles made here.
#include <gtest/gtest.h>

#include <set>

#include "base/error.h"
#include "eval/questions.h"

namespace kda::test {
namespace {

std::string message(const std::string& jsonl, const QuestionFilter& filter = {}) {
  try {
    parse_questions(jsonl, "q.jsonl", filter);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

const char* kThree = R"({"haystack":"noise","keys":1,"chars":800,"prompt":"a","answer":" 1"})"
                     "\n\n"
                     R"({"haystack":"essay","keys":4,"chars":3000,"prompt":"b","answer":" 2","other":[1]})"
                     "\n"
                     R"({"prompt":"ccc","answer":" 3"})";

TEST(Questions, ReadsAndFilters) {
  const auto all = parse_questions(kThree, "q.jsonl");
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[1].haystack, "essay");
  EXPECT_EQ(all[1].keys, 4);
  EXPECT_EQ(all[1].chars, 3000);
  EXPECT_EQ(all[2].prompt, "ccc");
  EXPECT_EQ(all[2].answer, " 3");
  EXPECT_EQ(parse_questions(kThree, "q", {.keys = 1}).at(0).prompt, "a");
  EXPECT_EQ(parse_questions(kThree, "q", {.max_chars = 800}).size(), 2u);
  EXPECT_EQ(parse_questions(kThree, "q", {.max_chars = 3}).at(0).prompt, "ccc");  // the prompt's own length
  EXPECT_NE(message(kThree, {.max_chars = 2}), "");
  EXPECT_EQ(parse_questions(kThree, "q", {.limit = 2}).at(1).prompt, "b");
}

TEST(Questions, ErrorsNameTheLine) {
  EXPECT_NE(message("{\"prompt\":\"a\",\"answer\":\"1\"}\nnonsense\n").find("q.jsonl line 2"), std::string::npos);
  EXPECT_NE(message("{\"prompt\":\"a\"}").find("q.jsonl line 1"), std::string::npos);
  EXPECT_NE(message("{\"prompt\":\"a\",\"answer\":\" \"}").find("`answer` is empty"), std::string::npos);
  EXPECT_NE(message("{\"prompt\":\"a\",\"answer\":\"1\",\"keys\":-1}").find("keys"), std::string::npos);
  EXPECT_NE(message(kThree, {.keys = 9}).find("none of 3 questions"), std::string::npos);
}

TEST(Questions, ALineReadsBackAsItself) {
  const Question q{"a \"b\"\nc", " 17", "noise", 2, 800};
  const Question back = parse_questions(question_line(q), "q").at(0);
  EXPECT_EQ(back.prompt, q.prompt);
  EXPECT_EQ(back.answer, q.answer);
  EXPECT_EQ(back.haystack, q.haystack);
  EXPECT_EQ(back.keys, q.keys);
  EXPECT_EQ(back.chars, q.chars);
}

TEST(Questions, SentencesOfAText) {
  const auto s = sentences_of(
      "Too short. This one is long enough to be\n  taken as it is! And\tthis is another one.\n\nA heading without an "
      "end\n\nThe last sentence here.");
  EXPECT_EQ(s, (std::vector<std::string>{"This one is long enough to be taken as it is!", "And this is another one.",
                                         "A heading without an end", "The last sentence here."}));
  EXPECT_TRUE(sentences_of("").empty());
  EXPECT_TRUE(sentences_of(" \n\n ").empty());
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(Needles, TheAnswerIsInTheHaystackOnceUnderTheKeyThatIsAsked) {
  const std::vector<std::string> sentences{"The first sentence of some text.", "A second one follows it here."};
  for (const Haystack h : {Haystack::noise, Haystack::essay, Haystack::needles})
    for (const NeedleValue v : {NeedleValue::number, NeedleValue::uuid})
      for (uint64_t i = 0; i < 50; ++i) {
        const NeedleSpec spec{h, v, 3, 900};
        const Question q = make_needle(spec, sentences, 7, i);
        const std::string value = q.answer.substr(1);
        EXPECT_EQ(q.answer[0], ' ');
        EXPECT_EQ(value.size(), v == NeedleValue::number ? 7u : 36u);
        EXPECT_EQ(count(q.prompt, value), 1u);
        const std::string type = v == NeedleValue::number ? "number" : "uuid";
        const std::string needle = "One of the special magic " + type + "s for ";
        EXPECT_EQ(int64_t(count(q.prompt, needle)), q.keys);
        EXPECT_TRUE(h == Haystack::needles || q.keys == 3);
        // The key of the question's sentence is the one beside the answer.
        const size_t at = q.prompt.find(" is: " + value + ".");
        ASSERT_NE(at, std::string::npos);
        const size_t from = q.prompt.rfind(needle, at) + needle.size();
        const std::string key = q.prompt.substr(from, at - from);
        const std::string end = "\nWhat is the special magic " + type + " for " + key +
                                " mentioned in the provided text? The special magic " + type + " for " + key +
                                " mentioned in the provided text is";
        EXPECT_TRUE(q.prompt.ends_with(end)) << q.prompt;
        EXPECT_GE(q.prompt.size(), 900u);
        EXPECT_LE(q.prompt.size(), 900u + 1200u);
      }
}

TEST(Needles, SameSeedSameQuestion) {
  const NeedleSpec spec{Haystack::noise, NeedleValue::number, 2, 500};
  std::set<std::string> prompts;
  for (uint64_t seed : {1, 2})
    for (uint64_t i = 0; i < 40; ++i) {
      const Question q = make_needle(spec, {}, seed, i);
      EXPECT_EQ(q.prompt, make_needle(spec, {}, seed, i).prompt);
      prompts.insert(q.prompt);
    }
  EXPECT_EQ(prompts.size(), 80u);
  // Written down once: it must not change with the machine or the version.
  EXPECT_EQ(make_needle(spec, {}, 1, 0).answer, " 5696348");
}

TEST(Needles, RefusesWhatCannotBeMade) {
  EXPECT_THROW(make_needle({.keys = 0}, {}, 0, 0), Error);
  EXPECT_THROW(make_needle({.chars = 0}, {}, 0, 0), Error);
  EXPECT_THROW(make_needle({.haystack = Haystack::essay}, {}, 0, 0), Error);
  EXPECT_THROW(make_needle({.keys = 1000000}, {}, 0, 0), Error);
}

}  // namespace
}  // namespace kda::test
