// Broken and hostile tokenizer files: a message that names the fault, never a crash or an answer.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/tokenizer.h"

namespace kda {
namespace {

using Json = nlohmann::json;

Json good() {
  return {{"version", "1.0"},
          {"added_tokens", {{{"id", 4}, {"content", "<s>"}, {"special", true}, {"normalized", false}}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}, {"<unk>", 3}}},
            {"merges", {"a b"}},
            {"unk_token", "<unk>"}}}};
}

std::string message(const std::string& json) {
  try {
    Tokenizer::from_json(json);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// The file with `value` at a JSON pointer, or without what is there.
std::string with(const char* pointer, const Json& value) {
  Json j = good();
  j[Json::json_pointer(pointer)] = value;
  return message(j.dump());
}
std::string without(const char* parent, const char* key) {
  Json j = good();
  j[Json::json_pointer(parent)].erase(key);
  return message(j.dump());
}

#define EXPECT_HAS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << "message: " << (text)

TEST(BrokenTokenizer, GoodOneIsGood) {
  EXPECT_EQ(message(good().dump()), "");
  const auto t = Tokenizer::from_json(good().dump());
  EXPECT_EQ(t.encode("abz<s>b"), (std::vector<int32_t>{2, 3, 4, 1}));
  EXPECT_EQ(t.vocabulary(), 5);
}

TEST(BrokenTokenizer, NotJson) {
  for (const std::string s : {"", " ", "{", "[1,2", "nul", "{\"model\":", "\xff\xfe", "{\"a\":\"\\ud800\"}"})
    EXPECT_HAS(message(s), "not JSON");
  std::string json = good().dump();
  EXPECT_HAS(message(json.substr(0, json.size() - 1)), "not JSON");
  json.insert(json.find("<unk>"), 1, '\xc3');
  EXPECT_HAS(message(json), "not JSON");
  EXPECT_HAS(message("[]"), "must be an object, is a list");
  EXPECT_HAS(message("{}"), "has no \"model\"");
}

TEST(BrokenTokenizer, Deep) {
  EXPECT_HAS(message(std::string(1 << 20, '[')), "not JSON");
  std::string deep(100000, '[');
  EXPECT_HAS(message("{\"model\":" + deep + std::string(100000, ']') + "}"), "not JSON");
  for (const char* part : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    const std::string list = part == std::string("normalizer")       ? "normalizers"
                             : part == std::string("pre_tokenizer")  ? "pretokenizers"
                             : part == std::string("post_processor") ? "processors"
                                                                     : "decoders";
    Json nested = {{"type", "Sequence"}, {list, Json::array()}};
    for (int i = 0; i < 100; ++i) nested = {{"type", "Sequence"}, {list, {nested}}};
    EXPECT_HAS(with((std::string("/") + part).c_str(), nested), "nested more than");
  }
}

TEST(BrokenTokenizer, Model) {
  EXPECT_HAS(with("/model", 3), "model must be an object, is a number");
  EXPECT_HAS(with("/model/type", "WordPiece"), "\"WordPiece\" is not supported");
  EXPECT_HAS(with("/model/dropout", 0.1), "dropout");
  EXPECT_EQ(with("/model/dropout", 0.0), "");
  EXPECT_HAS(with("/model/unk_token", "<none>"), "\"<none>\" is not in model.vocab");
  EXPECT_HAS(with("/model/unk_token", 3), "must be a string");
  EXPECT_HAS(with("/model/fuse_unk", "yes"), "model.fuse_unk must be true or false, is a string");
  EXPECT_HAS(without("/model", "vocab"), "has no \"vocab\"");
  EXPECT_HAS(without("/model", "merges"), "has no \"merges\"");
  EXPECT_HAS(with("/version", "2.0"), "version must be \"1.0\"");
}

TEST(BrokenTokenizer, Vocabulary) {
  EXPECT_HAS(with("/model/vocab", Json::array({"a"})), "must be an object");
  for (const Json& id :
       {Json(-1), Json(1.5), Json("1"), Json(int64_t(1) << 40), Json(uint64_t(-1)), Json(1 << 22), Json(nullptr)})
    EXPECT_HAS(with("/model/vocab/a", id), "model.vocab[\"a\"] must be a whole number");
  EXPECT_HAS(with("/model/vocab/a", 1), "is taken");
  std::string twice = good().dump();
  twice.replace(twice.find("\"b\":1"), 0, std::string("\"a\":7,"));
  EXPECT_HAS(message(twice), "\"a\"]: the token is there twice");
  // Ids with gaps, even wide ones, are fine.
  Json j = good();
  j["model"]["vocab"]["q"] = (1 << 22) - 1;
  j["added_tokens"][0]["id"] = 5;
  EXPECT_EQ(message(j.dump()), "");
}

TEST(BrokenTokenizer, Merges) {
  EXPECT_HAS(with("/model/merges", "a b"), "model.merges must be a list");
  for (const char* line : {"ab", "a  b", "a b c", ""}) EXPECT_HAS(with("/model/merges/0", line), "must be two tokens");
  EXPECT_HAS(with("/model/merges/0", "b a"), "\"ba\" is not in model.vocab");
  EXPECT_HAS(with("/model/merges/0", "x a"), "\"x\" is not in model.vocab");
  EXPECT_HAS(with("/model/merges/0", Json::array({"a", "x"})), "\"x\" is not in model.vocab");
  EXPECT_HAS(with("/model/merges/0", Json::array({"a"})), "must hold 2 tokens, holds 1");
  EXPECT_HAS(with("/model/merges/0", Json::array({"a", 1})), "must be a string");
  EXPECT_HAS(with("/model/merges/0", 7), "must be a list");
  Json j = good();
  j["model"]["continuing_subword_prefix"] = "##";
  EXPECT_HAS(message(j.dump()), "shorter than continuing_subword_prefix");
}

TEST(BrokenTokenizer, AddedTokens) {
  EXPECT_HAS(with("/added_tokens", 1), "added_tokens must be a list");
  EXPECT_HAS(with("/added_tokens/0", "x"), "must be an object");
  EXPECT_HAS(with("/added_tokens/0/id", 9), "says id 9 but is the next one, 4");
  EXPECT_HAS(with("/added_tokens/0/id", -4), "must be in [0");
  EXPECT_HAS(with("/added_tokens/0/id", "4"), "must be a whole number");
  EXPECT_HAS(with("/added_tokens/0/content", "ab"), "says id 4 but model.vocab gives it 2");
  EXPECT_HAS(with("/added_tokens/0/content", std::string(1 << 17, 'x')), "an added token of 131072 bytes");
  EXPECT_HAS(with("/added_tokens/0/lstrip", 1), "must be true or false");
  EXPECT_HAS(without("/added_tokens/0", "content"), "has no \"content\"");
  Json j = good();
  j["added_tokens"].push_back(j["added_tokens"][0]);
  EXPECT_EQ(message(j.dump()), "");  // the same again changes nothing
  j["added_tokens"][1]["rstrip"] = true;
  EXPECT_HAS(message(j.dump()), "is there twice, with different settings");
  j = good();
  j["added_tokens"][0]["normalized"] = true;
  j["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "."}}}, {"content", ""}};
  EXPECT_HAS(message(j.dump()), "is empty once normalized");
  // The next id is the count of the model's tokens; a model with gaps may have it in use.
  j = good();
  j["model"]["vocab"]["q"] = 5;
  j["added_tokens"][0]["id"] = 5;
  EXPECT_HAS(message(j.dump()), "which is \"q\" in model.vocab");
}

TEST(BrokenTokenizer, UnknownTypesAreRefused) {
  for (const char* part : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    const std::string at = std::string("/") + part;
    EXPECT_HAS(with(at.c_str(), {{"type", "Nonsense"}}), std::string(part) + " of type \"Nonsense\" is not supported");
    EXPECT_HAS(with(at.c_str(), Json::object()), "has no \"type\"");
    EXPECT_HAS(with(at.c_str(), {{"type", 1}}), "must be a string");
    EXPECT_HAS(with(at.c_str(), Json::array()), "must be an object");
    EXPECT_EQ(with(at.c_str(), nullptr), "");
  }
  EXPECT_HAS(with("/decoder", {{"type", "WordPiece"}}), "\"WordPiece\" is not supported");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "BertPreTokenizer"}}), "is not supported");
}

