// kernels/cuda/attention_kernels.h — the kernels behind kernels/attention.h, and the one order in which all of them
// add.
//
// A row (a token's query head) walks the keys in blocks of 64 counted from position 0, with a running maximum, and
// begins anew every 128 keys; those splits are then merged in rising order. The tensor-core kernels keep to this
// whatever shares their tile: one for prompts, where a warp owns rows, and one for single tokens, where four warps
// share a row tile's keys and channels and blocks of the grid its splits. Their rows agree in every bit, so a row
// depends on its position and on nothing else. The general kernel, for other widths, has an order of its own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"

namespace kda::cuda {

constexpr int kAttentionBlock = 64;   // keys
constexpr int kAttentionSplit = 128;  // keys

struct AttentionCall {
  const __nv_bfloat16 *q, *k, *v;      // [T,H,d] [T,G,d] [T,G,d]
  __nv_bfloat16 *k_cache, *v_cache;    // [slots,capacity,G,d]
  __nv_bfloat16* o;                    // [T,H,d]
  const int32_t *slot, *past, *start;  // [N] [N] [N+1]
  int64_t capacity;
  int32_t H, G, d, N;
  int32_t longest;   // new tokens of one sequence, at most
  int32_t splits;    // of the cache's capacity
  float scale_log2;  // d^-1/2 log2 e
};

// Whether the tensor-core kernels take heads of this width.
constexpr bool attention_tiled(int64_t d) { return d == 64 || d == 128; }

// Scratch for the splits of `tokens` single tokens.
size_t attention_split_bytes(int64_t tokens, int64_t H, int64_t d, int64_t capacity);

// Copies the new keys and values behind the old ones.
void attention_append(Context&, const AttentionCall&);
// Any number of new tokens, appended before; d 64 or 128.
void attention_prompt(Context&, const AttentionCall&);
// At most one new token a sequence, appended here; d 64 or 128. With scratch, of attention_split_bytes(N, ..), the
// splits of a sequence run beside each other, without it one after another. `blocks` is about how many the device
// holds.
void attention_single(Context&, const AttentionCall&, void* scratch, int blocks);
// Any number of new tokens, appended before; any d up to kAttentionGeneralWidth.
void attention_general(Context&, const AttentionCall&);
constexpr int kAttentionGeneralWidth = 1024;

}  // namespace kda::cuda
