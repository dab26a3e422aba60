// text/bpe.h — byte pair encoding: a word's characters, merged pair by pair in the order the merges were learnt.
#pragma once
#include <simdjson.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace kda::text {

class Bpe {
 public:
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // places in the list of symbols, -1 none
  };
  struct Candidate {
    uint64_t order;  // rank, then place: the smallest is merged first
    int32_t id;
    bool operator>(const Candidate& o) const { return order > o.order; }
  };
  // What encoding writes to; one per thread at a time. Holds the words met lately with their ids: a fixed table where a
  // newer word takes the place of an older one.
  struct Scratch {
    static constexpr size_t kSlots = size_t(1) << 14;  // 1 MiB
    struct Slot {
      char key[27];
      uint8_t length;  // of the key; 0 = empty
      uint8_t count;   // of ids
      int32_t ids[8];
    };
    std::vector<Slot> known;
    std::vector<int32_t> ids;
    std::vector<uint64_t> ranks;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    std::string mapped, piece;
  };

  // The file's `model`. Throws Error for what is not BPE, for dropout, for merges of tokens that are not there.
  explicit Bpe(simdjson::dom::element model);

  // Appends the ids of one word (valid UTF-8, not empty). `bytes`: the word is first written in the alphabet of
  // text/byte_level.h.
  void encode(std::string_view word, bool bytes, Scratch&, std::vector<int32_t>& out) const;

  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  struct Merge {
    uint64_t pair;  // left << 32 | right; ~0 = empty
    uint32_t rank;
    int32_t id;
  };
  static constexpr uint64_t kNone = ~uint64_t(0);

  void read_vocabulary(simdjson::dom::element);
  void read_merges(simdjson::dom::element);
  const Merge* merge(int32_t left, int32_t right) const;
  void encode_new(std::string_view word, Scratch&, std::vector<int32_t>& out) const;
  void first_symbols(std::string_view word, Scratch&) const;
  void merge_short(Scratch&) const;
  void merge_long(Scratch&) const;

  Vocabulary vocabulary_;
  std::vector<Merge> merges_;  // open addressing
  int shift_ = 64;
  std::array<int32_t, 256> byte_tokens_{};  // <0x00> .. <0xFF>
  std::array<int32_t, 128> ascii_{};        // ids of single characters
  int32_t unknown_ = -1;
  std::string unknown_token_, prefix_, suffix_;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

}  // namespace kda::text
