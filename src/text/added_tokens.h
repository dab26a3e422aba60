// text/added_tokens.h — tokens that are looked for in the text itself, before it is cut into words.
#pragma once
#include <simdjson.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/normalizer.h"
#include "text/vocabulary.h"

namespace kda::text {

struct AddedToken {
  std::string content;
  std::string decoded;  // what decoding starts from: the content as it is looked for, normalized if it is to be
  int32_t id = -1;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

// Finds the leftmost, and of those the longest, of a set of strings.
class Trie {
 public:
  // The first of two equal strings holds.
  void add(std::string_view s, int32_t value);
  // The value whose string starts at s[at], with its length; -1 when there is none.
  int32_t match(std::string_view s, size_t at, size_t& length) const;
  bool can_start(char c) const { return starts_[static_cast<uint8_t>(c)]; }
  bool empty() const { return nodes_.size() == 1; }

 private:
  struct Node {
    uint8_t byte = 0;
    int32_t value = -1, child = -1, sibling = -1;
  };
  std::vector<Node> nodes_{1};
  std::array<int32_t, 256> first_ = filled();
  std::array<bool, 256> starts_{};
  static constexpr std::array<int32_t, 256> filled() {
    std::array<int32_t, 256> a{};
    a.fill(-1);
    return a;
  }
};

// A stretch of text: an added token, or what lies between (id -1).
struct Section {
  size_t begin, end;
  int32_t id;
};

class AddedTokens {
 public:
  AddedTokens() = default;
  // The file's `added_tokens`. A content that `model` has keeps its id there; the others are numbered on from the end,
  // as the reference does. Throws Error when the file says another id.
  AddedTokens(simdjson::dom::element list, const Vocabulary& model, const Normalizer&, RegexScratch&);

  const std::vector<AddedToken>& all() const { return all_; }
  const AddedToken* by_id(int32_t id) const;
  const AddedToken* by_content(std::string_view) const;

  // Cuts text into sections that cover it. `normalized` chooses the tokens that are looked for in normalized text.
  void split(std::string_view text, bool normalized, std::vector<Section>& out) const;
  bool any(bool normalized) const { return !(normalized ? in_normalized_ : in_raw_).empty(); }

 private:
  std::vector<AddedToken> all_;
  std::vector<int32_t> by_id_;  // index into all_, or -1
  Trie in_raw_, in_normalized_;
  Vocabulary contents_;  // content -> index into all_
};

}  // namespace kda::text
