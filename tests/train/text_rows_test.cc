#include "train/text_rows.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/temp_folder.h"

namespace kda {
namespace {
namespace fs = std::filesystem;
using test::TempFolder;
using test::write_bytes;

const fs::path kModel = fs::path(KDA_SOURCE_DIR) / "assets/nano-teacher";  // BOS 0, EOS 1, 4096 tokens

TextEncoder encoder() { return TextEncoder::load(kModel, 1, 4096); }

struct Opened {
  std::vector<std::vector<int32_t>> rows;
  int tokenized = 0;  // times that text was tokenized
};

Opened open(const fs::path& path, const fs::path& cache, int threads = 2, const std::string& key = "text") {
  ThreadPool pool(threads);
  Opened o;
  TextOptions options{key, cache, [&](const char* what, int64_t done, int64_t total) {
                        o.tokenized += std::string(what) == "tokenizing";
                        EXPECT_LE(done, total);
                      }};
  const TextEncoder e = encoder();
  const auto rows = open_text(
      path, [&]() -> const TextEncoder& { return e; }, options, pool);
  for (int64_t r = 0; r < rows->count(); ++r) {
    o.rows.emplace_back(size_t(rows->length(r)));
    rows->read(r, 0, o.rows.back());
  }
  return o;
}

std::string error_of(const fs::path& path, const fs::path& cache, const std::string& key = "text") {
  try {
    open(path, cache, 2, key);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

std::vector<int32_t> ids(const std::string& text) {
  auto v = Tokenizer::load(kModel).encode(text);
  v.push_back(1);
  return v;
}

TEST(TextRows, ReadsEveryKind) {
  TempFolder dir;
  fs::create_directories(dir / "data/sub");
  write_bytes(dir / "data/a.jsonl",
              "{\"text\": \"one two\"}\n\n{\"text\": \"\", \"n\": 3}\r\n{\"input_ids\": [5, 6, 4095]}");
  write_bytes(dir / "data/b.txt", "a text\nof two lines\n");
  write_bytes(dir / "data/sub/c.json", "{\"text\": \"deep\"}\n");
  write_bytes(dir / "data/.hidden", "x");
  const Opened o = open(dir / "data", dir / "cache");
  EXPECT_EQ(o.rows, (std::vector<std::vector<int32_t>>{
                        ids("one two"), ids(""), {5, 6, 4095}, ids("a text\nof two lines\n"), ids("deep")}));
  EXPECT_EQ(open(dir / "data/a.jsonl", dir / "cache").rows.size(), 3u);
}

TEST(TextRows, CacheIsKeyedByContent) {
  TempFolder dir;
  write_bytes(dir / "a.jsonl", "{\"text\": \"one\", \"other\": \"1\"}\n");
  EXPECT_EQ(open(dir / "a.jsonl", dir / "cache").tokenized, 1);
  EXPECT_EQ(open(dir / "a.jsonl", dir / "cache").tokenized, 0);
  fs::rename(dir / "a.jsonl", dir / "b.jsonl");  // names do not count
  EXPECT_EQ(open(dir / "b.jsonl", dir / "cache").tokenized, 0);
  EXPECT_EQ(open(dir / "b.jsonl", dir / "cache", 2, "other").tokenized, 1);
  write_bytes(dir / "b.jsonl", "{\"text\": \"two\", \"other\": \"1\"}\n");
  const Opened o = open(dir / "b.jsonl", dir / "cache");
  EXPECT_EQ(o.tokenized, 1);
  EXPECT_EQ(o.rows[0], ids("two"));
  EXPECT_EQ(test::TempFolder().names().size(), 0u);
  for (const auto& e : fs::directory_iterator(dir / "cache"))
    EXPECT_EQ(e.path().filename().string().find("tmp"), std::string::npos);
}

TEST(TextRows, ManyTasksAndThreadsGiveOneOrder) {
  TempFolder dir;
  std::string text;
  for (int i = 0; i < 20000; ++i) text += "{\"text\": \"line number " + std::to_string(i) + " of many\"}\n";
  write_bytes(dir / "a.jsonl", text);
  const Opened one = open(dir / "a.jsonl", dir / "1", 1), three = open(dir / "a.jsonl", dir / "3", 3);
  ASSERT_EQ(one.rows.size(), 20000u);
  EXPECT_EQ(one.rows, three.rows);
  EXPECT_EQ(one.rows[12345], ids("line number 12345 of many"));
}

TEST(TextRows, Shards) {
  TempFolder dir;
  fs::create_directories(dir / "s");
  write_shard(dir / "s/0.safetensors", std::vector<int32_t>{4, 5}, std::vector<int64_t>{0, 2});
  EXPECT_EQ(open(dir / "s", dir / "cache").rows, (std::vector<std::vector<int32_t>>{{4, 5}}));
  EXPECT_FALSE(fs::exists(dir / "cache"));
  write_bytes(dir / "s/a.txt", "x");
  EXPECT_NE(error_of(dir / "s", dir / "cache").find("token shards beside text"), std::string::npos);
}

TEST(TextRows, ErrorsNameFileAndLine) {
  TempFolder dir;
  const fs::path f = dir / "a.jsonl", cache = dir / "cache";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"text\": \"x\"}\n\n{\"txt\": 1}\n", "a.jsonl:3: no key 'text' (dataset text_key) and no 'input_ids'"},
      {"{\"text\": 1}\n", "a.jsonl:1: 'text' is not a string"},
      {"{\"text\": \"x\"\n", "a.jsonl:1: not valid JSON"},
      {"[1]\n", "a.jsonl:1: needed a JSON object"},
      {"{\"input_ids\": [1, 4096]}\n", "a.jsonl:1: input_ids holds 4096, needed a whole number from 0 to 4095"},
      {"{\"input_ids\": [1.5]}\n", "a.jsonl:1: input_ids holds 1.5"},
  };
  for (const auto& [text, want] : cases) {
    write_bytes(f, text);
    EXPECT_NE(error_of(f, cache).find(want), std::string::npos) << error_of(f, cache);
  }
  for (const auto& e : fs::directory_iterator(cache)) ADD_FAILURE() << "left behind: " << e.path();
  EXPECT_NE(error_of(dir / "none", cache).find("no such file or folder"), std::string::npos);
  write_bytes(dir / "a.xz", "");
  EXPECT_NE(error_of(dir / "a.xz", cache).find("unpack it first"), std::string::npos);
  write_bytes(dir / "a.csv", "");
  EXPECT_NE(error_of(dir / "a.csv", cache).find("no data set"), std::string::npos);
  for (const char* name : {"data-00000-of-00001.arrow", "train.parquet"}) {
    write_bytes(dir / name, "");
    EXPECT_NE(error_of(dir / name, cache).find("tools/export_dataset.py"), std::string::npos);
  }
  fs::create_directories(dir / "hub");
  EXPECT_NE(error_of(dir / "hub", cache).find("without any file"), std::string::npos);
  write_bytes(dir / "hub/dataset_info.json", "{}");
  EXPECT_NE(error_of(dir / "hub", cache).find("python3 tools/export_dataset.py '" + (dir / "hub").string() + "'"),
            std::string::npos);
  EXPECT_THROW(TextEncoder::load(dir.path(), 1, 10), Error);
}

}  // namespace
}  // namespace kda
