#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <span>

#include "tests/checkpoint/errors.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

std::string file_of(const std::string& header, const std::string& data = "") {
  std::string out;
  for (uint64_t n = header.size(), i = 0; i < 8; ++i) out += char(n >> (8 * i) & 0xff);
  return out + header + data;
}

SafetensorsHeader parse(const std::string& bytes) {
  return parse_safetensors(std::as_bytes(std::span(bytes.data(), bytes.size())), "x");
}

TEST(Safetensors, WrittenFilesReadBack) {
  TempFolder folder;
  std::vector<float> f(12);
  std::iota(f.begin(), f.end(), 1.0f);
  std::vector<bf16> b(6, bf16(1.5f));
  std::vector<double> d{1e300, -2};
  std::vector<int64_t> i{-1, 1};
  const uint8_t bytes[3] = {1, 2, 255};
  const std::map<std::string, ConstView> tensors = {
      {"a", view(f.data(), {3, 4})}, {"b.ümläut", view(b.data(), {2, 1, 3})},
      {"c", view(bytes, {3})},       {"d", view(d.data(), {2})},
      {"e", view(i.data(), {2})},    {"none", view(f.data(), {0, 4})},
      {"scalar", view(f.data(), {})}};
  save_safetensors(folder / "x.safetensors", tensors, {{"format", "pt"}, {"note", "a \"quoted\"\nline"}});
  EXPECT_EQ(folder.names(), std::set<std::string>{"x.safetensors"});

  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_EQ(file.metadata().at("note"), "a \"quoted\"\nline");
  EXPECT_EQ(file.tensors().size(), tensors.size());
  const GoldenFile other(folder / "x.safetensors");  // another reader agrees
  for (const auto& [name, v] : tensors) {
    const Tensor t = file.tensor(name);
    EXPECT_EQ(t.shape(), v.shape) << name;
    EXPECT_EQ(t.dtype(), v.dtype) << name;
    EXPECT_EQ(std::memcmp(t.v.data, v.data, v.bytes()), 0) << name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(t.v.data) % size_of(v.dtype), 0u) << name;
    EXPECT_EQ(other[name].bytes, std::string(static_cast<const char*>(v.data), v.bytes())) << name;
  }
  EXPECT_EQ(file.tensor("a", {12}).shape(), Shape{12});
  EXPECT_TRUE(fails_with("'a' is [3,4], needed [13]", [&] { file.tensor("a", {13}); }));
  EXPECT_TRUE(fails_with("no tensor 'z'", [&] { file.tensor("z"); }));
}

TEST(Safetensors, ATensorOutlivesItsFile) {
  TempFolder folder;
  const std::vector<float> f(1000, 3.0f);
  save_safetensors(folder / "x", {{"a", view(f.data(), {1000})}});
  Tensor t;
  {
    const SafetensorsFile file(folder / "x");
    t = file.tensor("a");
  }
  std::filesystem::remove(folder / "x");
  EXPECT_EQ(t.v.as<float>()[999], 3.0f);
}

TEST(Safetensors, HeadersOfOddLengthAreCopiedIntoAlignment) {
  TempFolder folder;
  const float x[2] = {1.25f, -3};
  std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  while (header.size() % 4 != 1) header += ' ';
  write_bytes(folder / "x", file_of(header, std::string(reinterpret_cast<const char*>(x), 8)));
  const Tensor t = SafetensorsFile(folder / "x").tensor("a");
  EXPECT_EQ(t.v.as<float>()[0], 1.25f);
  EXPECT_EQ(t.v.as<float>()[1], -3.0f);
}

TEST(Safetensors, DtypesNobodyUsesDoNotHurt) {
  TempFolder folder;
  write_bytes(folder / "x", file_of(R"({"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]},)"
                                    R"("b":{"dtype":"SOMETHING","shape":[7],"data_offsets":[2,3]},)"
                                    R"("c":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[3,4]}})",
                                    "abcd"));
  const SafetensorsFile file(folder / "x");
  EXPECT_TRUE(fails_with("'a' has dtype F8_E4M3", [&] { file.tensor("a"); }));
  EXPECT_TRUE(fails_with("'b' has dtype SOMETHING", [&] { file.tensor("b"); }));
  EXPECT_TRUE(fails_with("'c' has 5 dimensions", [&] { file.tensor("c"); }));
  EXPECT_EQ(*file.tensor("c", {1}).v.as<uint8_t>(), 'd');
}

struct Broken {
  const char* what;
  std::string bytes;
  const char* message;
};

