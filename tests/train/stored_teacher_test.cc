#include "train/stored_teacher.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

constexpr int64_t kV = 300, kK = 12;

LogprobCodecConfig codec() {
  return {.d = kV,
          .k = kK,
          .exact_k = 4,
          .polynomial_terms = {{.exponent = 0}, {.exponent = 1}},
          .residual_bins = {{CodecDtype::float16, 6, 8}}};
}
CaptureHeader header() {
  return {.codec = codec(),
          .model = "m",
          .teacher = "abc",
          .tokenizer = "def",
          .data = "ghi",
          .sequence_length = 9,
          .max_tokens = 0};
}

struct RowData {
  std::vector<int32_t> ids;
  std::vector<int32_t> likeliest;  // [n,k]
  std::vector<float> logprobs;
  std::vector<uint8_t> values, indices;
};
RowData row(int64_t number, int64_t n) {
  const LogprobCodec c(codec());
  RowData r;
  r.values.resize(size_t(n * c.value_bytes()));
  r.indices.resize(size_t(n * c.index_bytes()));
  for (int64_t t = 0; t < n; ++t) {
    r.ids.push_back(int32_t((number * 31 + t * 7) % kV));
    auto l = values(cat("l", number, t), kK, 0.2f);
    for (int64_t j = 0; j < kK; ++j) {
      l[size_t(j)] -= 0.5f + 0.6f * float(j);
      r.likeliest.push_back(int32_t((number + t * 3 + j * 11) % kV));
    }
    const std::span ids(r.likeliest.data() + t * kK, size_t(kK));
    c.encode(ids, l, std::span(r.values).subspan(size_t(t * c.value_bytes()), size_t(c.value_bytes())),
             std::span(r.indices).subspan(size_t(t * c.index_bytes()), size_t(c.index_bytes())));
    r.logprobs.insert(r.logprobs.end(), l.begin(), l.end());
  }
  return r;
}
void add(CaptureWriter& w, const RowData& r) { w.add(r.ids, r.values, r.indices); }

const int64_t kLengths[] = {9, 1, 5, 9};

void write(const std::filesystem::path& folder) {
  CaptureWriter w(folder, header(), false);
  for (int64_t i = 0; i < 4; ++i) add(w, row(i, kLengths[i]));
  w.finish();
}

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return {};
}

void read_everything(const std::filesystem::path& folder) {
  const auto s = open_stored_logprobs(folder);
  for (int64_t i = 0; i < s->count(); ++i) {
    const auto n = size_t(s->length(i));
    std::vector<int32_t> tokens(n), ids(n * size_t(s->k()));
    std::vector<float> l(ids.size());
    s->read_ids(i, 0, tokens);
    s->read(i, 0, tokens, ids, l);
  }
}

TEST(StoredTeacher, GivesBackWhatWasCaptured) {
  TempFolder temp;
  const auto folder = temp / "a/b";
  write(folder);
  EXPECT_TRUE(is_stored_logprobs(folder));
  EXPECT_FALSE(is_stored_logprobs(temp.path()));
  const auto s = open_stored_logprobs(folder);
  EXPECT_EQ(s->vocabulary(), kV);
  EXPECT_EQ(s->k(), kK);
  ASSERT_EQ(s->count(), 4);
  EXPECT_EQ(s->teacher(), "abc");
  EXPECT_EQ(s->tokenizer(), "def");
  for (int64_t i = 0; i < 4; ++i) {
    const RowData want = row(i, kLengths[i]);
    const int64_t n = s->length(i);
    ASSERT_EQ(n, kLengths[i]);
    for (int64_t from = 0; from < n; ++from) {
      const auto count = size_t(n - from);
      std::vector<int32_t> tokens(count), ids(count * kK);
      std::vector<float> l(ids.size());
      s->read(i, from, tokens, ids, l);
      EXPECT_EQ(tokens, std::vector<int32_t>(want.ids.begin() + from, want.ids.end()));
      EXPECT_EQ(ids, std::vector<int32_t>(want.likeliest.begin() + from * kK, want.likeliest.end()));
      EXPECT_TRUE(close(l, std::vector<float>(want.logprobs.begin() + from * kK, want.logprobs.end()), 0.05, 1.0));
    }
  }
  const auto rows = stored_rows(s);
  EXPECT_EQ(rows->count(), 4);
  EXPECT_EQ(rows->length(2), 5);
  std::vector<int32_t> two(2);
  rows->read(2, 3, two);
  EXPECT_EQ(two, (std::vector<int32_t>{row(2, 5).ids[3], row(2, 5).ids[4]}));
  EXPECT_THROW(rows->read(2, 4, two), Error);
  EXPECT_THROW(rows->read(4, 0, two), Error);
  EXPECT_EQ(rows->fingerprint(), stored_rows(open_stored_logprobs(folder))->fingerprint());
}

