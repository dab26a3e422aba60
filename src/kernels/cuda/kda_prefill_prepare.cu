// All chunks of a pass at once, one block for each chunk and head.
#include "kernels/cuda/kda_prefill_prepare.cuh"

#include "kernels/cuda/device.h"

namespace kda::cuda::prefill {
namespace {

template <int K>
__global__ void __launch_bounds__(kThreads, 2) prepare_kernel(const Args a) {
  extern __shared__ __align__(1024) char shared[];
  const int64_t slot = a.from + blockIdx.x;
  const int h = int(blockIdx.y), n = sequence_of(a, slot);
  const int64_t chunk = slot - first_slot(a.start[n], n), token0 = a.start[n] + chunk * kChunk;
  if (token0 >= a.start[n + 1]) return;
  const int count = int(a.start[n + 1] - token0 < kChunk ? a.start[n + 1] - token0 : kChunk);
  prepare_chunk<K>(a, shared, token0, count, h, a.records + (int64_t(blockIdx.x) * a.H + h) * Record<K>::bytes(a.V));
}

}  // namespace

int64_t prepare_shared_bytes(int64_t K) { return K == 128 ? Layout<128>::bytes : Layout<64>::bytes; }

template <int K>
void prepare_chunks(const Args& a, cudaStream_t stream) {
  constexpr int bytes = Layout<K>::bytes;
  allow_shared(prepare_kernel<K>, bytes);
  prepare_kernel<K><<<dim3(unsigned(a.to - a.from), unsigned(a.H)), kThreads, bytes, stream>>>(a);
  check_launch("kda_prefill: chunks");
}
template void prepare_chunks<64>(const Args&, cudaStream_t);
template void prepare_chunks<128>(const Args&, cudaStream_t);

}  // namespace kda::cuda::prefill
