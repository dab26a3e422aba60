// text/vocabulary.h — tokens by id and ids by token.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kda::text {

uint64_t hash_bytes(std::string_view);

// Ids may have gaps; the largest is below kMost, so that a file cannot ask for any amount of memory.
class Vocabulary {
 public:
  static constexpr int64_t kMost = int64_t(1) << 22;

  void reserve(size_t tokens, size_t bytes);
  // False when the token or the id is taken. 0 <= id < kMost.
  bool add(std::string_view token, int32_t id);

  int32_t find(std::string_view token) const;  // -1: none
  bool has(int32_t id) const {
    return id >= 0 && static_cast<size_t>(id) < by_id_.size() && by_id_[static_cast<size_t>(id)].length != kAbsent;
  }
  // Empty for an id that has no token.
  std::string_view token(int32_t id) const {
    if (!has(id)) return {};
    const Entry e = by_id_[static_cast<size_t>(id)];
    return std::string_view(bytes_).substr(e.begin, e.length);
  }
  size_t count() const { return count_; }
  int32_t end() const { return static_cast<int32_t>(by_id_.size()); }  // one above the largest id

 private:
  static constexpr uint32_t kAbsent = ~0u;
  struct Entry {
    size_t begin = 0;
    uint32_t length = kAbsent;
  };
  struct Slot {
    uint32_t hash = 0;
    int32_t id = -1;
  };
  void grow(size_t slots);

  std::string bytes_;
  std::vector<Entry> by_id_;
  std::vector<Slot> slots_;
  size_t count_ = 0;
};

}  // namespace kda::text
