#include "train/data.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/sha256.h"
#include "tests/temp_folder.h"

namespace kda {
namespace {

// Row r has the lengths given, tokens 1000 * r + i: each token says where it comes from.
class Numbered : public Rows {
 public:
  explicit Numbered(std::vector<int64_t> lengths) : lengths_(std::move(lengths)) {}
  int64_t count() const override { return int64_t(lengths_.size()); }
  int64_t length(int64_t r) const override { return lengths_[size_t(r)]; }
  void read(int64_t r, int64_t from, std::span<int32_t> out) const override {
    for (size_t i = 0; i < out.size(); ++i) out[i] = int32_t(1000 * r + from + int64_t(i));
  }
  std::string fingerprint() const override { return "numbered"; }

 private:
  std::vector<int64_t> lengths_;
};

std::shared_ptr<const Rows> numbered(std::vector<int64_t> lengths) {
  return std::make_shared<Numbered>(std::move(lengths));
}

constexpr int32_t kVocabulary = 1 << 20;
const std::vector<int64_t> kLengths = {7, 0, 1, 16, 40, 3, 64, 17, 2};  // 150 tokens

// What every batch must be: exact size, labels of the same sequence, ids where rows and offsets say.
void expect_sound(const TrainBatch& b, int64_t tokens, int64_t longest) {
  ASSERT_EQ(b.T(), tokens);
  ASSERT_EQ(b.labels.size(), b.ids.size());
  ASSERT_EQ(b.start.front(), 0);
  ASSERT_EQ(b.start.back(), tokens);
  ASSERT_EQ(b.rows.size() + 1, b.start.size());
  ASSERT_EQ(b.offsets.size(), b.rows.size());
  for (size_t s = 0; s < b.rows.size(); ++s) {
    ASSERT_LT(b.start[s], b.start[s + 1]);
    ASSERT_LE(b.start[s + 1] - b.start[s], longest);
    for (int32_t t = b.start[s]; t < b.start[s + 1]; ++t) {
      EXPECT_EQ(b.ids[size_t(t)], 1000 * b.rows[s] + b.offsets[s] + t - b.start[s]);
      EXPECT_EQ(b.labels[size_t(t)], t + 1 < b.start[s + 1] ? b.ids[size_t(t) + 1] : -1);
    }
  }
  EXPECT_EQ(b.counted(), tokens - int64_t(b.rows.size()));
}

TEST(Permutation, IsOne) {
  for (int64_t n : {1, 2, 3, 4, 5, 16, 17, 1000, 4097}) {
    const Permutation p(n, 7, 3);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < n; ++i) seen.insert(p(i));
    EXPECT_EQ(int64_t(seen.size()), n);
    EXPECT_EQ(*seen.begin(), 0);
    EXPECT_EQ(*seen.rbegin(), n - 1);
  }
  EXPECT_THROW(Permutation(0, 1, 1), Error);
  EXPECT_THROW(Permutation(5, 1, 1)(5), Error);
}

TEST(Permutation, DependsOnSeedAndStreamAndLooksRandom) {
  const int64_t n = 2000;
  int64_t fixed = 0, same_seed = 0, same_stream = 0, neighbours = 0;
  const Permutation a(n, 1, 0), b(n, 2, 0), c(n, 1, 1);
  for (int64_t i = 0; i < n; ++i) {
    fixed += a(i) == i;
    same_seed += a(i) == b(i);
    same_stream += a(i) == c(i);
    if (i) neighbours += std::abs(a(i) - a(i - 1)) == 1;
  }
  for (int64_t count : {fixed, same_seed, same_stream, neighbours}) EXPECT_LT(count, 12);  // about 1 and 2 expected
}

TEST(TrainData, OneEpochGivesEachTokenOnce) {
  // 150 tokens = 3 batches of 50; pieces of at most 16 are cut at batch ends only.
  TrainData data({{numbered(kLengths)}}, {16, 50, kVocabulary}, 5);
  EXPECT_EQ(data.tokens(), 150);
  std::multiset<int32_t> seen;
  size_t cut = 0;
  for (int i = 0; i < 3; ++i) {
    TrainBatch b;
    data.next(b);
    expect_sound(b, 50, 16);
    seen.insert(b.ids.begin(), b.ids.end());
    for (int64_t offset : b.offsets) cut += offset % 16 != 0;
  }
  std::multiset<int32_t> want;
  for (size_t r = 0; r < kLengths.size(); ++r)
    for (int64_t i = 0; i < kLengths[r]; ++i) want.insert(int32_t(1000 * int64_t(r) + i));
  EXPECT_EQ(seen, want);
  EXPECT_LE(cut, 2u);
  EXPECT_EQ(data.cursor()[0], (DataCursor{1, 0, 0, 150}));
}

TEST(TrainData, EpochsAndSeedsDifferAndRunsDoNot) {
  const auto epochs = [](uint64_t seed) {
    TrainData data({{numbered(kLengths)}}, {16, 150, kVocabulary}, seed);
    std::vector<TrainBatch> out(3);
    for (auto& b : out) data.next(b);
    return out;
  };
  const auto a = epochs(5), again = epochs(5), other = epochs(6);
  EXPECT_NE(a[0].ids, a[1].ids);
  EXPECT_NE(a[1].ids, a[2].ids);
  EXPECT_NE(a[0].ids, other[0].ids);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(a[i].ids, again[i].ids);
    EXPECT_EQ(a[i].start, again[i].start);
  }
}

