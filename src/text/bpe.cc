#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "text/byte_level.h"
#include "text/json.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

constexpr std::string_view kWhere = "model";
// Up to this many symbols the best pair is looked for among all; beyond, in a heap.
constexpr size_t kShort = 48;

std::string byte_token(int b) {
  constexpr char digits[] = "0123456789ABCDEF";
  return {'<', '0', 'x', digits[b >> 4], digits[b & 15], '>'};
}

}  // namespace

Bpe::Bpe(Json model) {
  if (const auto type = find(model, "type", kWhere)) {
    const auto name = json_string(*type, "model.type");
    KDA_CHECK(name == "BPE", "tokenizer: model of type \"", name, "\" is not supported, only BPE is");
  }
  if (const auto dropout = find(model, "dropout", kWhere)) {
    const bool none = dropout->is_number() && dropout->get_double().value() == 0;
    KDA_CHECK(none, "tokenizer: model.dropout makes encoding random and is not supported");
  }
  prefix_ = find_string(model, "continuing_subword_prefix", kWhere);
  suffix_ = find_string(model, "end_of_word_suffix", kWhere);
  // With byte_fallback every character may become as many tokens as these have bytes.
  KDA_CHECK(prefix_.size() <= 64 && suffix_.size() <= 64,
            "tokenizer: model.continuing_subword_prefix or end_of_word_suffix of more than 64 bytes");
  fuse_unknown_ = find_bool(model, "fuse_unk", kWhere, false);
  byte_fallback_ = find_bool(model, "byte_fallback", kWhere, false);
  ignore_merges_ = find_bool(model, "ignore_merges", kWhere, false);
  read_vocabulary(need(model, "vocab", kWhere));
  read_merges(need(model, "merges", kWhere));
  if (find(model, "unk_token", kWhere)) {
    unknown_token_ = find_string(model, "unk_token", kWhere);
    unknown_ = vocabulary_.find(unknown_token_);
    KDA_CHECK(unknown_ >= 0, "tokenizer: model.unk_token \"", unknown_token_, "\" is not in model.vocab");
  }
  for (int b = 0; b < 256; ++b) byte_tokens_[static_cast<size_t>(b)] = vocabulary_.find(byte_token(b));
  for (int c = 0; c < 128; ++c) ascii_[static_cast<size_t>(c)] = vocabulary_.find(std::string(1, static_cast<char>(c)));
}

void Bpe::read_vocabulary(Json j) {
  const auto object = json_object(j, "model.vocab");
  // simdjson's own count saturates at 2^24 - 1, so it is only a hint.
  vocabulary_.reserve(object.size(), object.size() * 8);
  for (const auto& [token, value] : object) {
    int64_t id = -1;
    const bool fits = !value.get_int64().get(id) && id >= 0 && id < Vocabulary::kMost;
    KDA_CHECK(fits, "tokenizer: model.vocab[\"", token, "\"] must be a whole number in [0, ", Vocabulary::kMost, ")");
    KDA_CHECK(vocabulary_.add(token, static_cast<int32_t>(id)), "tokenizer: model.vocab[\"", token,
              "\"]: ", vocabulary_.find(token) >= 0 ? "the token is there twice" : cat("id ", id, " is taken"));
  }
}

