// kernels/cuda/attention.cu — which kernel serves which call of kernels/attention.h.
//
// Heads of 64 or 128 take the tensor cores. Where no sequence has more than one new token, its keys are read by many
// blocks beside each other, or by one block a key head where there are enough of these or the scratch would be large;
// both give the same bits, and the same as the kernel for prompts. The launches depend on sizes known to the host, never
// on how long the sequences are by now.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"

namespace kda::cuda {

namespace {
constexpr size_t kMostScratch = 128 << 20;
constexpr int64_t kShortCapacity = 4096;  // up to here one block of the grid may walk all keys of a head
constexpr int kBlocksOfSm = 8;  // for single tokens: four times what an SM holds, so that uneven ones even out
}  // namespace

size_t attention_workspace(const Context&, int64_t T, int64_t H, int64_t d, int64_t capacity) {
  return attention_tiled(d) ? std::min(attention_split_bytes(T, H, d, capacity), kMostScratch) : 0;
}

void attention(Context& ctx, const Attention& a) {
  const int64_t H = a.q.dim(1), d = a.q.dim(2), N = a.packing.N(), longest = a.packing.longest();
  if (a.packing.T() == 0) return;
  KDA_CHECK(d <= kAttentionGeneralWidth, "attention: head dim ", d, ", CUDA takes up to ", kAttentionGeneralWidth);
  KDA_CHECK(N <= 65535 && H <= 65535, "attention: ", N, " sequences of ", H, " heads, CUDA takes up to 65535 of each");
  const AttentionCall call{.q = bf16_of(a.q),
                           .k = bf16_of(a.k),
                           .v = bf16_of(a.v),
                           .k_cache = bf16_of(a.k_cache),
                           .v_cache = bf16_of(a.v_cache),
                           .o = bf16_of(a.o),
                           .slot = a.slot,
                           .past = a.past,
                           .start = a.packing.start,
                           .capacity = a.k_cache.dim(1),
                           .H = int32_t(H),
                           .G = int32_t(a.k.dim(1)),
                           .d = int32_t(d),
                           .N = int32_t(N),
                           .longest = int32_t(longest),
                           .splits = int32_t(ceil_div(a.k_cache.dim(1), kAttentionSplit)),
                           .scale_log2 = float(M_LOG2E / std::sqrt(double(d)))};
  if (attention_tiled(d) && longest == 1) {
    const size_t bytes = attention_split_bytes(N, H, d, call.capacity);
    const bool enough = call.splits == 1 || (N * call.G >= 2 * device_of(ctx).sms && call.capacity <= kShortCapacity);
    void* scratch = !enough && bytes <= kMostScratch ? workspace(ctx, bytes, "attention") : nullptr;
    return attention_single(ctx, call, scratch, kBlocksOfSm * device_of(ctx).sms);
  }
  attention_append(ctx, call);
  attention_tiled(d) ? attention_prompt(ctx, call) : attention_general(ctx, call);
}

}  // namespace kda::cuda
