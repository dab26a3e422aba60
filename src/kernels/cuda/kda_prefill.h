// kernels/cuda/kda_prefill.h — how a pack is computed, for the op, its tests and its benchmark.
#pragma once
#include "kernels/kda.h"

namespace kda::cuda {

// Flowing (ring > 0): some blocks take the states from chunk to chunk right behind others that prepare the chunks.
// Chunked otherwise: all chunks of a pass are prepared in parallel, then each sequence's state goes from chunk to
// chunk; with segments > 1 each sequence of a pass is cut in so many parts that do this in parallel, twice. Otherwise
// token by token.
struct PrefillPlan {
  bool chunked = false;
  int64_t pass_chunks = 0;  // chunk numbers in one pass: what the workspace holds
  int segments = 1;
  int warps = 4;     // in a block of the chain: 16 rows of a state each, 4 or (V = 128) 8
  int64_t ring = 0;  // chunk numbers that are under way at a time
  int alone = 0;     // chains that share their multiprocessor with nothing
};

// What a plan needs to know of a device. flows: that its code for sm_90a is there, and that two blocks of it share a
// multiprocessor.
struct PrefillDevice {
  int sms = 0;
  int64_t shared_bytes = 0;  // that a block may ask for
  bool flows = false;
};
PrefillDevice prefill_device(const Context&);

// longest: tokens of the longest sequence.
PrefillPlan plan_prefill(const PrefillDevice&, int64_t T, int64_t N, int64_t longest, int64_t H, int64_t K, int64_t V);
size_t prefill_bytes(const PrefillPlan&, int64_t N, int64_t H, int64_t K, int64_t V);
void kda_prefill_as(Context&, const KdaPrefill&, const PrefillPlan&);

}  // namespace kda::cuda
