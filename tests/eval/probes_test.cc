// Probes against a real model (assets/nano-teacher), and against sums done plainly.
#include <gtest/gtest.h>

#include <cmath>

#include "base/file.h"
#include "eval/probes.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

const std::filesystem::path kSource = KDA_SOURCE_DIR;

EngineOptions two_threads(Precision p = Precision::exact) {
  EngineOptions o;
  o.precision = p;
  o.threads = 2;
  return o;
}

std::vector<Question> bundled(const char* name, const QuestionFilter& filter) {
  const auto path = kSource / "assets/demo" / name;
  return parse_questions(read_file(path), path.string(), filter);
}

class NanoProbes : public testing::Test {
 protected:
  Engine engine{kSource / "assets/nano-teacher", two_threads()};
};

// The teacher finds every one of these (scores.json says 1.0 for 1 key up to 3,000 characters).
TEST_F(NanoProbes, TheTeacherFindsNeedlesWhateverTheBatch) {
  auto questions = bundled("needles.jsonl", {.max_chars = 800, .limit = 6});
  ASSERT_EQ(questions.size(), 6u);
  const auto together = ask_needles(engine, questions);
  ProbeOptions alone;
  alone.batch_bytes = 1;
  std::vector<int64_t> progress;
  alone.progress = [&](int64_t done) { progress.push_back(done); };
  const auto one_by_one = ask_needles(engine, questions, alone);
  EXPECT_EQ(progress, (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  for (size_t i = 0; i < questions.size(); ++i) {
    EXPECT_TRUE(together[i].right) << together[i].text;
    EXPECT_EQ(together[i].text, questions[i].answer);
    EXPECT_EQ(one_by_one[i].text, together[i].text);
  }
  // Another answer is not found: the verdict can be no.
  for (Question& q : questions) q.answer = " 1234567";
  for (const Answered& a : ask_needles(engine, questions)) EXPECT_FALSE(a.right);
}

TEST_F(NanoProbes, TeacherForcedEqualsGreedy) {
  const auto questions = bundled("arithmetic.jsonl", {.limit = 12});
  const ArithmeticScore score = ask_arithmetic(engine, questions, true);
  EXPECT_EQ(score.asked, 12);
  ASSERT_EQ(score.answers.size(), questions.size());
  int64_t whole = 0, numbers = 0;
  for (size_t i = 0; i < questions.size(); ++i) {
    whole += score.answers[i].text.starts_with(questions[i].answer);
    numbers += final_number(score.answers[i].text) == final_number(questions[i].answer);
  }
  EXPECT_EQ(score.whole, whole);
  EXPECT_EQ(score.final_number, numbers);
  EXPECT_GT(whole, 0);
  EXPECT_LT(whole, 12);
  EXPECT_EQ(ask_arithmetic(engine, questions, false).whole, whole);
}

TEST(FinalNumber, AsTheStrictMatchTakesIt) {
  EXPECT_EQ(final_number("so 3.\n#### 1,234.\nmore 9"), "1234");
  EXPECT_EQ(final_number("#### -7"), "-7");
  EXPECT_EQ(final_number("#### 2.5 and"), "2.5");
  EXPECT_EQ(final_number("#### 5-3"), "5");
  EXPECT_EQ(final_number("no mark 12"), "");
  EXPECT_EQ(final_number("#### none"), "");
}

TEST_F(NanoProbes, HeldOutEqualsAPlainSum) {
  const auto path = kSource / "assets/demo/heldout.jsonl";
  auto documents = tokenize_documents(*engine.tokenizer(), read_file(path), path.string(), 600);
  documents.resize(2);
  Engine other(kSource / "assets/nano-teacher", two_threads(Precision::fast));
  const Agreement::Result got = held_out(other, &engine, documents);
  double loss = 0, kl = 0;
  int64_t predicted = 0, positions = 0, same = 0;
  const int64_t V = engine.config().vocabulary;
  for (const auto& ids : documents) {
    std::vector<float> p, q;
    Session a(engine), b(other);
    const auto keep = [](std::vector<float>& to) {
      return [&](int64_t, ConstView rows) { to.insert(to.end(), rows.as<float>(), rows.as<float>() + rows.size()); };
    };
    engine.score(a, ids, keep(p));
    other.score(b, ids, keep(q));
    for (size_t t = 0; t < ids.size(); ++t) {
      const float *x = p.data() + int64_t(t) * V, *y = q.data() + int64_t(t) * V;
      double zx = 0, zy = 0;
      for (int64_t i = 0; i < V; ++i) zx += std::exp(double(x[i])), zy += std::exp(double(y[i]));
      for (int64_t i = 0; i < V; ++i) kl += std::exp(double(x[i])) / zx * (x[i] - std::log(zx) - y[i] + std::log(zy));
      same += std::max_element(x, x + V) - x == std::max_element(y, y + V) - y;
      ++positions;
      if (t + 1 < ids.size()) loss += std::log(zy) - y[ids[t + 1]], ++predicted;
    }
  }
  EXPECT_EQ(got.predicted, predicted);
  EXPECT_EQ(got.positions, positions);
  // Pieces of 512 against one pass: rounding of bf16 products aside, the same sums.
  EXPECT_NEAR(got.loss, loss / double(predicted), 1e-3);
  EXPECT_NEAR(got.kl, kl / double(positions), 1e-4);
  EXPECT_NEAR(got.top1, double(same) / double(positions), 0.01);
  EXPECT_GT(got.top1, 0.9);
}

TEST_F(NanoProbes, DocumentsAreCutAndErrorsNameTheLine) {
  const Tokenizer& t = *engine.tokenizer();
  const auto d = tokenize_documents(t, "{\"text\":\"one two three four\"}\n\n{\"text\":\"x\"}\n", "f", 3);
  ASSERT_EQ(d.size(), 2u);
  EXPECT_EQ(d[0].size(), 3u);
  EXPECT_EQ(d[0][0], 0);  // begin of text
  try {
    tokenize_documents(t, "{\"text\":\"x\"}\n{\"txt\":1}\n", "f.jsonl", 3);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("f.jsonl line 2"), std::string::npos) << e.what();
  }
  EXPECT_THROW(held_out(engine, nullptr, std::vector<std::vector<int32_t>>{{5}}), Error);
}

TEST(Probes, NeedATokenizerAndOneVocabulary) {
  KDA_NEED(folder, "tiny-kda");
  Engine kda(folder, two_threads());
  const std::vector<Question> one{{"a", " b", "", 0, 0}};
  EXPECT_THROW(ask_needles(kda, one), Error);
  EXPECT_THROW(ask_arithmetic(kda, one, false), Error);
  Engine nano(kSource / "assets/nano-teacher", two_threads());
  EXPECT_THROW(held_out(kda, &nano, std::vector<std::vector<int32_t>>{{1, 2, 3}}), Error);
}

}  // namespace
}  // namespace kda::test