TEST(BrokenTokenizer, Settings) {
  const auto split = [](const Json& pattern, const char* behaviour) -> Json {
    return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behaviour}, {"invert", false}};
  };
  EXPECT_HAS(with("/pre_tokenizer", split({{"Regex", "a"}}, "Sideways")), "behavior must be");
  EXPECT_HAS(with("/pre_tokenizer", split({{"Regex", "("}}, "Isolated")), "a group is not closed");
  EXPECT_HAS(with("/pre_tokenizer", split({{"Regex", "(?<=a*)b"}}, "Isolated")), "regular expression");
  EXPECT_HAS(with("/pre_tokenizer", split({{"String", ""}}, "Isolated")), "is empty");
  EXPECT_HAS(with("/pre_tokenizer", split(Json::object(), "Isolated")), "has no \"Regex\"");
  EXPECT_HAS(with("/pre_tokenizer", split({{"Regex", std::string(1 << 17, 'a')}}, "Isolated")),
             "a regular expression of 131072 bytes");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "ab"}}), "must be one character");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "last"}}),
             "must be always, first or never");
  EXPECT_HAS(
      with("/pre_tokenizer",
           {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}, {"add_prefix_space", false}}),
      "add_prefix_space is false");
  EXPECT_HAS(with("/decoder", {{"type", "Strip"}, {"content", " "}, {"start", -1}, {"stop", 0}}),
             "decoder.start must be in");
  const auto single = [](const Json& items) -> Json {
    return {{"type", "TemplateProcessing"},
            {"single", items},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {99}}}}}}};
  };
  EXPECT_HAS(with("/post_processor", single({{{"SpecialToken", {{"id", "<x>"}}}}})), "which special_tokens has not");
  EXPECT_HAS(with("/post_processor", single({{{"SpecialToken", {{"id", "<s>"}}}}})),
             "the id of \"<s>\" must be in [0, 4], is 99");
  EXPECT_HAS(with("/post_processor", single({{{"Sequence", {{"id", "B"}}}}})), "only \"A\"");
  Json gap = good();
  gap["model"]["vocab"]["q"] = 100;
  gap["added_tokens"][0]["id"] = 5;
  gap["post_processor"] = single({{{"SpecialToken", {{"id", "<s>"}}}}});
  EXPECT_HAS(message(gap.dump()), "the id of \"<s>\" is 99, which has no token");
}

