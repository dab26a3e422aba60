#include "train/data.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace kda {

namespace {
// Adds tokens [from, from + n) of a row as a sequence.
void append(TrainBatch& b, const Rows& rows, int64_t row, int64_t row_name, int64_t from, int64_t n,
            int32_t vocabulary) {
  const size_t at = b.ids.size();
  b.ids.resize(at + size_t(n));
  const std::span<int32_t> ids(b.ids.data() + at, size_t(n));
  rows.read(row, from, ids);
  for (size_t i = 0; i < ids.size(); ++i)
    KDA_CHECK(ids[i] >= 0 && ids[i] < vocabulary, "data set row ", row_name, ": token ", from + int64_t(i), " is id ",
              ids[i], ", the model's vocabulary ends at ", vocabulary - 1);
  b.labels.insert(b.labels.end(), ids.begin() + 1, ids.end());
  b.labels.push_back(-1);
  b.start.push_back(int32_t(b.ids.size()));
  b.rows.push_back(row_name);
  b.offsets.push_back(from);
}

void clear(TrainBatch& b) {
  b.ids.clear();
  b.labels.clear();
  b.rows.clear();
  b.offsets.clear();
  b.start.assign(1, 0);
}

void check(const DataSizes& s) {
  KDA_CHECK(s.sequence_length >= 2, "data: sequence_length must be at least 2, is ", s.sequence_length);
  KDA_CHECK(s.batch_tokens >= s.sequence_length && s.batch_tokens <= INT32_MAX, "data: a batch must hold from ",
            s.sequence_length, " (one sequence) to ", INT32_MAX, " tokens, is to hold ", s.batch_tokens);
  KDA_CHECK(s.vocabulary > 0, "data: the vocabulary is empty");
}
}  // namespace

DataYield yield_of(const DataPart& part, int64_t sequence_length) {
  DataYield y;
  for (int64_t r = 0; r < part.rows->count(); ++r) {
    const int64_t n = part.rows->length(r);
    if (!part.whole || n <= sequence_length) {
      y.tokens += n;
    } else {
      ++y.dropped_rows;
      y.dropped_tokens += n;
    }
  }
  return y;
}

TrainData::TrainData(std::vector<DataPart> parts, const DataSizes& sizes, uint64_t seed) : sizes_(sizes), seed_(seed) {
  check(sizes);
  KDA_CHECK(!parts.empty(), "data: no data set given");
  const auto given = std::count_if(parts.begin(), parts.end(), [](const DataPart& p) { return p.weight != 0; });
  KDA_CHECK(given == 0 || given == int64_t(parts.size()), "data: ", given, " of ", parts.size(),
            " data sets have a weight; give one to all or to none");
  int64_t first_row = 0;
  for (DataPart& p : parts) {
    KDA_CHECK(std::isfinite(p.weight) && p.weight >= 0, "data: a weight must be above 0, is ", p.weight);
    const DataYield yield = yield_of(p, sizes.sequence_length);
    KDA_CHECK(yield.tokens + yield.dropped_tokens > 0, "data: data set ", parts_.size(), " holds no token");
    KDA_CHECK(yield.tokens > 0, "data: no row of data set ", parts_.size(), " fits sequence_length ",
              sizes.sequence_length, "; all ", yield.dropped_rows, " would be dropped");
    Part part{std::move(p.rows), p.weight, p.whole, first_row, {0}};
    for (int64_t r = 0; r < part.rows->count(); ++r) {
      const int64_t pieces = (part.rows->length(r) + sizes.sequence_length - 1) / sizes.sequence_length;
      part.first_piece.push_back(part.first_piece.back() + (part.whole && pieces > 1 ? 0 : pieces));
    }
    if (!given) part.weight = double(yield.tokens);
    tokens_ += yield.tokens;
    first_row += part.rows->source_count();
    parts_.push_back(std::move(part));
  }
  cursor_.resize(parts_.size());
}

int64_t TrainData::furthest_behind(const std::vector<DataCursor>& cursor, bool may_be_cut) const {
  int64_t best = -1;
  const auto taken = [&](size_t i) { return double(cursor[i].tokens) / parts_[i].weight; };
  for (size_t i = 0; i < parts_.size(); ++i)
    if (!(may_be_cut && parts_[i].whole) && (best < 0 || taken(i) < taken(size_t(best)))) best = int64_t(i);
  return best;
}