TEST(Safetensors, BrokenFilesAreRefused) {
  const auto one = [](const std::string& entry, const std::string& data = std::string(8, 'x')) {
    return file_of("{\"a\":" + entry + "}", data);
  };
  const auto entry = [&](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return one("{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}");
  };
  std::string huge(8, '\xff');
  std::string large = file_of("{}");
  large[4] = 1;  // 4 GiB of header
  const Broken cases[] = {
      {"empty", "", "0 bytes"},
      {"seven bytes", "1234567", "7 bytes"},
      {"length beyond 64-bit files", huge + "{}", "at most 100000000"},
      {"length beyond the limit", large, "at most 100000000"},
      {"length beyond the file", file_of("{}").substr(0, 9), "truncated"},
      {"no header", file_of(""), "begin with '{'"},
      {"a list", file_of("[]"), "begin with '{'"},
      {"leading space", file_of(" {}"), "begin with '{'"},
      {"not JSON", file_of("{\"a\""), "not valid JSON"},
      {"text behind", file_of("{}x"), "not valid JSON"},
      {"invalid UTF-8", file_of("{\"\xff\xfe\":1}"), "not valid JSON"},
      {"half a surrogate", file_of("{\"\\ud800\":1}"), "not valid JSON"},
      {"deep", file_of("{\"a\":" + std::string(1000000, '[')), "deeper than 8"},
      {"deep objects", file_of([] {
         std::string s;
         for (int i = 0; i < 100000; ++i) s += "{\"a\":";
         return s;
       }()),
       "deeper than 8"},
      {"number out of range", file_of(R"({"a":1e999})"), "not valid JSON"},
      {"tensor is a number", one("3"), "needed an object"},
      {"no dtype", one(R"({"shape":[1],"data_offsets":[0,8]})"), "dtype is missing"},
      {"dtype is a number", entry("3", "[1]", "[0,8]"), "dtype is missing"},
      {"no shape", one(R"({"dtype":"F64","data_offsets":[0,8]})"), "shape is missing"},
      {"shape is a string", entry("\"F64\"", "\"1\"", "[0,8]"), "shape is missing"},
      {"negative size", entry("\"F64\"", "[-1]", "[0,8]"), "whole numbers"},
      {"fraction", entry("\"F64\"", "[1.0]", "[0,8]"), "whole numbers"},
      {"size of 2^64-1", entry("\"F64\"", "[18446744073709551615]", "[0,8]"), "whole numbers"},
      {"overflowing product", entry("\"F64\"", "[4294967296,4294967296]", "[0,8]"), "more elements than 64 bits"},
      {"overflowing bytes", entry("\"F64\"", "[2305843009213693953]", "[0,8]"), "does not take the 8 bytes"},
      {"no offsets", one(R"({"dtype":"F64","shape":[1]})"), "data_offsets is missing"},
      {"three offsets", entry("\"F64\"", "[1]", "[0,4,8]"), "data_offsets is missing"},
      {"backwards", entry("\"F64\"", "[1]", "[8,0]"), "reach outside"},
      {"outside", entry("\"F64\"", "[2]", "[0,16]"), "reach outside"},
      {"too short for its shape", entry("\"F64\"", "[2]", "[0,8]"), "does not take the 8 bytes"},
      {"too long for its shape", entry("\"F32\"", "[1]", "[0,8]"), "does not take the 8 bytes"},
      {"unknown field", one(R"({"dtype":"F64","shape":[1],"data_offsets":[0,8],"x":1})"), "unknown field 'x'"},
      {"hole in front", one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), "4 bytes before tensor 'a'"},
      {"hole behind", one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"), "4 bytes behind"},
      {"data without tensors", file_of("{}", "x"), "1 bytes behind"},
      {"overlap",
       file_of(
           R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
           "12345678"),
       "'b' overlaps"},
      {"same range twice",
       file_of(
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
           "1234"),
       "'b' overlaps"},
      {"a name twice",
       file_of(
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
           "12345678"),
       "given twice"},
      {"metadata is a list", file_of(R"({"__metadata__":[]})"), "__metadata__ is not an object"},
      {"metadata holds a number", file_of(R"({"__metadata__":{"a":1}})"), "'a' is not a string"},
  };
  for (const auto& c : cases) EXPECT_TRUE(fails_with(c.message, [&] { parse(c.bytes); })) << c.what;
  EXPECT_NO_THROW(parse(one(R"({"dtype":"F64","shape":[1],"data_offsets":[0,8]})")));
  EXPECT_NO_THROW(parse(file_of("{}")));
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string whole = file_of(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}})",
      "1234567");
  EXPECT_NO_THROW(parse(whole));
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_THROW(parse(whole.substr(0, n)), Error) << n;
  EXPECT_THROW(parse(whole + "x"), Error);
}

