// train/stored_teacher.h — a teacher's log-probabilities on disk, as `kda capture` writes them:
//
//   capture.json   codec, vocabulary, fingerprints, counts; written last: without it the folder is unfinished
//   rows.bin       "KDAROWS1", then each row: "KROW", u32 tokens n, u64 its number, i32 ids [n], values
//   [n,value_bytes],
//                  indices [n,index_bytes] (train/logprob_codec.h), u64 FNV-1a of all that, from "KROW" on
//   index.bin      "KDAINDX1", u64 rows, u64 where each row begins [rows+1], u64 FNV-1a of all that
// Little-endian. Token t's log-probabilities are of the token that follows it.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "train/logprob_codec.h"
#include "train/rows.h"
#include "train/teacher.h"

namespace kda {

// Rows of ids with the teacher's likeliest next ids for each token. All members may be called from any number of
// threads; they throw Error naming file and offset where the data is damaged.
class StoredLogprobs {
 public:
  virtual ~StoredLogprobs() = default;
  virtual int64_t vocabulary() const = 0;
  virtual int64_t k() const = 0;
  virtual int64_t count() const = 0;
  virtual int64_t length(int64_t row) const = 0;  // tokens
  // Tokens [from, from + out.size()) of a row.
  virtual void read_ids(int64_t row, int64_t from, std::span<int32_t> out) const = 0;
  // Tokens [from, from + n): ids, logprobs [n,k], and what the tokens themselves are [n].
  virtual void read(int64_t row, int64_t from, std::span<int32_t> tokens, std::span<int32_t> ids,
                    std::span<float> logprobs) const = 0;
  virtual std::string fingerprint() const = 0;
  virtual std::string teacher() const { return {}; }    // fingerprint of the model, where it is known
  virtual std::string tokenizer() const { return {}; }  // SHA-256 of its tokenizer.json, where it is known
};

// Whether a path is such a folder (finished or not), or Parquet in DistillKit's columns.
bool is_stored_logprobs(const std::filesystem::path&);

// A folder of kda capture; or a .parquet file or folder of such with the columns input_ids, compressed_logprobs,
// bytepacked_indices, which needs a build with Arrow and `codec`, else logprob_compressor.json beside it (a run file's
// teacher.logprob_compressor as JSON). Throws Error for an unfinished folder.
std::shared_ptr<const StoredLogprobs> open_stored_logprobs(const std::filesystem::path&,
                                                           const std::optional<LogprobCodecConfig>& codec = {});

// The data side: the same rows as training text.
std::unique_ptr<Rows> stored_rows(std::shared_ptr<const StoredLogprobs>);

// Finds what it gives by TrainBatch::rows and offsets, which must count the rows of `stored`. rows: most tokens in a
// batch. run() throws Error when the batch's ids are not the stored ones.
std::unique_ptr<Teacher> stored_teacher(Context&, std::shared_ptr<const StoredLogprobs>, int64_t rows);

struct CaptureHeader {
  LogprobCodecConfig codec;
  std::string model = {};      // path, as given
  std::string teacher = {};    // fingerprint of the model
  std::string tokenizer = {};  // SHA-256 of tokenizer.json, or empty
  std::string data = {};       // fingerprint of the rows captured
  int64_t sequence_length = 0;
  int64_t max_tokens = 0;  // 0: all
  bool operator==(const CaptureHeader&) const = default;
};

// Writes such a folder row by row; what was added survives a kill, but for the last row.
class CaptureWriter {
 public:
  // Makes the folder. Throws Error when it holds a capture already, finished or not; with `resume` an unfinished one
  // with the same header goes on after its last whole row.
  CaptureWriter(std::filesystem::path folder, const CaptureHeader&, bool resume);
  ~CaptureWriter();
  CaptureWriter(const CaptureWriter&) = delete;
  CaptureWriter& operator=(const CaptureWriter&) = delete;

  int64_t rows() const { return int64_t(offsets_.size()) - 1; }
  int64_t tokens() const { return tokens_; }
  // values [n,value_bytes], indices [n,index_bytes]
  void add(std::span<const int32_t> ids, std::span<const uint8_t> values, std::span<const uint8_t> indices);
  void finish();  // index and capture.json

 private:
  std::filesystem::path folder_;
  CaptureHeader header_;
  LogprobCodec codec_;
  int fd_ = -1;
  std::vector<uint64_t> offsets_;
  int64_t tokens_ = 0;
};

}  // namespace kda
