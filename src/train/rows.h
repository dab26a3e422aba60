// train/rows.h — a data set as training sees it: rows of token ids, each a document.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kda {

// All members may be called from any number of threads.
class Rows {
 public:
  virtual ~Rows() = default;
  virtual int64_t count() const = 0;
  virtual int64_t length(int64_t row) const = 0;  // tokens
  // Tokens [from, from + out.size()) of a row.
  virtual void read(int64_t row, int64_t from, std::span<int32_t> out) const = 0;
  // Where a row stands in the data set that it was taken from, and how many that has: itself unless rows were left out.
  virtual int64_t source_row(int64_t row) const { return row; }
  virtual int64_t source_count() const { return count(); }
  // The same for two data sets that hold the same rows; a resumed run compares it.
  virtual std::string fingerprint() const = 0;
};

// Token shards: safetensors files with `tokens` (I32, or U16 as unsigned) and `offsets` (I64 or I32, [rows + 1], from 0
// to the number of tokens). Mapped, nothing is copied. Throws Error naming the file.
std::unique_ptr<Rows> open_shards(const std::vector<std::filesystem::path>& files);
// One shard, as open_shards reads it.
void write_shard(const std::filesystem::path&, std::span<const int32_t> tokens, std::span<const int64_t> offsets);

// Some rows of a data set, in the order given.
std::shared_ptr<const Rows> some_rows(std::shared_ptr<const Rows>, std::vector<int64_t> which);

struct SplitRows {
  std::shared_ptr<const Rows> train, held_out;
};
// `held_out` rows, drawn by seed, and the others; both in their old order. Throws Error when nothing is left to train.
SplitRows split_rows(const std::shared_ptr<const Rows>&, int64_t held_out, uint64_t seed);
// The first `most` of the rows in an order drawn by seed, in their old order.
std::shared_ptr<const Rows> sample_rows(const std::shared_ptr<const Rows>&, int64_t most, uint64_t seed);

// A permutation of [0,n) in constant memory: a Feistel network of Philox numbers. Depends on (seed, stream, n) alone.
class Permutation {
 public:
  Permutation(int64_t n, uint64_t seed, uint64_t stream);
  int64_t operator()(int64_t i) const;

 private:
  int64_t n_;
  uint64_t seed_, stream_;
  int half_bits_;
};

}  // namespace kda
