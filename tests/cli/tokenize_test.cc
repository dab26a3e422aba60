// kda tokenize and kda detokenize as a user types them.
#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "tests/cli/run.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

class Tokenize : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::path(testing::TempDir()) / cat("kda_tokenize_", ::getpid());
    fs::remove_all(folder);
    fs::create_directories(folder);
    fs::copy_file(data / "added.json", folder / "tokenizer.json");  // nothing else is in the folder
  }
  void TearDown() override { fs::remove_all(folder); }
  std::string file(const std::string& name, const std::string& bytes) const {
    std::ofstream(folder / name, std::ios::binary) << bytes;
    return (folder / name).string();
  }
  std::vector<json> lines() const {
    std::ifstream in(data / "added.jsonl");
    std::vector<json> out;
    for (std::string line; std::getline(in, line);) out.push_back(json::parse(line));
    return out;
  }

  const fs::path data = fs::path(KDA_SOURCE_DIR) / "tests/data/tokenizers";
  fs::path folder;
};

TEST_F(Tokenize, FilesByteForByte) {
  const auto all = lines();
  for (size_t i = 0; i < all.size(); i += 5) {  // a program run for each: every fifth is enough
    const auto& line = all[i];
    const std::string text = file("text", line["text"].get<std::string>());
    const auto r = run_kda(cat("tokenize -m ", folder.string(), " -f ", text, " --json"));
    ASSERT_EQ(r.status, 0) << r.err;
    EXPECT_EQ(json::parse(r.out), (json{{"tokens", line["ids"]}})) << line;
    const auto plain =
        run_kda(cat("tokenize -m ", folder.string(), "/tokenizer.json -f ", text, " --json --no-special"));
    EXPECT_EQ(json::parse(plain.out)["tokens"], line["plain"]) << line;
    const std::string ids = file("ids", r.out);
    EXPECT_EQ(run_kda(cat("detokenize -m ", folder.string(), " -f ", ids)).out, line["decoded"].get<std::string>());
    const auto skipped = run_kda(cat("detokenize -m ", folder.string(), " --skip-special --json -f ", ids));
    EXPECT_EQ(json::parse(skipped.out)["text"], line["skipped"]) << line;
    if (HasFailure()) break;
  }
}

TEST_F(Tokenize, LinesAndPlainIds) {
  std::string texts, ids;
  const auto all = lines();
  for (const auto& line : all) {
    texts += json{{"text", line["text"]}}.dump() + "\n";
    ids += line["ids"].dump() + "\n";
  }
  const auto r = run_kda(cat("tokenize -m ", folder.string(), " --jsonl ", file("texts", texts)));
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.err.find("MB/s"), std::string::npos);
  const auto d = run_kda(cat("detokenize -m ", folder.string(), " --jsonl ", file("all", ids)));
  ASSERT_EQ(d.status, 0) << d.err;
  std::istringstream tokens(r.out), decoded(d.out);
  for (const auto& want : all) {
    std::string line;
    ASSERT_TRUE(std::getline(tokens, line));
    EXPECT_EQ(json::parse(line)["tokens"], want["ids"]);
    ASSERT_TRUE(std::getline(decoded, line));
    EXPECT_EQ(json::parse(line)["text"], want["decoded"]);
  }
  const auto plain = run_kda(cat("tokenize -m ", folder.string(), " -p 'the theory'"));
  ASSERT_EQ(plain.status, 0) << plain.err;
  EXPECT_EQ(plain.out.find_first_not_of("0123456789 \n"), std::string::npos) << plain.out;
  EXPECT_EQ(run_kda(cat("detokenize -m ", folder.string(), " --skip-special -f ", file("p", plain.out))).out,
            "the theory");
  EXPECT_EQ(run_kda(cat("detokenize -m ", folder.string(), " --ids 0,1")).out, "<s><pad>");
}

TEST_F(Tokenize, Failures) {
  const auto fails = [&](const std::string& arguments, const std::string& part) {
    const auto r = run_kda(arguments);
    EXPECT_EQ(r.status, 1) << arguments;
    EXPECT_EQ(r.out, "") << arguments;
    EXPECT_NE(r.err.find(part), std::string::npos) << arguments << ": " << r.err;
  };
  const std::string m = folder.string();
  fails(cat("tokenize -m ", m, " -f ", file("bad", "ab\xff")), "byte 2 of 3");
  fails(cat("tokenize -m ", m, " -f ", m, "/absent"), "absent");
  fails(cat("tokenize -m ", m, " --jsonl ", file("j", "{\"text\":\"a\"}\n{\"x\":1}\n")), "line 2");
  fails(cat("detokenize -m ", m, " --ids 1,100000"), "no token with id 100000");
  fails(cat("detokenize -m ", m, " --ids 1,x"), "byte 2");
  fails(cat("detokenize -m ", m, " --ids 99999999999999999999"), "out of range");
  fails(cat("detokenize -m ", m, " -f ", file("n", "[1,-1]")), "-1 at place 1");
  fails(cat("tokenize -m ", file("broken.json", "{\"model\":"), " -p x"), "broken.json: tokenizer: not JSON");
  fs::create_directories(folder / "empty");
  fails(cat("tokenize -m ", m, "/empty -p x"), "tokenizer.json");
}

}  // namespace
}  // namespace kda::test
