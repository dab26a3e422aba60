// kernels/cuda/kda_prefill.h — how a pack is computed, for the op, its tests and its benchmark.
#pragma once
#include "kernels/kda.h"

namespace kda::cuda {

// Chunked: all chunks of a pass are prepared in parallel, then each sequence's state goes from chunk to chunk; with
// segments > 1 each sequence of a pass is cut in so many parts that do this in parallel, twice.
// Otherwise token by token.
struct PrefillPlan {
  bool chunked = false;
  int64_t pass_chunks = 0;  // chunk numbers in one pass: what the workspace holds
  int segments = 1;
  int warps = 4;  // in a block of the chain: 16 rows of a state each, 4 or (V = 128) 8
};

// sms: multiprocessors; shared_bytes: that a block may ask for; longest: tokens of the longest sequence.
PrefillPlan plan_prefill(int sms, int64_t shared_bytes, int64_t T, int64_t N, int64_t longest, int64_t H, int64_t K,
                         int64_t V);
size_t prefill_bytes(const PrefillPlan&, int64_t N, int64_t H, int64_t K, int64_t V);
void kda_prefill_as(Context&, const KdaPrefill&, const PrefillPlan&);

}  // namespace kda::cuda