TEST(StoredTeacher, FollowsTheBatch) {
  TempFolder temp;
  write(temp / "c");
  CpuContext ctx(2);
  const auto teacher = stored_teacher(ctx, open_stored_logprobs(temp / "c"), 20);
  TrainBatch b{.ids = {}, .start = {0}, .labels = {}, .rows = {}, .offsets = {}};
  std::vector<int32_t> ids;
  std::vector<float> l;
  for (const auto& [number, from, n] : {std::array<int64_t, 3>{3, 2, 4}, {1, 0, 1}, {0, 9, 0}, {2, 1, 4}}) {
    const RowData r = row(number, kLengths[number]);
    b.ids.insert(b.ids.end(), r.ids.begin() + from, r.ids.begin() + from + n);
    b.start.push_back(int32_t(b.ids.size()));
    b.rows.push_back(number);
    b.offsets.push_back(from);
    ids.insert(ids.end(), r.likeliest.begin() + from * kK, r.likeliest.begin() + (from + n) * kK);
    l.insert(l.end(), r.logprobs.begin() + from * kK, r.logprobs.begin() + (from + n) * kK);
  }
  const TeacherOutput& out = teacher->run(ctx, b);
  ASSERT_EQ(out.ids.shape, (Shape{9, kK}));
  EXPECT_EQ(std::vector<int32_t>(out.ids.as<int32_t>(), out.ids.as<int32_t>() + 9 * kK), ids);
  EXPECT_TRUE(close(std::vector<float>(out.logprobs.as<float>(), out.logprobs.as<float>() + 9 * kK), l, 0.05, 1.0));
  EXPECT_EQ(out.weights, nullptr);
  EXPECT_GT(teacher->bytes(), 0);
  b.ids[6] += 1;
  EXPECT_NE(message([&] { teacher->run(ctx, b); }).find("row 2, token 2: the teacher saw id"), std::string::npos);
}

TEST(StoredTeacher, AnInterruptedCaptureGoesOn) {
  TempFolder temp;
  write(temp / "whole");
  const std::string whole = read_bytes(temp / "whole/rows.bin");
  for (size_t cut : {size_t(0), size_t(5), size_t(8), size_t(9), size_t(100), whole.size() - 1, whole.size()}) {
    const auto folder = temp / cat("cut", cut);
    {
      CaptureWriter w(folder, header(), false);
      for (int64_t i = 0; i < 4; ++i) add(w, row(i, kLengths[i]));
    }
    EXPECT_NE(message([&] { open_stored_logprobs(folder); }).find("--resume"), std::string::npos);
    EXPECT_NE(message([&] { CaptureWriter w(folder, header(), false); }).find("go on with --resume"),
              std::string::npos);
    CaptureHeader other = header();
    other.data = "another";
    EXPECT_NE(message([&] { CaptureWriter w(folder, other, true); }).find("other settings"), std::string::npos);
    std::filesystem::resize_file(folder / "rows.bin", cut);
    CaptureWriter w(folder, header(), true);
    if (cut == whole.size()) {
      EXPECT_EQ(w.rows(), 4);
    }
    while (w.rows() < 4) add(w, row(w.rows(), kLengths[w.rows()]));
    EXPECT_EQ(w.tokens(), 24);
    w.finish();
    for (const char* name : {"rows.bin", "index.bin", "capture.json"})
      EXPECT_EQ(read_bytes(folder / name), read_bytes(temp / "whole" / name)) << cut;
    EXPECT_FALSE(std::filesystem::exists(folder / "capture.partial.json"));
    EXPECT_NE(message([&] { CaptureWriter again(folder, header(), true); }).find("finished capture"),
              std::string::npos);
  }
}