void Bpe::read_merges(Json j) {
  const auto list = json_array(j, "model.merges");
  std::vector<Merge> all;
  all.reserve(list.size());
  std::string joined;
  for (Json e : list) {
    std::string_view left, right;
    if (e.is_string()) {
      const std::string_view line = e.get_string().value_unsafe();
      if (line.starts_with("#version")) continue;
      const size_t space = line.find(' ');
      KDA_CHECK(space != std::string_view::npos && line.find(' ', space + 1) == std::string_view::npos,
                "tokenizer: model.merges[", all.size(), "] must be two tokens with one space between, is \"", line,
                '"');
      left = line.substr(0, space);
      right = line.substr(space + 1);
    } else {
      const auto pair = json_array(e, "an element of model.merges");
      KDA_CHECK(pair.size() == 2, "tokenizer: model.merges[", all.size(), "] must hold 2 tokens, holds ", pair.size());
      left = json_string(pair.at(0).value_unsafe(), "a token in model.merges");
      right = json_string(pair.at(1).value_unsafe(), "a token in model.merges");
    }
    KDA_CHECK(right.size() >= prefix_.size(), "tokenizer: model.merges[", all.size(), "]: \"", right,
              "\" is shorter than continuing_subword_prefix");
    joined.assign(left);
    joined += right.substr(prefix_.size());
    const int32_t l = vocabulary_.find(left), r = vocabulary_.find(right), id = vocabulary_.find(joined);
    KDA_CHECK(l >= 0 && r >= 0 && id >= 0, "tokenizer: model.merges[", all.size(), "] is of \"", left, "\" and \"",
              right, "\", and \"",
              l < 0   ? left
              : r < 0 ? right
                      : std::string_view(joined),
              "\" is not in model.vocab");
    all.push_back({static_cast<uint64_t>(l) << 32 | static_cast<uint64_t>(r), static_cast<uint32_t>(all.size()), id});
  }
  const size_t slots = std::bit_ceil(2 * all.size() + 2);
  shift_ = 64 - std::countr_zero(slots);
  merges_.assign(slots, {kNone, 0, -1});
  for (const Merge& m : all) {
    size_t i = m.pair * 0x9e3779b97f4a7c15ull >> shift_;
    while (merges_[i].pair != kNone && merges_[i].pair != m.pair) i = (i + 1) & (slots - 1);
    merges_[i] = m;  // of a pair that is there twice the later rank holds
  }
}

inline const Bpe::Merge* Bpe::merge(int32_t left, int32_t right) const {
  const uint64_t pair = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  size_t i = pair * 0x9e3779b97f4a7c15ull >> shift_;
  for (; merges_[i].pair != kNone; i = (i + 1) & (merges_.size() - 1))
    if (merges_[i].pair == pair) return &merges_[i];
  return nullptr;
}

void Bpe::encode(std::string_view word, bool bytes, Scratch& s, std::vector<int32_t>& out) const {
  if (s.known.empty()) s.known.resize(Scratch::kSlots);
  auto& slot = s.known[hash_bytes(word) & (Scratch::kSlots - 1)];
  const bool fits = word.size() <= sizeof slot.key;
  if (fits && slot.length == word.size() && std::memcmp(slot.key, word.data(), word.size()) == 0) {
    out.insert(out.end(), slot.ids, slot.ids + slot.count);
    return;
  }
  const size_t from = out.size();
  if (bytes) {
    s.mapped.clear();
    kByteLevel.append(s.mapped, word);
    encode_new(s.mapped, s, out);
  } else {
    encode_new(word, s, out);
  }
  const size_t n = out.size() - from;
  if (!fits || n > std::size(slot.ids)) return;
  std::memcpy(slot.key, word.data(), word.size());
  slot.length = static_cast<uint8_t>(word.size());
  slot.count = static_cast<uint8_t>(n);
  std::copy(out.begin() + static_cast<std::ptrdiff_t>(from), out.end(), slot.ids);
}

void Bpe::encode_new(std::string_view word, Scratch& s, std::vector<int32_t>& out) const {
  if (ignore_merges_) {
    if (const int32_t id = vocabulary_.find(word); id >= 0) return out.push_back(id);
  }
  first_symbols(word, s);
  if (s.ids.size() > 1) s.ids.size() <= kShort ? merge_short(s) : merge_long(s);
  out.insert(out.end(), s.ids.begin(), s.ids.end());
}

