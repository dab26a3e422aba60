#include "base/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kda {

namespace {
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#ifdef __x86_64__
bool have_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}

// Four rounds at a time; w holds the last sixteen words of the schedule, and each sha256rnds2 does two rounds.
[[gnu::target("sha,ssse3,sse4.1")]] void block_by_instructions(uint32_t* h, const uint8_t* p) {
  const auto word = [](uint32_t x) { return int(x); };
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i w[4];
  __m128i abef = _mm_set_epi32(word(h[0]), word(h[1]), word(h[4]), word(h[5]));
  __m128i cdgh = _mm_set_epi32(word(h[2]), word(h[3]), word(h[6]), word(h[7]));
  const __m128i abef_before = abef, cdgh_before = cdgh;
  for (int i = 0; i < 16; ++i) {
    __m128i& now = w[i % 4];
    if (i < 4) {
      now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)), big_endian);
    } else {
      const __m128i last = w[(i + 3) % 4], seventh = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
      now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) % 4]), seventh), last);
    }
    const __m128i m = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRound + 4 * i)));
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, m);
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(m, 0x0e));
  }
  abef = _mm_add_epi32(abef, abef_before);
  cdgh = _mm_add_epi32(cdgh, cdgh_before);
  h[0] = uint32_t(_mm_extract_epi32(abef, 3)), h[1] = uint32_t(_mm_extract_epi32(abef, 2));
  h[2] = uint32_t(_mm_extract_epi32(cdgh, 3)), h[3] = uint32_t(_mm_extract_epi32(cdgh, 2));
  h[4] = uint32_t(_mm_extract_epi32(abef, 1)), h[5] = uint32_t(_mm_extract_epi32(abef, 0));
  h[6] = uint32_t(_mm_extract_epi32(cdgh, 1)), h[7] = uint32_t(_mm_extract_epi32(cdgh, 0));
}
#else
bool have_instructions() { return false; }
void block_by_instructions(uint32_t*, const uint8_t*) {}
#endif
}  // namespace

Sha256::Sha256(bool instructions) : instructions_(instructions && have_instructions()) {}

void Sha256::block(const uint8_t* p) {
  if (instructions_) return block_by_instructions(h_.data(), p);
  uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t(p[4 * i]) << 24 | uint32_t(p[4 * i + 1]) << 16 | uint32_t(p[4 * i + 2]) << 8 | p[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ (a >> 3)) + w[i - 7] +
           (std::rotr(b, 17) ^ std::rotr(b, 19) ^ (b >> 10));
  }
  auto s = h_;
  for (int i = 0; i < 64; ++i) {
    const uint32_t choose = (s[4] & s[5]) ^ (~s[4] & s[6]), majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
    const uint32_t t =
        s[7] + (std::rotr(s[4], 6) ^ std::rotr(s[4], 11) ^ std::rotr(s[4], 25)) + choose + kRound[i] + w[i];
    const uint32_t u = (std::rotr(s[0], 2) ^ std::rotr(s[0], 13) ^ std::rotr(s[0], 22)) + majority;
    s = {t + u, s[0], s[1], s[2], s[3] + t, s[4], s[5], s[6]};
  }
  for (size_t i = 0; i < 8; ++i) h_[i] += s[i];
}

Sha256& Sha256::add(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  while (bytes) {
    const size_t used = bytes_ % 64;
    if (used == 0 && bytes >= 64) {
      block(p);
      p += 64, bytes -= 64, bytes_ += 64;
      continue;
    }
    const size_t n = std::min(bytes, 64 - used);
    std::memcpy(rest_.data() + used, p, n);
    p += n, bytes -= n, bytes_ += n;
    if (used + n == 64) block(rest_.data());
  }
  return *this;
}

std::string Sha256::hex() {
  const uint64_t bits = bytes_ * 8;
  const uint8_t one = 0x80, zero = 0;
  add(&one, 1);
  while (bytes_ % 64 != 56) add(&zero, 1);
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = uint8_t(bits >> (56 - 8 * i));
  add(length, 8);
  std::string out;
  for (uint32_t x : h_)
    for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[(x >> shift) & 15u];
  return out;
}

}  // namespace kda
