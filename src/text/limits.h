// text/limits.h — how far a step may make a text grow, so that a hostile file cannot ask for any amount of memory.
#pragma once
#include <cstddef>

#include "base/error.h"

namespace kda::text {

inline constexpr size_t kMostSteps = 32;  // normalizers, pre-tokenizers, decoders

// Far above what any step of a real tokenizer does (NFKC: 18 times; bytes as characters: twice).
inline void check_growth(size_t now, size_t original, const char* what) {
  KDA_CHECK(now <= (size_t(1) << 16) + 256 * original, "tokenizer: ", what, " makes ", now,
            " bytes or more of a text of ", original);
}

}  // namespace kda::text
