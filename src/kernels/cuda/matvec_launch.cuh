// kernels/cuda/matvec_launch.cuh — picks the instance of matvec_kernel and launches it.
#pragma once
#include "kernels/cuda/matvec_kernel.cuh"

namespace kda::cuda {

// Launches on `stream`; early: as a kernel that starts while the one before it drains (see device.h).
template <class... P>
void launch_on(cudaStream_t stream, bool early, int cluster, dim3 grid, dim3 block, size_t shared_bytes,
               void (*kernel)(P...), const char* op, P... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(cluster), 1, 1};
    ++config.numAttrs;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), op);
}

template <Weight kW, int kTiles>
void launch_matvec_as(cudaStream_t stream, bool early, const MatvecArgs& a, const char* op) {
  const auto kernel = matvec_kernel<kW, kTiles>;
  if (a.plan.shared_bytes > 40 << 10) allow_shared(kernel, size_t(a.plan.shared_bytes));
  const unsigned warps = unsigned(a.plan.warps + (a.plan.chunk ? 1 : 0));
  launch_on(stream, early, 1, dim3(unsigned(a.plan.row_blocks * a.plan.parts)), dim3(32 * warps),
            size_t(a.plan.shared_bytes), kernel, op, a);
}

template <Weight kW>
void launch_matvec_of(cudaStream_t stream, bool early, const MatvecArgs& a, const char* op) {
  if (a.R <= 8) return launch_matvec_as<kW, 1>(stream, early, a, op);
  if (a.R <= 16) return launch_matvec_as<kW, 2>(stream, early, a, op);
  if (a.R <= 32) return launch_matvec_as<kW, 4>(stream, early, a, op);
  return launch_matvec_as<kW, 8>(stream, early, a, op);
}

inline void launch_matvec(cudaStream_t stream, bool early, Weight weight, const MatvecArgs& a, const char* op) {
  switch (weight) {
    case Weight::bf16: return launch_matvec_of<Weight::bf16>(stream, early, a, op);
    case Weight::f8: return launch_matvec_of<Weight::f8>(stream, early, a, op);
    case Weight::i8: return launch_matvec_of<Weight::i8>(stream, early, a, op);
  }
}

}  // namespace kda::cuda