TEST(TrainData, ACursorGoesOnExactly) {
  const std::vector<DataPart> parts = {{numbered(kLengths), 3}, {numbered({100, 9}), 1}};
  const DataSizes sizes{16, 37, kVocabulary};  // 37: pieces are cut at nearly every end
  TrainData whole(parts, sizes, 9);
  std::vector<std::vector<DataCursor>> cursors;
  std::vector<TrainBatch> batches(40);
  for (auto& b : batches) {
    cursors.push_back(whole.cursor());
    whole.next(b);
  }
  for (size_t i = 0; i < batches.size(); ++i) {
    TrainData again(parts, sizes, 9);
    again.seek(cursors[i]);
    TrainBatch b;
    again.next(b);
    EXPECT_EQ(b.ids, batches[i].ids) << i;
    EXPECT_EQ(b.start, batches[i].start) << i;
    EXPECT_EQ(b.rows, batches[i].rows) << i;
    EXPECT_EQ(b.offsets, batches[i].offsets) << i;
  }
  TrainData again(parts, sizes, 9);
  size_t most = 0;
  for (const auto& b : batches) most = std::max(most, b.rows.size());
  EXPECT_EQ(again.most_sequences(40), int64_t(most));
  EXPECT_EQ(again.most_sequences(1), int64_t(batches[0].rows.size()));
  EXPECT_EQ(again.cursor()[0], (DataCursor{}));
  EXPECT_THROW(whole.seek({{0, 0, 0, 0}}), Error);
  EXPECT_THROW(whole.seek({{0, 999, 0, 0}, {}}), Error);
  EXPECT_THROW(whole.seek({{0, 0, 16, 0}, {}}), Error);
}

TEST(TrainData, MixesByTokens) {
  TrainData data({{numbered({5000}), 3}, {numbered({5, 5, 5, 5}), 1}}, {8, 64, kVocabulary}, 1);
  TrainBatch b;
  for (int i = 0; i < 50; ++i) data.next(b);
  EXPECT_NEAR(double(data.cursor()[0].tokens), 2400, 16);
  EXPECT_NEAR(double(data.cursor()[1].tokens), 800, 16);
  EXPECT_EQ(data.cursor()[1].epoch, data.cursor()[1].tokens / 20);
  // Without weights: as many as they hold.
  TrainData by_size({{numbered({5000})}, {numbered({5, 5, 5, 5})}}, {8, 502, kVocabulary}, 1);
  for (int i = 0; i < 10; ++i) by_size.next(b);
  EXPECT_NEAR(double(by_size.cursor()[1].tokens), 20, 8);
}

