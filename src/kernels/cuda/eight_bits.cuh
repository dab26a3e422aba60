// kernels/cuda/eight_bits.cuh — weights of 8 bits as bf16, which holds each of them exactly.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/matvec_types.h"

namespace kda::cuda {

// Bytes 2i and 2i+1 of a word (i = 0, 1) as two bf16.
template <Weight kW>
__device__ inline uint32_t widen(uint32_t word, int i) {
  if constexpr (kW == Weight::f8) {
    // As 16 bits with the sign in front (selectors from 8 on repeat a byte's sign); moved by four, sign, exponent and
    // mantissa are those of bf16, but for 2^-120.
    uint32_t two;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(two) : "r"(word), "r"(i ? 0xb3a2 : 0x9180));
    return fma2(two << 4 & 0x87f087f0u, 0x7b807b80u, 0x80008000u);
  } else {
    // Behind 0x43: 128 + the low seven bits, less 128 or 256.
    const uint32_t v = __byte_perm(word, 0x43434343u, i ? 0x4342 : 0x4140);
    return fma2(v & 0xff80ff80u, 0xbf80bf80u, v & 0xff7fff7fu);
  }
}

}  // namespace kda::cuda
