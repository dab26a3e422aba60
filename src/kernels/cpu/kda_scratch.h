// kernels/cpu/kda_scratch.h — one worker's scratch for kda_forward, kda_backward and kda_decode, as offsets in floats,
// and what kda_forward_keep leaves for kda_backward.
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

inline constexpr int64_t kKdaSpan = 4;  // chunks from one kept state to the next

// Where one head of one sequence keeps; all null when nothing is kept.
template <class Float>
struct KdaKeptHead {
  Float *states, *chunks;
  int64_t state_stride, chunk_stride;

  Float* state(int64_t span) const { return states + span * state_stride; }
  Float* chunk(int64_t c) const { return chunks + c * chunk_stride; }
};

// kept: [T/64+N, H] states, then [T/16+N, H] chunks of L, P and x. Sequence n begins at start/64 + n and start/16 + n:
// no shorter than what the sequences before it fill, rounded up each on its own.
struct KdaKept {
  int64_t Kp, Vp;  // whole panels; a state is [Kp/32,Vp,32], key channels innermost
  static constexpr int64_t L = 0, P = kKdaChunk * kKdaChunk, x = 2 * kKdaChunk * kKdaChunk;  // x [C,Vp] = u / beta

  KdaKept(int64_t K, int64_t V) : Kp(round_up(K, kKdaPanel)), Vp(round_up(V, kKdaPanel)) {}
  int64_t state() const { return Kp * Vp; }
  int64_t chunk() const { return x + kKdaChunk * Vp; }
  static int64_t spans(int64_t T, int64_t N) { return T / (kKdaSpan * kKdaChunk) + N; }
  static int64_t chunks(int64_t T, int64_t N) { return T / kKdaChunk + N; }
  int64_t floats(int64_t T, int64_t N, int64_t H) const { return H * (spans(T, N) * state() + chunks(T, N) * chunk()); }

  template <class Float>
  KdaKeptHead<Float> head(Float* kept, int64_t T, int64_t N, int64_t H, int64_t start, int64_t n, int64_t h) const {
    if (!kept) return {};
    return {kept + (spans(start, n) * H + h) * state(),
            kept + H * spans(T, N) * state() + (chunks(start, n) * H + h) * chunk(), H * state(), H * chunk()};
  }
};

// For kda_backward. K and V are padded to whole panels with zeros.
struct KdaBackwardScratch {
  int64_t Kp, Vp;
  int64_t rows, rows_size;     // [kKdaSpan] of a chunk's rows: decayed [2C,Kp], k, q, rest, decay [C,Kp], total [Kp]
  int64_t states;              // [kKdaSpan, Kp/32, Vp, 32]  at the chunks' starts
  int64_t d_state, d_state_t;  // [Kp/32,Vp,32] and [Vp/32,Kp,32]
  int64_t u;                   // [kKdaSpan, C, Vp]
  int64_t d_rows;              // [2C, Vp]  -dx, then d_o
  int64_t L, P;                // [C, C]    of a chunk that is not full
  int64_t u_t;                 // [Vp, C]
  int64_t scores;              // [2C, C]   dL and dP, by later token, then by key
  int64_t out;                 // [3C, 32]  what panels answer
  int64_t sums;                // [C, lanes], then [C]
  int64_t size;                // floats

  KdaBackwardScratch(int64_t K, int64_t V) : Kp(round_up(K, kKdaPanel)), Vp(round_up(V, kKdaPanel)) {
    int64_t at = 0;
    const auto take = [&](int64_t n) { return (at += n) - n; };
    constexpr int64_t C = kKdaChunk;
    rows_size = 6 * C * Kp + Kp;
    rows = take(kKdaSpan * rows_size);
    states = take(kKdaSpan * Kp * Vp);
    d_state = take(Kp * Vp);
    d_state_t = take(Kp * Vp);
    u = take(kKdaSpan * C * Vp);
    d_rows = take(2 * C * Vp);
    L = take(C * C);
    P = take(C * C);
    u_t = take(Vp * C);
    scores = take(2 * C * C);
    out = take(3 * C * kKdaPanel);
    sums = take(C * C + C);
    size = round_up(at, 16);
  }
};

}  // namespace kda::cpu
