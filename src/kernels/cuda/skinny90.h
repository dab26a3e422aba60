// kernels/cuda/skinny90.h — products for batches of generated tokens on sm_90a: 3 to 128 rows of x.
#pragma once
#include <span>

#include "kernels/matmul.h"

namespace kda::cuda {

inline constexpr int kSkinnyMinRows = 3, kSkinnyRows = 128, kSkinnyParts = 8;

enum class SkinnyFinish { write, relu2, add };  // y = p; y = max(p,0)^2; y += p (f32)

// Whether device, sizes and addresses suit: sm_90a code, K a multiple of 8 (of 16 where weights of 8 bits are among
// them), 16-byte addresses of x and w.
// x: the one shared, without data where each segment has its own.
bool skinny90_takes(const Context&, ConstView x, std::span<const MatmulSegment>);

// One launch for all segments, which have one K. With weights of 8 bits there may be more than kSkinnyRows rows: these
// take a launch for each so many. The bits of a row of y depend on that row of x, on the matrices'
// shapes and on the device, on nothing else. scratch: skinny90_scratch_bytes.
void skinny90(Context&, SkinnyFinish, ConstView x, std::span<const MatmulSegment>, void* scratch);
size_t skinny90_scratch_bytes(const Context&);

}  // namespace kda::cuda
