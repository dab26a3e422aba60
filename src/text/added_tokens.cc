#include "text/added_tokens.h"

#include <algorithm>

#include "text/json.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

constexpr size_t kLongest = 1 << 16;
constexpr size_t kAllTogether = 4 << 20;  // bytes of all contents

bool word_before(std::string_view s, size_t at) {
  if (at == 0) return false;
  size_t i = utf8_previous(s, at);
  return is_word(utf8_next(s, i));
}

bool word_after(std::string_view s, size_t at) { return at < s.size() && is_word(utf8_next(s, at)); }

size_t spaces_before(std::string_view s, size_t at) {
  while (at > 0) {
    const size_t previous = utf8_previous(s, at);
    size_t i = previous;
    if (!is_whitespace(utf8_next(s, i))) break;
    at = previous;
  }
  return at;
}

size_t spaces_after(std::string_view s, size_t at) {
  while (at < s.size()) {
    size_t next = at;
    if (!is_whitespace(utf8_next(s, next))) break;
    at = next;
  }
  return at;
}

bool same(const AddedToken& a, const AddedToken& b) {
  return a.content == b.content && a.single_word == b.single_word && a.lstrip == b.lstrip && a.rstrip == b.rstrip &&
         a.normalized == b.normalized && a.special == b.special;
}

}  // namespace

void Trie::add(std::string_view s, int32_t value) {
  int32_t at = 0;
  for (char c : s) {
    const auto byte = static_cast<uint8_t>(c);
    int32_t next = at == 0 ? first_[byte] : nodes_[static_cast<size_t>(at)].child;
    while (at != 0 && next >= 0 && nodes_[static_cast<size_t>(next)].byte != byte)
      next = nodes_[static_cast<size_t>(next)].sibling;
    if (next < 0) {
      next = static_cast<int32_t>(nodes_.size());
      Node n;
      n.byte = byte;
      if (at != 0) {
        n.sibling = nodes_[static_cast<size_t>(at)].child;
        nodes_[static_cast<size_t>(at)].child = next;
      } else {
        first_[byte] = next;
      }
      nodes_.push_back(n);
    }
    at = next;
  }
  if (!s.empty()) starts_[static_cast<uint8_t>(s[0])] = true;
  auto& v = nodes_[static_cast<size_t>(at)].value;
  if (v < 0) v = value;
}

int32_t Trie::match(std::string_view s, size_t at, size_t& length) const {
  int32_t found = -1;
  int32_t node = first_[static_cast<uint8_t>(s[at])];
  for (size_t i = at; node >= 0;) {
    const Node& n = nodes_[static_cast<size_t>(node)];
    ++i;
    if (n.value >= 0) found = n.value, length = i - at;
    if (i == s.size()) break;
    const auto byte = static_cast<uint8_t>(s[i]);
    node = n.child;
    while (node >= 0 && nodes_[static_cast<size_t>(node)].byte != byte)
      node = nodes_[static_cast<size_t>(node)].sibling;
  }
  return found;
}

AddedTokens::AddedTokens(Json list, const Vocabulary& model, const Normalizer& normalizer, RegexScratch& scratch) {
  const std::string_view where = "an element of added_tokens";
  int64_t next = static_cast<int64_t>(model.count());  // the id of the next token that the model does not have
  for (Json j : json_array(list, "added_tokens")) {
    AddedToken t;
    t.content = need_string(j, "content", where);
    if (t.content.empty()) continue;
    KDA_CHECK(t.content.size() < kLongest, "tokenizer: an added token of ", t.content.size(), " bytes, at most ",
              kLongest);
    t.single_word = find_bool(j, "single_word", where, false);
    t.lstrip = find_bool(j, "lstrip", where, false);
    t.rstrip = find_bool(j, "rstrip", where, false);
    t.special = find_bool(j, "special", where, false);
    t.normalized = find_bool(j, "normalized", where, !t.special);
    const int64_t told = json_integer(need(j, "id", where), "an added token's id", 0, Vocabulary::kMost - 1);
    const int32_t known = contents_.find(t.content);
    if (known >= 0) {
      KDA_CHECK(same(all_[static_cast<size_t>(known)], t), "tokenizer: the added token \"", t.content,
                "\" is there twice, with different settings");
      continue;
    }
    const int32_t in_model = model.find(t.content);
    t.id = in_model >= 0 ? in_model : static_cast<int32_t>(next);
    KDA_CHECK(t.id == told, "tokenizer: the added token \"", t.content, "\" says id ", told, " but ",
              in_model >= 0 ? "model.vocab gives it " : "is the next one, ", t.id);
    KDA_CHECK(t.id < Vocabulary::kMost, "tokenizer: more than ", Vocabulary::kMost, " tokens");
    KDA_CHECK(in_model >= 0 || !model.has(t.id), "tokenizer: the added token \"", t.content, "\" has id ", t.id,
              ", which is \"", model.token(t.id), "\" in model.vocab");
    next = std::max<int64_t>(next, int64_t(t.id) + 1);
    const auto index = static_cast<int32_t>(all_.size());
    if (static_cast<size_t>(t.id) >= by_id_.size()) by_id_.resize(static_cast<size_t>(t.id) + 1, -1);
    by_id_[static_cast<size_t>(t.id)] = index;
    contents_.add(t.content, index);
    all_.push_back(std::move(t));
  }
  // Special tokens first: where two become the same string once normalized, the first holds.
  size_t bytes = 0;
  const auto count = [&](const AddedToken& t) {
    bytes += t.decoded.size();
    KDA_CHECK(bytes <= kAllTogether, "tokenizer: added tokens of more than ", kAllTogether, " bytes in all");
  };
  for (const bool special : {true, false}) {
    for (AddedToken& t : all_) {
      if (t.special != special) continue;
      if (!t.normalized) {
        t.decoded = t.content;
        count(t);
        in_raw_.add(t.content, t.id);
        continue;
      }
      bool at_start = false;
      t.decoded = normalizer.apply(t.content, at_start, scratch);
      KDA_CHECK(!t.decoded.empty(), "tokenizer: the added token \"", t.content, "\" is empty once normalized");
      count(t);
      in_normalized_.add(t.decoded, t.id);
    }
  }
}

const AddedToken* AddedTokens::by_id(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= by_id_.size() || by_id_[static_cast<size_t>(id)] < 0) return nullptr;
  return &all_[static_cast<size_t>(by_id_[static_cast<size_t>(id)])];
}

const AddedToken* AddedTokens::by_content(std::string_view s) const {
  const int32_t i = contents_.find(s);
  return i < 0 ? nullptr : &all_[static_cast<size_t>(i)];
}

void AddedTokens::split(std::string_view text, bool normalized, std::vector<Section>& out) const {
  const Trie& trie = normalized ? in_normalized_ : in_raw_;
  size_t from = 0;  // end of what has been cut off
  if (!trie.empty()) {
    for (size_t at = 0; at < text.size();) {
      size_t length = 0;
      const int32_t id = trie.can_start(text[at]) ? trie.match(text, at, length) : -1;
      if (id < 0) {
        ++at;
        continue;
      }
      size_t begin = at, end = at + length;
      at = end;
      const AddedToken& t = *by_id(id);
      if (t.single_word && (word_before(text, begin) || word_after(text, end))) continue;
      if (t.lstrip) begin = std::max(spaces_before(text, begin), from);
      if (t.rstrip) end = spaces_after(text, end);
      if (from < begin) out.push_back({from, begin, -1});
      out.push_back({begin, end, id});
      from = end;
    }
  }
  if (from < text.size()) out.push_back({from, text.size(), -1});
}

}  // namespace kda::text
