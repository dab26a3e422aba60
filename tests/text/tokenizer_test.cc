// Ids and texts against Hugging Face `tokenizers`: the golden file of Llama 3, the nano teacher's tokenizer, and the
// small ones that tools/make_tokenizer_data.py wrote.
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "base/error.h"
#include "tests/golden.h"

namespace kda {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::vector<Json> read_lines(const fs::path& path) {
  std::ifstream in(path);
  std::vector<Json> out;
  for (std::string line; std::getline(in, line);) out.push_back(Json::parse(line));
  return out;
}

std::string stream(const Tokenizer& t, const std::vector<int32_t>& ids, bool skip_special) {
  StreamDecoder d(t, skip_special);
  std::string all;
  for (size_t i = 0; i <= ids.size(); ++i) {
    const std::string piece = i < ids.size() ? d.push(ids[i]) : d.finish();
    // dump() throws for a piece that is not UTF-8, as half a character would be.
    EXPECT_NO_THROW(Json(piece).dump()) << "half a character at token " << i;
    all += piece;
  }
  return all;
}

testing::AssertionResult same(const std::vector<int32_t>& got, const std::vector<int32_t>& want) {
  if (got == want) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "got " << Json(got).dump() << ", want " << Json(want).dump();
}

const Tokenizer* llama3(std::string& why) {
  static std::unique_ptr<Tokenizer> t;
  const auto file = test::golden_path("llama3-tokenizer/tokenizer.json.xz");
  if (file.empty()) {
    why = "needs golden/llama3-tokenizer/tokenizer.json.xz (KDA_GOLDEN_DIR or ../shared/golden)";
    return nullptr;
  }
  if (t) return t.get();
  FILE* pipe = popen(("xz -dc '" + file.string() + "'").c_str(), "r");
  std::string json;
  std::vector<char> buffer(1 << 20);
  for (size_t n; pipe && (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) json.append(buffer.data(), n);
  if (!pipe || pclose(pipe) != 0 || json.empty()) {
    why = "needs the program xz to unpack " + file.string();
    return nullptr;
  }
  t = std::make_unique<Tokenizer>(Tokenizer::from_json(json));
  return t.get();
}

#define NEED_LLAMA3(t)                    \
  std::string why;                        \
  const Tokenizer* const t = llama3(why); \
  if (!t) GTEST_SKIP() << why

TEST(Tokenizer, Llama3Golden) {
  NEED_LLAMA3(t);
  KDA_NEED(file, "tokenizer_llama3.jsonl");
  const auto lines = read_lines(file);
  ASSERT_FALSE(lines.empty());
  for (const auto& line : lines) {
    const std::string text = line["text"];
    const auto ids = line["ids"].get<std::vector<int32_t>>();
    EXPECT_TRUE(same(t->encode(text), ids)) << text;
    EXPECT_TRUE(same(t->encode(text, false), line["ids_no_special"].get<std::vector<int32_t>>())) << text;
    EXPECT_EQ(t->decode(ids), line["decoded"].get<std::string>());
    EXPECT_EQ(stream(*t, ids, false), line["decoded"].get<std::string>());
  }
}

TEST(Tokenizer, Llama3Vocabulary) {
  NEED_LLAMA3(t);
  EXPECT_EQ(t->vocabulary(), 128256);
  EXPECT_EQ(t->token_to_id("<|begin_of_text|>"), 128000);
  EXPECT_EQ(t->id_to_token(128000), "<|begin_of_text|>");
  EXPECT_EQ(t->id_to_token(9906), "Hello");
  EXPECT_EQ(t->token_to_id("no such token at all"), -1);
  EXPECT_TRUE(t->is_special(128001));
  EXPECT_FALSE(t->is_special(9906));
  EXPECT_FALSE(t->is_special(-1));
  EXPECT_FALSE(t->is_special(128256));
  EXPECT_FALSE(t->has_token(128256));
}

TEST(Tokenizer, NanoTeacher) {
  const auto dir = test::shared_path("nano-teacher");
  if (dir.empty()) GTEST_SKIP() << "needs ../shared/nano-teacher";
  const auto t = Tokenizer::load(dir);
  const test::GoldenFile expected(dir / "expected.safetensors");
  // A real text's ids: decoding and encoding again gives them back.
  const auto ids = expected["input_ids"].ids();
  const std::string text = t.decode(ids);
  EXPECT_TRUE(same(t.encode(text, false), ids)) << text;
  EXPECT_EQ(stream(t, ids, false), text);
}

class Small : public testing::TestWithParam<std::string> {
 protected:
  static fs::path dir() { return fs::path(KDA_SOURCE_DIR) / "tests/data/tokenizers"; }
};

TEST_P(Small, EqualsReference) {
  const auto t = Tokenizer::load(dir() / (GetParam() + ".json"));
  const auto lines = read_lines(dir() / (GetParam() + ".jsonl"));
  ASSERT_GE(lines.size(), 40u);
  for (const auto& line : lines) {
    const std::string text = line["text"];
    const auto ids = line["ids"].get<std::vector<int32_t>>();
    EXPECT_TRUE(same(t.encode(text), ids)) << line["text"];
    EXPECT_TRUE(same(t.encode(text, false), line["plain"].get<std::vector<int32_t>>())) << line["text"];
    EXPECT_EQ(t.decode(ids), line["decoded"].get<std::string>()) << line["ids"];
    EXPECT_EQ(t.decode(ids, true), line["skipped"].get<std::string>()) << line["ids"];
  }
}

// Any ids, not only those of a text: broken characters, runs of byte tokens, specials in between, ids without a token.
TEST_P(Small, StreamEqualsDecode) {
  const auto t = Tokenizer::load(dir() / (GetParam() + ".json"));
  std::mt19937 r(5);
  for (int n = 0; n < 300; ++n) {
    std::vector<int32_t> ids(r() % 12);
    for (auto& id : ids) id = static_cast<int32_t>(r() % static_cast<uint32_t>(t.vocabulary() + 3)) - 1;
    for (const bool skip : {false, true}) EXPECT_EQ(stream(t, ids, skip), t.decode(ids, skip)) << Json(ids);
  }
}

INSTANTIATE_TEST_SUITE_P(Data, Small,
                         testing::Values("llama2", "metaspace_first", "metaspace_always", "metaspace_never", "unknown",
                                         "unknown_fused", "llama3", "qwen2", "gpt4", "gpt4o", "deepseek", "gpt2",
                                         "added", "prefix", "suffix", "split_isolated", "split_removed",
                                         "split_merged_with_previous", "split_merged_with_next", "split_contiguous"),
                         [](const auto& p) { return p.param; });

// The comparison notices one id that is off, missing or too many.
TEST(Tokenizer, SameCanFail) {
  EXPECT_TRUE(same({1, 2, 3}, {1, 2, 3}));
  EXPECT_FALSE(same({1, 2, 3}, {1, 2, 4}));
  EXPECT_FALSE(same({1, 2}, {1, 2, 3}));
  EXPECT_FALSE(same({1, 2, 3}, {1, 2}));
}

TEST(Tokenizer, StreamHoldsHalfACharacterBack) {
  const auto t = Tokenizer::load(fs::path(KDA_SOURCE_DIR) / "tests/data/tokenizers/gpt2.json");
  const std::string text = " é😀x";
  const auto ids = t.encode(text);
  ASSERT_GT(ids.size(), 5u);  // the emoji is several tokens
  StreamDecoder d(t);
  std::vector<std::string> pieces;
  for (int32_t id : ids) pieces.push_back(d.push(id));
  EXPECT_EQ(d.finish(), "");
  int empty = 0;
  std::string all;
  for (const auto& p : pieces) {
    empty += p.empty();
    all += p;
  }
  EXPECT_EQ(all, text);
  EXPECT_GE(empty, 3);
  // Cut off within the emoji: one U+FFFD, only at the end, and the decoder is ready for the next text.
  for (size_t i = 0; i + 2 < ids.size(); ++i) d.push(ids[i]);
  EXPECT_EQ(d.finish(), "\xef\xbf\xbd");
  EXPECT_EQ(d.push(ids.back()), "x");
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto t = Tokenizer::load(fs::path(KDA_SOURCE_DIR) / "tests/data/tokenizers/gpt2.json");
  const auto message = [&](const std::string& s) -> std::string {
    try {
      t.encode(s);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message("abc"), "");
  EXPECT_NE(message("ab\xff"
                    "c")
                .find("byte 2 of 4"),
            std::string::npos)
      << message(
             "ab\xff"
             "c");
  for (const std::string bad : {"\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\xf0\x9f\x98"})
    EXPECT_NE(message("é" + bad).find("byte 2 of"), std::string::npos) << message("é" + bad);
}

// Words are remembered between calls and across threads: neither may change an answer.
TEST(Tokenizer, ThreadsAndRepetitionChangeNothing) {
  const auto dir = fs::path(KDA_SOURCE_DIR) / "tests/data/tokenizers";
  const auto t = Tokenizer::load(dir / "qwen2.json");
  const auto lines = read_lines(dir / "qwen2.jsonl");
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int k = 0; k < 4; ++k) {
    threads.emplace_back([&, k] {
      for (int round = 0; round < 3; ++round)
        for (size_t i = 0; i < lines.size(); ++i) {
          const auto& line = lines[(i + static_cast<size_t>(k) * 7) % lines.size()];
          if (t.encode(line["text"].get<std::string>()) != line["ids"].get<std::vector<int32_t>>()) ++wrong;
          if (t.decode(line["ids"].get<std::vector<int32_t>>()) != line["decoded"].get<std::string>()) ++wrong;
        }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Long words take another way than short ones: both give what the reference's definition says.
TEST(Tokenizer, LongWordsMergeLikeShortOnes) {
  std::mt19937 r(11);
  for (int round = 0; round < 40; ++round) {
    // Tokens over {a, b}: random merges, some of which make the same token by different pairs.
    std::vector<std::string> tokens = {"a", "b"};
    Json merges = Json::array();
    for (int m = 0; m < 30; ++m) {
      const auto l = tokens[r() % tokens.size()], rgt = tokens[r() % tokens.size()];
      if (l.size() + rgt.size() > 9) continue;
      merges.push_back({l, rgt});
      if (std::find(tokens.begin(), tokens.end(), l + rgt) == tokens.end()) tokens.push_back(l + rgt);
    }
    Json vocab = Json::object();
    for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
    const auto t =
        Tokenizer::from_json(Json{{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}}.dump());
    for (int n : {3, 20, 47, 48, 49, 50, 90}) {
      std::string word;
      for (int i = 0; i < n; ++i) word += "ab"[r() % 2];
      // The definition: over and over, the pair whose merge was learnt first (of a merge listed twice the later place
      // counts), the leftmost of them.
      std::vector<std::string> parts;
      for (char c : word) parts.emplace_back(1, c);
      for (;;) {
        size_t best = parts.size(), best_rank = merges.size();
        for (size_t i = 0; i + 1 < parts.size(); ++i)
          for (size_t k = merges.size(); k-- > 0;)
            if (merges[k][0] == parts[i] && merges[k][1] == parts[i + 1]) {
              if (k < best_rank) best_rank = k, best = i;
              break;
            }
        if (best == parts.size()) break;
        parts[best] += parts[best + 1];
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      }
      std::vector<int32_t> want;
      for (const auto& p : parts) want.push_back(vocab[p]);
      EXPECT_TRUE(same(t.encode(word), want)) << word << " " << merges;
    }
  }
}

}  // namespace
}  // namespace kda