TEST(StoredTeacher, DamageIsNamed) {
  TempFolder temp;
  const auto folder = temp / "d";
  write(folder);
  for (const std::string name : {"rows.bin", "index.bin"}) {
    const std::string whole = read_bytes(folder / name);
    for (size_t i = 0; i < whole.size(); i += i < 64 || i + 64 > whole.size() ? 1 : 13) {
      std::string bad = whole;
      bad[i] = char(bad[i] ^ 0x10);
      write_bytes(folder / name, bad);
      const std::string m = message([&] { read_everything(folder); });
      EXPECT_NE(m.find(": offset "), std::string::npos) << name << " byte " << i << ": " << m;
      EXPECT_NE(m.find(".bin"), std::string::npos) << m;
      write_bytes(folder / name, whole.substr(0, i));
      EXPECT_NE(message([&] { read_everything(folder); }).find(": offset "), std::string::npos)
          << name << " cut to " << i;
    }
    write_bytes(folder / name, whole + "x");
    EXPECT_NE(message([&] { read_everything(folder); }), "");
    write_bytes(folder / name, whole);
    read_everything(folder);
  }
  write_bytes(folder / "capture.json", "{}");
  EXPECT_NE(message([&] { read_everything(folder); }).find("capture.json"), std::string::npos);
}

// Two rows, of tokens 0-3 and 4-5 of golden/logit_compression's case 3; the second has no entry for its last token.
TEST(StoredTeacher, ReadsDistillKitsParquet) {
  KDA_NEED(path, "logit_compression.safetensors");
  const GoldenFile g(path);
  auto c = g.cases()[3];
  c.erase("index");
  const LogprobCodecConfig config = parse_codec_config(c.dump(), "case 3");
  const std::filesystem::path file = std::filesystem::path(KDA_SOURCE_DIR) / "tests/data/stored/distillkit.parquet";
  EXPECT_TRUE(is_stored_logprobs(file));
  EXPECT_TRUE(is_stored_logprobs(file.parent_path()));
  std::shared_ptr<const StoredLogprobs> s;
  const std::string refused = message([&] { s = open_stored_logprobs(file, config); });
  if (!s) {
    EXPECT_NE(refused.find("Parquet is read by builds that found Apache Arrow"), std::string::npos) << refused;
    GTEST_SKIP() << "built without Apache Arrow, which was said";
  }
  const auto ids = g["3.ids"].ids();
  const auto values = g["3.values"].floats();
  ASSERT_EQ(s->count(), 2);
  const auto k = s->k();
  for (int64_t r : {0, 1}) {
    const int64_t n = s->length(r), first = r ? 4 : 0, stored = r ? 2 : 4;
    ASSERT_EQ(n, r ? 3 : 4);
    std::vector<int32_t> tokens(static_cast<size_t>(n)), got(size_t(n * k));
    std::vector<float> l(got.size());
    s->read(r, 0, tokens, got, l);
    EXPECT_EQ(tokens[0], r ? 5 : 1);
    got.resize(size_t(stored * k));
    l.resize(got.size());
    EXPECT_EQ(got, std::vector<int32_t>(ids.begin() + first * k, ids.begin() + (first + stored) * k));
    EXPECT_TRUE(
        close(l, std::vector<float>(values.begin() + first * k, values.begin() + (first + stored) * k), 1e-5, 1.0));
  }
  EXPECT_NE(message([&] { open_stored_logprobs(file); }).find("logprob_compressor"), std::string::npos);
  LogprobCodecConfig other = config;
  other.exact_k -= 1;
  EXPECT_NE(message([&] { open_stored_logprobs(file, other); }).find("the codec has"), std::string::npos);
}

TEST(StoredTeacher, NotACapture) {
  TempFolder temp;
  EXPECT_NE(message([&] { open_stored_logprobs(temp.path()); }).find("no stored log-probabilities"), std::string::npos);
}

}  // namespace
}  // namespace kda::test
