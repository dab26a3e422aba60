#include "text/vocabulary.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.h"

namespace kda::text {

__extension__ using Wide = unsigned __int128;

uint64_t hash_bytes(std::string_view s) {
  const auto mix = [](uint64_t a, uint64_t b) {
    const auto p = static_cast<Wide>(a) * b;
    return static_cast<uint64_t>(p) ^ static_cast<uint64_t>(p >> 64);
  };
  constexpr uint64_t k0 = 0xa0761d6478bd642full, k1 = 0xe7037ed1a0b428dbull;
  uint64_t h = k0 ^ s.size();
  const char* p = s.data();
  size_t n = s.size();
  uint64_t w = 0;
  for (; n > 8; p += 8, n -= 8) {
    std::memcpy(&w, p, 8);
    h = mix(h ^ w, k1);
  }
  w = 0;
  if (n > 0) std::memcpy(&w, p, n);
  return mix(h ^ w, k0);
}

void Vocabulary::grow(size_t slots) {
  std::vector<Slot> old(slots);
  old.swap(slots_);
  for (const Slot& s : old) {
    if (s.id < 0) continue;
    size_t i = s.hash & (slots - 1);
    while (slots_[i].id >= 0) i = (i + 1) & (slots - 1);
    slots_[i] = s;
  }
}

void Vocabulary::reserve(size_t tokens, size_t bytes) {
  bytes_.reserve(bytes);
  by_id_.reserve(tokens);
  grow(std::bit_ceil(2 * tokens + 16));
}

bool Vocabulary::add(std::string_view token, int32_t id) {
  KDA_CHECK(id >= 0 && id < kMost && token.size() < kAbsent, "vocabulary: id ", id, " is not in [0, ", kMost, ")");
  if (2 * (count_ + 1) > slots_.size()) grow(std::max<size_t>(16, 2 * slots_.size()));
  const auto hash = static_cast<uint32_t>(hash_bytes(token));
  const size_t mask = slots_.size() - 1;
  size_t i = hash & mask;
  for (; slots_[i].id >= 0; i = (i + 1) & mask)
    if (slots_[i].hash == hash && this->token(slots_[i].id) == token) return false;
  const auto at = static_cast<size_t>(id);
  if (at >= by_id_.size()) by_id_.resize(at + 1);
  if (by_id_[at].length != kAbsent) return false;
  by_id_[at] = {bytes_.size(), static_cast<uint32_t>(token.size())};
  bytes_ += token;
  slots_[i] = {hash, id};
  ++count_;
  return true;
}

int32_t Vocabulary::find(std::string_view token) const {
  if (slots_.empty()) return -1;
  const auto hash = static_cast<uint32_t>(hash_bytes(token));
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash & mask; slots_[i].id >= 0; i = (i + 1) & mask)
    if (slots_[i].hash == hash && this->token(slots_[i].id) == token) return slots_[i].id;
  return -1;
}

}  // namespace kda::text
