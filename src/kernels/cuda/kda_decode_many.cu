// kernels/cuda/kda_decode_many.cu — launches kda_decode_many_kernel.
#include "kernels/cuda/kda_decode_many.h"

#include <algorithm>

#include "kernels/cuda/kda_decode_many.cuh"
#include "kernels/cuda/tensor_map.h"

namespace kda::cuda {

bool kda_decode_many_takes(const Context& ctx, const KdaDecodeArgs& a) {
  const int64_t heads = int64_t(a.N) * a.H;
  return a.K == kManyWidth && a.V == kManyWidth && heads >= device_of(ctx).sms && heads < int64_t(1) << 30 &&
         reinterpret_cast<uintptr_t>(a.state) % 16 == 0 && has_sm90a_code(ctx);
}

void kda_decode_many(Context& ctx, const KdaDecodeArgs& a) {
  allow_shared(kda_decode_many_kernel, kManyShared);
  const int64_t blocks = std::min<int64_t>(device_of(ctx).sms, int64_t(a.N) * a.H);
  launch_early("kda_decode", ctx, dim3(unsigned(blocks)), dim3(kManyThreads), kManyShared, kda_decode_many_kernel, a,
               device_of(ctx).tickets + kTickets - 2);
}

}  // namespace kda::cuda