TEST(Safetensors, RandomDamageIsAnErrorOrAHarmlessFile) {
  const std::string whole = file_of(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}})",
      "1234567");
  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string s = whole;
    for (unsigned k = random() % 3 + 1; k; --k) s[random() % s.size()] = char(random());
    try {
      for (const auto& [name, e] : parse(s).tensors) {
        EXPECT_LE(e.begin, e.end);
        EXPECT_LE(e.end, s.size());
      }
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 4000);
}

TEST(Safetensors, WritersRefuseWhatTheyCannotWrite) {
  TempFolder folder;
  const float x = 1;
  EXPECT_TRUE(fails_with("UTF-8", [&] { save_safetensors(folder / "x", {{"\xff", view(&x, {1})}}); }));
  EXPECT_TRUE(fails_with("reserved", [&] { save_safetensors(folder / "x", {{"__metadata__", view(&x, {1})}}); }));
  {
    SafetensorsWriter w(folder / "x", {{"a", Dtype::f32, {2}}});
    EXPECT_TRUE(fails_with("the header leaves 8", [&] { w.write("123456789", 9); }));
    w.write(&x, 4);
    EXPECT_TRUE(fails_with("4 bytes of tensors were not written", [&] { w.commit(); }));
  }
  EXPECT_TRUE(folder.names().empty());
}

FillItem fill_with_ones() {
  return
      [](const SafetensorsItem&, size_t, std::span<std::byte> out) { std::fill(out.begin(), out.end(), std::byte{1}); };
}

TEST(Shards, SplitAtTheLimitWithAnIndex) {
  TempFolder folder;
  const std::vector<SafetensorsItem> items = {
      {"a", Dtype::f32, {100}}, {"b", Dtype::f32, {100}}, {"c", Dtype::bf16, {1000}}, {"d", Dtype::u8, {1}}};
  size_t told = 0;
  save_model_tensors(folder.path(), items, fill_with_ones(), 900, {{"format", "pt"}}, [&](size_t n) { told += n; });
  EXPECT_EQ(told, 400u + 400 + 2000 + 1);
  EXPECT_EQ(folder.names(),
            (std::set<std::string>{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                   "model-00003-of-00003.safetensors", "model.safetensors.index.json"}));
  const auto index = nlohmann::json::parse(read_bytes(folder / "model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], 2801);
  for (const auto& [name, shard] : index["weight_map"].items())
    EXPECT_TRUE(SafetensorsFile(folder / shard.get<std::string>()).has(name)) << name;
  EXPECT_EQ(index["weight_map"].size(), items.size());
  EXPECT_TRUE(
      fails_with("two models in one folder", [&] { save_model_tensors(folder.path(), items, fill_with_ones()); }));
}

// The largest file this process may write, for a while.
struct FileSizeLimit {
  explicit FileSizeLimit(rlim_t bytes) {
    handler = signal(SIGXFSZ, SIG_IGN);  // a write beyond it then fails as on a full disk
    getrlimit(RLIMIT_FSIZE, &old);
    rlimit now = old;
    now.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
  }
  rlimit old{};
  void (*handler)(int);
};

TEST(FullDisk, LeavesTheOldFileAndNothingElse) {
  TempFolder folder;
  const std::vector<float> small(10, 1.0f), big(100'000, 2.0f);
  save_safetensors(folder / "x", {{"a", view(small.data(), {10})}});
  const std::string before = read_bytes(folder / "x");
  {
    const FileSizeLimit limit(100'000);
    EXPECT_TRUE(fails_with("cannot write", [&] {
      save_safetensors(folder / "x", {{"a", view(big.data(), {100'000})}});
    }));
  }
  EXPECT_EQ(read_bytes(folder / "x"), before);
  EXPECT_EQ(folder.names(), std::set<std::string>{"x"});
}

TEST(FullDisk, LeavesNoShardBehind) {  // the first shard fits, the second does not
  TempFolder folder;
  const std::vector<SafetensorsItem> items = {{"a", Dtype::f32, {1000}}, {"b", Dtype::f32, {100'000}}};
  const FileSizeLimit limit(100'000);
  EXPECT_TRUE(fails_with("cannot write", [&] { save_model_tensors(folder.path(), items, fill_with_ones(), 5000); }));
  EXPECT_TRUE(folder.names().empty());
}

}  // namespace
}  // namespace kda::test