TEST(BrokenTokenizer, PaddingAndTruncationAreNoted) {
  Json j = good();
  EXPECT_TRUE(Tokenizer::from_json(j.dump()).notes().empty());
  j["padding"] = {{"strategy", "BatchLongest"}};
  j["truncation"] = {{"max_length", 1}};
  const auto t = Tokenizer::from_json(j.dump());
  ASSERT_EQ(t.notes().size(), 2u);
  EXPECT_HAS(t.notes()[0], "truncation");
  EXPECT_EQ(t.encode("ab").size(), 1u);
  EXPECT_EQ(t.encode("abab").size(), 2u);
}

// An expression whose matching explodes ends in an error, not in a hang.
TEST(BrokenTokenizer, ExplodingExpression) {
  Json j = good();
  j["pre_tokenizer"] = {{"type", "Split"},
                        {"pattern", {{"Regex", "(a|aa|b)*(a|b|ba)*[cd]"}}},
                        {"behavior", "Isolated"},
                        {"invert", false}};
  const auto t = Tokenizer::from_json(j.dump());
  try {
    t.encode(std::string(60, 'a'));
    FAIL() << "matched";
  } catch (const Error& e) {
    EXPECT_HAS(e.what(), "matching a regular expression");
  }
}

// Steps that double a text again and again end in an error before memory does.
TEST(BrokenTokenizer, GrowingSteps) {
  const auto repeated = [](const char* list, const Json& step, int n) -> Json {
    return {{"type", "Sequence"}, {list, Json(static_cast<size_t>(n), step)}};
  };
  const Json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  const auto fails = [](const Json& j) {
    try {
      const auto t = Tokenizer::from_json(j.dump());
      t.decode(t.encode("a\xc3\xa9"));
      ADD_FAILURE() << "no error";
    } catch (const Error& e) {
      EXPECT_HAS(e.what(), "bytes or more of a text of");
    }
  };
  Json j = good();
  j["normalizer"] = repeated("normalizers", twice, 32);
  fails(j);
  EXPECT_HAS(with("/normalizer", repeated("normalizers", twice, 33)), "more than 32 normalizers");
  j = good();
  j["pre_tokenizer"] =
      repeated("pretokenizers", {{"type", "ByteLevel"}, {"use_regex", false}, {"add_prefix_space", false}}, 30);
  fails(j);
  j = good();
  j["decoder"] = repeated("decoders", twice, 32);
  fails(j);
  EXPECT_HAS(with("/decoder", repeated("decoders", twice, 33)), "more than 32 decoders");
  EXPECT_HAS(with("/model/end_of_word_suffix", std::string(65, 'x')), "more than 64 bytes");
}

TEST(BrokenTokenizer, Files) {
  const auto dir = std::filesystem::temp_directory_path() / "kda-broken-tokenizer";
  std::filesystem::remove_all(dir);
  const auto load = [&](const std::filesystem::path& p) -> std::string {
    try {
      Tokenizer::load(p);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_HAS(load(dir), dir.string());
  std::filesystem::create_directories(dir);
  EXPECT_HAS(load(dir), (dir / "tokenizer.json").string());
  std::ofstream(dir / "tokenizer.json") << "{}";
  EXPECT_HAS(load(dir), "tokenizer.json: tokenizer: the file has no \"model\"");
  std::ofstream(dir / "tokenizer.json") << good();
  EXPECT_EQ(load(dir), "");
  EXPECT_EQ(load(dir / "tokenizer.json"), "");
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace kda