TrainData::Piece TrainData::piece_at(size_t which, const DataCursor& c) const {
  const Part& part = parts_[which];
  const int64_t piece = Permutation(part.pieces(), seed_, uint64_t(c.epoch) << 16 | which)(c.position);
  const auto after = std::upper_bound(part.first_piece.begin(), part.first_piece.end(), piece);
  const int64_t row = after - part.first_piece.begin() - 1;
  const int64_t begin = (piece - part.first_piece[size_t(row)]) * sizes_.sequence_length;
  return {row, begin, std::min(sizes_.sequence_length, part.rows->length(row) - begin)};
}

template <class F>
void TrainData::each_sequence(std::vector<DataCursor>& cursor, F use) const {
  for (int64_t left = sizes_.batch_tokens; left > 0;) {
    // A piece that was cut goes on before anything else.
    const auto cut = std::find_if(cursor.begin(), cursor.end(), [](const DataCursor& c) { return c.offset > 0; });
    int64_t which = cut != cursor.end() ? cut - cursor.begin() : furthest_behind(cursor, false);
    if (parts_[size_t(which)].whole && piece_at(size_t(which), cursor[size_t(which)]).size > left)
      which = furthest_behind(cursor, true);
    if (which < 0) return;
    const Part& part = parts_[size_t(which)];
    DataCursor& c = cursor[size_t(which)];
    const auto [row, begin, size] = piece_at(size_t(which), c);
    const int64_t n = std::min(size - c.offset, left);
    use(part, row, begin + c.offset, n);
    left -= n;
    c.tokens += n;
    c.offset += n;
    if (c.offset < size) continue;  // the batch is full
    c.offset = 0;
    if (++c.position == part.pieces()) c.position = 0, ++c.epoch;
  }
}

void TrainData::next(TrainBatch& b) {
  clear(b);
  each_sequence(cursor_, [&](const Part& part, int64_t row, int64_t from, int64_t n) {
    append(b, *part.rows, row, part.first_row + part.rows->source_row(row), from, n, sizes_.vocabulary);
  });
}

int64_t TrainData::most_sequences(int64_t batches) const {
  std::vector<DataCursor> cursor = cursor_;
  int64_t most = 0;
  for (int64_t i = 0; i < batches; ++i) {
    int64_t here = 0;
    each_sequence(cursor, [&](const Part&, int64_t, int64_t, int64_t) { ++here; });
    most = std::max(most, here);
  }
  return most;
}

void TrainData::seek(const std::vector<DataCursor>& cursor) {
  KDA_CHECK(cursor.size() == parts_.size(), "data: a cursor of ", cursor.size(), " data sets, there are ",
            parts_.size());
  for (size_t i = 0; i < cursor.size(); ++i) {
    const DataCursor& c = cursor[i];
    KDA_CHECK(c.epoch >= 0 && c.tokens >= 0 && c.position >= 0 && c.position < parts_[i].pieces() && c.offset >= 0 &&
                  c.offset < (parts_[i].whole ? 1 : sizes_.sequence_length),
              "data: cursor (epoch ", c.epoch, ", position ", c.position, ", offset ", c.offset,
              ") lies outside of data set ", i, " with ", parts_[i].pieces(), " pieces");
  }
  cursor_ = cursor;
}

std::vector<DataCursor> TrainData::carry_over(std::vector<DataCursor> cursor, bool same_length) {
  if (same_length) return cursor;
  for (DataCursor& c : cursor) {
    if (c.position || c.offset) ++c.epoch;
    c.position = c.offset = 0;
  }
  return cursor;
}

std::vector<TrainBatch> held_out_batches(const Rows& rows, const DataSizes& sizes, int64_t most, bool only_first) {
  check(sizes);
  std::vector<TrainBatch> out;
  int64_t given = 0;
  for (int64_t row = 0; row < rows.count() && (most == 0 || given < most); ++row) {
    const int64_t length = rows.length(row);
    for (int64_t at = 0; at < length && (most == 0 || given < most); at += sizes.sequence_length) {
      int64_t n = std::min(sizes.sequence_length, length - at);
      if (most) n = std::min(n, most - given);
      if (out.empty() || out.back().T() + n > sizes.batch_tokens) clear(out.emplace_back());
      append(out.back(), rows, row, rows.source_row(row), at, n, sizes.vocabulary);
      given += n;
      if (only_first) break;
    }
  }
  KDA_CHECK(given > 0, "data: the held-out part holds no token");
  return out;
}

}  // namespace kda
