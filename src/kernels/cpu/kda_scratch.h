// kernels/cpu/kda_scratch.h — one worker's scratch for kda_forward and kda_decode, as offsets in floats.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kda::cpu {

inline constexpr int64_t kKdaChunk = 16;  // tokens; also the largest number of lanes
inline constexpr int64_t kKdaPanel = 32;  // value channels in one panel of the state

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of K are padded to Kp, a multiple of 16, with zeros; V to whole panels.
struct KdaScratch {
  int64_t Kp, Vp;
  int64_t state;    // [Vp/kKdaPanel, Kp, kKdaPanel]  the state, value channels innermost
  int64_t decayed;  // [2C, Kp]   k and s q, decayed from the chunk's start: what meets the state
  int64_t k, q;     // [C, Kp]    k and s q as they are
  int64_t rest;     // [C, Kp]    k decayed to the chunk's end: what is written
  int64_t decay;    // [C, Kp]    one token's own
  int64_t total;    // [Kp]       of the whole chunk
  int64_t sums;     // [2, C, lanes]
  int64_t L, P;     // [C, C]      by key, then by the later token
  int64_t u, o;     // [C, kKdaPanel]
  int64_t size;     // floats

  KdaScratch(int64_t K, int64_t V) : Kp(round_up(K, 16)), Vp(round_up(V, kKdaPanel)) {
    int64_t at = 0;
    const auto take = [&](int64_t n) { return (at += n) - n; };
    constexpr int64_t C = kKdaChunk;
    state = take(Kp * Vp);
    decayed = take(2 * C * Kp);
    k = take(C * Kp);
    q = take(C * Kp);
    rest = take(C * Kp);
    decay = take(C * Kp);
    total = take(Kp);
    sums = take(2 * C * C);
    L = take(C * C);
    P = take(C * C);
    u = take(C * kKdaPanel);
    o = take(C * kKdaPanel);
    size = round_up(at, 16);
  }
};

// kda_decode: q, k, decay, decay k and decay q [Kp] each, v and o [Vp].
inline int64_t kda_decode_scratch(int64_t K, int64_t V) { return 5 * round_up(K, 16) + 2 * round_up(V, 16); }

}  // namespace kda::cpu