TEST(TrainData, DropsLongRowsAndCutsNone) {
  const DataPart part{numbered(kLengths), 0, true};
  const DataYield yield = yield_of(part, 16);
  EXPECT_EQ(yield.tokens, 29);
  EXPECT_EQ(yield.dropped_rows, 3);
  EXPECT_EQ(yield.dropped_tokens, 121);
  EXPECT_EQ(yield_of({numbered(kLengths)}, 16).tokens, 150);
  TrainData data({part}, {16, 20, kVocabulary}, 5);
  EXPECT_EQ(data.tokens(), 29);
  std::map<int64_t, int> seen;
  int64_t tokens = 0;
  while (data.cursor()[0].epoch < 4) {
    TrainBatch b;
    data.next(b);
    ASSERT_GT(b.T(), 0);
    ASSERT_LE(b.T(), 20);
    expect_sound(b, b.T(), 16);
    for (size_t s = 0; s < b.rows.size(); ++s) {
      EXPECT_EQ(b.offsets[s], 0);
      EXPECT_EQ(b.start[s + 1] - b.start[s], kLengths[size_t(b.rows[s])]);
      ++seen[b.rows[s]];
    }
    tokens += b.T();
  }
  EXPECT_EQ(data.cursor()[0].tokens, tokens);
  EXPECT_GE(tokens, 4 * 29);
  EXPECT_EQ(seen.size(), 5u);  // rows of 7, 1, 16, 3 and 2 tokens
  for (const auto& [row, times] : seen) EXPECT_TRUE(times == 4 || times == 5) << row;
}

// A part that may be cut fills what whole rows leave, and all go on from a cursor.
TEST(TrainData, WholeRowsBesideOnesThatMayBeCut) {
  const std::vector<DataPart> parts = {{numbered({5000}), 1}, {numbered({15, 90, 9, 13, 16}), 1, true}};
  const DataSizes sizes{16, 40, kVocabulary};
  TrainData data(parts, sizes, 3);
  std::set<int64_t> whole;
  for (int i = 0; i < 100; ++i) {
    TrainData again(parts, sizes, 3);
    again.seek(data.cursor());
    TrainBatch b, c;
    data.next(b);
    again.next(c);
    EXPECT_EQ(b.ids, c.ids);
    EXPECT_EQ(b.start, c.start);
    ASSERT_EQ(b.T(), 40);
    for (size_t s = 0; s < b.rows.size(); ++s) {
      if (b.rows[s] == 0) continue;
      EXPECT_EQ(b.offsets[s], 0);
      EXPECT_EQ(b.start[s + 1] - b.start[s], parts[1].rows->length(b.rows[s] - 1));
      whole.insert(b.rows[s]);
    }
  }
  EXPECT_EQ(whole, (std::set<int64_t>{1, 3, 4, 5}));
  EXPECT_NEAR(double(data.cursor()[1].tokens), 2000, 32);
  EXPECT_EQ(data.cursor()[1].offset, 0);
  EXPECT_THROW(data.seek({{}, {0, 0, 3, 0}}), Error);
}

TEST(TrainData, Refuses) {
  EXPECT_THROW(TrainData({{numbered({17, 0}), 0, true}}, {16, 50, kVocabulary}, 5), Error);
  EXPECT_THROW(TrainData({}, {16, 50, kVocabulary}, 5), Error);
  EXPECT_THROW(TrainData({{numbered({0, 0})}}, {16, 50, kVocabulary}, 5), Error);
  EXPECT_THROW(TrainData({{numbered({8}), 1}, {numbered({8})}}, {16, 50, kVocabulary}, 5), Error);
  EXPECT_THROW(TrainData({{numbered({8}), -1}}, {16, 50, kVocabulary}, 5), Error);
  EXPECT_THROW(TrainData({{numbered({8})}}, {16, 15, kVocabulary}, 5), Error);
  TrainBatch b;
  TrainData small({{numbered({8, 8})}}, {16, 50, 1003}, 5);
  try {
    small.next(b);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()), "data set row 1: token 3 is id 1003, the model's vocabulary ends at 1002");
  }
}

TEST(TrainData, CarriesOverBetweenStages) {
  const std::vector<DataCursor> at = {{2, 5, 3, 100}, {1, 0, 0, 40}};
  EXPECT_EQ(TrainData::carry_over(at, true), at);
  EXPECT_EQ(TrainData::carry_over(at, false), (std::vector<DataCursor>{{3, 0, 0, 100}, {1, 0, 0, 40}}));
}

TEST(HeldOut, BatchesAreWholePieces) {
  const Numbered rows(kLengths);
  const auto all = held_out_batches(rows, {16, 40, kVocabulary}, 0, false);
  int64_t tokens = 0;
  for (const auto& b : all) {
    expect_sound(b, b.T(), 16);
    EXPECT_LE(b.T(), 40);
    for (int64_t offset : b.offsets) EXPECT_EQ(offset % 16, 0);
    tokens += b.T();
  }
  EXPECT_EQ(tokens, 150);
  int64_t first = 0, some = 0;
  for (const auto& b : held_out_batches(rows, {16, 40, kVocabulary}, 0, true)) first += b.T();
  EXPECT_EQ(first, 7 + 1 + 16 + 16 + 3 + 16 + 16 + 2);
  for (const auto& b : held_out_batches(rows, {16, 40, kVocabulary}, 33, false)) some += b.T();
  EXPECT_EQ(some, 33);
}

