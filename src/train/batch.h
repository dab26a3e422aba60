// train/batch.h — one batch of packed training text.
#pragma once
#include <cstdint>
#include <vector>

#include "model/training.h"

namespace kda {

// Pieces of documents, packed without padding; each piece is a sequence that starts from zero states.
struct TrainBatch {
  std::vector<int32_t> ids;    // [T]
  std::vector<int32_t> start;  // [N+1]
  // [T]  the next token of the same sequence; -1: none (its last token) or masked. THE mask of every loss
  std::vector<int32_t> labels;
  // [N]  which row of the data set each sequence is: names a batch in messages, finds a stored teacher's row
  std::vector<int64_t> rows;
  // [N]  which token of that row the sequence begins with: long rows are cut into several sequences
  std::vector<int64_t> offsets;

  Batch view() const { return {ids, start}; }
  int64_t T() const { return int64_t(ids.size()); }
  int64_t counted() const;  // labels >= 0
};

}  // namespace kda
