// train/data.h — batches of training text, packed without padding, in an order fixed by a seed; and held-out batches.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "train/batch.h"
#include "train/rows.h"

namespace kda {

// Where reading stands in one data set. All integers: saved and restored exactly.
struct DataCursor {
  int64_t epoch = 0;     // how often it was read to its end
  int64_t position = 0;  // pieces of this epoch's order that are used up
  int64_t offset = 0;    // tokens of the piece at `position` that are used up
  int64_t tokens = 0;    // given in all

  bool operator==(const DataCursor&) const = default;
};

// A data set in a mixture.
struct DataPart {
  std::shared_ptr<const Rows> rows;
  double weight = 0;   // share of the tokens; 0 in all parts: as many as they hold
  bool whole = false;  // no row is cut; rows longer than the sequence are left out
};

// What a data set gives at a sequence length, once through.
struct DataYield {
  int64_t tokens = 0;
  int64_t dropped_rows = 0, dropped_tokens = 0;  // too long
};
DataYield yield_of(const DataPart&, int64_t sequence_length);

struct DataSizes {
  int64_t sequence_length = 0;  // rows are cut into pieces of at most so many tokens
  int64_t batch_tokens = 0;     // so many in each batch; fewer only where all parts are `whole`
  int32_t vocabulary = 0;       // ids must be below it
};

// Endless. Pieces come in an order drawn anew for each epoch; one that does not fit a batch any more is cut there and
// goes on in the next batch as a sequence of its own. The next piece comes from the data set that is furthest behind
// its share of the tokens. A row of a `whole` part that does not fit waits for the next batch, and parts that may be
// cut fill this one; without any, it ends there. Nothing depends on the number of threads.
class TrainData {
 public:
  // Throws Error for a data set without tokens or without a row that fits, a weight below 0, weights for some parts
  // only.
  TrainData(std::vector<DataPart>, const DataSizes&, uint64_t seed);

  // TrainBatch::rows count through the rows of all parts as they are stored: Rows::source_row.
  void next(TrainBatch&);

  int64_t tokens() const { return tokens_; }  // of all parts, once
  // Most sequences in one of the next so many batches: exact, found by going through their order.
  int64_t most_sequences(int64_t batches) const;
  const std::vector<DataCursor>& cursor() const { return cursor_; }
  // Throws Error for a cursor that lies outside of the data.
  void seek(const std::vector<DataCursor>&);
  // Another length and batch from here on. Where the length changes, so do the pieces: each data set then begins a new
  // epoch.
  static std::vector<DataCursor> carry_over(std::vector<DataCursor>, bool same_length);

 private:
  struct Part {
    std::shared_ptr<const Rows> rows;
    double weight;
    bool whole;
    int64_t first_row;                 // of this part, counted through all as they are stored
    std::vector<int64_t> first_piece;  // [rows + 1]
    int64_t pieces() const { return first_piece.back(); }
  };
  // Of all parts, or of those that may be cut; -1: there is none.
  int64_t furthest_behind(const std::vector<DataCursor>&, bool may_be_cut) const;
  struct Piece {
    int64_t row, begin, size;
  };
  Piece piece_at(size_t part, const DataCursor&) const;
  // Calls use(part, row, begin, tokens) for each sequence of the batch at `cursor`, and moves that on.
  template <class F>
  void each_sequence(std::vector<DataCursor>& cursor, F use) const;

  std::vector<Part> parts_;
  DataSizes sizes_;
  uint64_t seed_;
  int64_t tokens_ = 0;
  std::vector<DataCursor> cursor_;
};

// Batches of at most max_tokens in the rows' order, until `most` tokens are reached (0: all of them). A row gives
// pieces of at most sequence_length, or with only_first its first; pieces are never cut further, so batches may be
// smaller.
std::vector<TrainBatch> held_out_batches(const Rows&, const DataSizes&, int64_t most, bool only_first);

}  // namespace kda