TEST(Rows, SplitAndSample) {
  const auto rows = numbered(std::vector<int64_t>(50, 4));
  const SplitRows split = split_rows(rows, 10, 3);
  EXPECT_EQ(split.held_out->count(), 10);
  EXPECT_EQ(split.train->count(), 40);
  std::set<int64_t> seen;
  for (const auto* part : {split.train.get(), split.held_out.get()})
    for (int64_t r = 0; r < part->count(); ++r) {
      std::vector<int32_t> ids(4);
      part->read(r, 0, ids);
      EXPECT_EQ(ids[0], 1000 * part->source_row(r));
      seen.insert(part->source_row(r));
    }
  EXPECT_EQ(seen.size(), 50u);
  EXPECT_NE(split_rows(rows, 10, 4).held_out->fingerprint(), split.held_out->fingerprint());
  EXPECT_EQ(split_rows(rows, 10, 3).held_out->fingerprint(), split.held_out->fingerprint());
  EXPECT_THROW(split_rows(rows, 50, 3), Error);
  EXPECT_EQ(sample_rows(rows, 7, 3)->count(), 7);
  EXPECT_EQ(sample_rows(rows, 70, 3)->count(), 50);
  // Names of rows are those of the whole set.
  TrainData data({{split.train}, {split.held_out}}, {4, 200, kVocabulary}, 1);
  TrainBatch b;
  data.next(b);
  std::set<int64_t> names(b.rows.begin(), b.rows.end());
  EXPECT_EQ(names.size(), 50u);
  for (size_t s = 0; s < b.rows.size(); ++s) EXPECT_EQ(b.ids[size_t(b.start[s])], 1000 * (b.rows[s] % 50));
}

TEST(Rows, Shards) {
  test::TempFolder dir;
  const std::vector<int32_t> a = {1, 2, 3, 70000}, b = {9};
  write_shard(dir / "0.safetensors", a, std::vector<int64_t>{0, 1, 1, 4});
  write_shard(dir / "1.safetensors", b, std::vector<int64_t>{0, 1});
  const auto rows = open_shards({dir / "0.safetensors", dir / "1.safetensors"});
  ASSERT_EQ(rows->count(), 4);
  EXPECT_EQ(rows->length(1), 0);
  EXPECT_EQ(rows->length(2), 3);
  std::vector<int32_t> out(2);
  rows->read(2, 1, out);
  EXPECT_EQ(out, (std::vector<int32_t>{3, 70000}));
  EXPECT_THROW(rows->read(2, 2, out), Error);
  EXPECT_THROW(rows->length(4), Error);
  // U16, written by hand.
  std::string header = R"({"tokens":{"dtype":"U16","shape":[3],"data_offsets":[0,6]},)"
                       R"("offsets":{"dtype":"I32","shape":[3],"data_offsets":[6,18]}})";
  std::string bytes = {char(header.size()), 0, 0, 0, 0, 0, 0, 0};
  bytes += header + std::string("\x01\x00\xff\xff\x03\x00", 6) + std::string("\0\0\0\0\x02\0\0\0\x03\0\0\0", 12);
  test::write_bytes(dir / "u16.safetensors", bytes);
  const auto narrow = open_shards({dir / "u16.safetensors"});
  narrow->read(0, 0, out);
  EXPECT_EQ(out, (std::vector<int32_t>{1, 65535}));
  EXPECT_NE(narrow->fingerprint(), rows->fingerprint());
  // Broken ones.
  const auto broken = [&](std::vector<int64_t> offsets) {
    write_shard(dir / "x.safetensors", a, offsets);
    return open_shards({dir / "x.safetensors"});
  };
  EXPECT_NO_THROW(broken({0, 4}));
  EXPECT_THROW(broken({0, 3}), Error);
  EXPECT_THROW(broken({1, 4}), Error);
  EXPECT_THROW(broken({0, 3, 2, 4}), Error);
}

}  // namespace
}  // namespace kda