// One symbol for each character, or its bytes, or the unknown token.
void Bpe::first_symbols(std::string_view word, Scratch& s) const {
  s.ids.clear();
  bool unknown = false;  // an unknown token waits to be written, so that more may be fused with it
  const auto put_unknown = [&] {
    if (unknown) s.ids.push_back(unknown_);
    unknown = false;
  };
  for (size_t i = 0; i < word.size();) {
    const size_t from = i;
    i += utf8_length(word[i]);
    const bool first = from == 0, last = i >= word.size();
    std::string_view piece = word.substr(from, i - from);
    const bool dressed = (!first && !prefix_.empty()) || (last && !suffix_.empty());
    if (dressed) {
      s.piece.clear();
      if (!first) s.piece += prefix_;
      s.piece += piece;
      if (last) s.piece += suffix_;
      piece = s.piece;
    }
    const int32_t id = piece.size() == 1 ? ascii_[static_cast<uint8_t>(piece[0])] : vocabulary_.find(piece);
    if (id >= 0) {
      put_unknown();
      s.ids.push_back(id);
      continue;
    }
    const auto token = [&](char c) { return byte_tokens_[static_cast<uint8_t>(c)]; };
    if (byte_fallback_ && std::all_of(piece.begin(), piece.end(), [&](char c) { return token(c) >= 0; })) {
      // An unknown token that still waits comes after these bytes, as in the reference.
      for (char c : piece) s.ids.push_back(token(c));
      continue;
    }
    if (unknown_ < 0) continue;  // without an unknown token such characters vanish
    if (!fuse_unknown_) put_unknown();
    unknown = true;
  }
  put_unknown();
}

void Bpe::merge_short(Scratch& s) const {
  auto& ids = s.ids;
  auto& ranks = s.ranks;  // rank << 32 | id of merging symbol i with the next, or kNone
  const auto rank = [&](size_t i) {
    const Merge* m = merge(ids[i], ids[i + 1]);
    return m ? static_cast<uint64_t>(m->rank) << 32 | static_cast<uint32_t>(m->id) : kNone;
  };
  size_t n = ids.size();
  ranks.resize(n);
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == kNone) break;
    ids[best] = static_cast<int32_t>(ranks[best] & 0xffffffffu);
    std::copy(ids.begin() + static_cast<std::ptrdiff_t>(best) + 2, ids.begin() + static_cast<std::ptrdiff_t>(n),
              ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    std::copy(ranks.begin() + static_cast<std::ptrdiff_t>(best) + 2, ranks.begin() + static_cast<std::ptrdiff_t>(n),
              ranks.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    --n;
    if (best > 0) ranks[best - 1] = rank(best - 1);
    if (best + 1 < n) ranks[best] = rank(best);
  }
  ids.resize(n);
}

void Bpe::merge_long(Scratch& s) const {
  auto& symbols = s.symbols;
  auto& heap = s.heap;
  const auto n = static_cast<int32_t>(s.ids.size());
  KDA_CHECK(s.ids.size() < (size_t(1) << 31), "tokenizer: a word of ", s.ids.size(), " characters");
  symbols.resize(s.ids.size());
  heap.clear();
  const auto at = [&](int32_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
  const auto candidate = [&](int32_t left, int32_t right) -> const Merge* { return merge(at(left).id, at(right).id); };
  const auto order = [](const Merge* m, int32_t place) {
    return Candidate{static_cast<uint64_t>(m->rank) << 32 | static_cast<uint32_t>(place), m->id};
  };
  for (int32_t i = 0; i < n; ++i) at(i) = {s.ids[static_cast<size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1};
  for (int32_t i = 0; i + 1 < n; ++i)
    if (const Merge* m = candidate(i, i + 1)) heap.push_back(order(m, i));
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    if (const Merge* m = candidate(left, right)) {
      heap.push_back(order(m, left));
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const Candidate c = heap.back();
    heap.pop_back();
    const auto left = static_cast<int32_t>(c.order & 0xffffffffu);
    if (at(left).id < 0 || at(left).next < 0) continue;
    const int32_t right = at(left).next;
    const Merge* m = candidate(left, right);
    if (!m || m->id != c.id) continue;  // one of the two has been merged with another since
    at(left).id = c.id;
    at(left).next = at(right).next;
    at(right).id = -1;
    if (at(left).next >= 0) at(at(left).next).previous = left;
    push(at(left).previous, left);
    push(left, at(left).next);
  }
  s.ids.clear();
  for (int32_t i = 0; i >= 0; i = at(i).next) s.ids.push_back(at(i).id);
}

}  // namespace kda::text
