// train/stored_format.h — bytes of a capture's files; train/stored_teacher.h says what they are.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "train/stored_teacher.h"

namespace kda::stored {

inline constexpr const char* kHeaderName = "capture.json";
inline constexpr const char* kUnfinishedName = "capture.partial.json";
inline constexpr const char* kRowsName = "rows.bin";
inline constexpr const char* kIndexName = "index.bin";
inline constexpr std::string_view kRowsMark = "KDAROWS1", kIndexMark = "KDAINDX1", kRowMark = "KROW";
inline constexpr int64_t kRowHead = 16, kRowTail = 8;

inline uint64_t fnv1a(const void* data, size_t n, uint64_t h = 14695981039346656037ull) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < n; ++i) h = (h ^ p[i]) * 1099511628211ull;
  return h;
}

template <class T>
T load(const void* from) {
  T v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline int64_t row_bytes(const LogprobCodec& c, int64_t tokens) {
  return kRowHead + tokens * (4 + c.value_bytes() + c.index_bytes()) + kRowTail;
}

// Throws Error, naming `where` and `offset`, unless the row that begins at p is whole and right within `left` bytes.
// Returns its tokens.
int64_t check_row(const LogprobCodec&, const std::string& where, const uint8_t* p, uint64_t offset, uint64_t left,
                  int64_t number);

struct Counts {
  int64_t rows = 0, tokens = 0;
};
std::string write_header(const CaptureHeader&, const Counts&);
CaptureHeader read_header(std::string_view text, const std::string& where, Counts*);

// Parquet; refuses with a hint when built without Arrow.
std::shared_ptr<const StoredLogprobs> open_parquet(const std::filesystem::path&,
                                                   const std::optional<LogprobCodecConfig>&);

}  // namespace kda::stored
