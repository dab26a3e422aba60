// kernels/cuda/tensor_map.cu — the driver's own function makes the maps, found at run time: nothing here links the
// driver.
#include "kernels/cuda/tensor_map.h"

namespace kda::cuda {

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder(Device& d) {
  if (!d.encode_tensor_map) {
    cudaDriverEntryPointQueryResult found{};
    KDA_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &d.encode_tensor_map, 12000, cudaEnableDefault,
                                              &found));
    KDA_CHECK(found == cudaDriverEntryPointSuccess && d.encode_tensor_map,
              "the driver has no cuTensorMapEncodeTiled: needs one for CUDA 12");
  }
  return reinterpret_cast<Encode>(d.encode_tensor_map);
}

// Its static shared memory says what it was compiled for: 4 bytes more for sm_90a.
__global__ void code_of_this_binary(int* to) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ int mark;
  if (threadIdx.x == 0) mark = *to;
  __syncthreads();
  *to = mark + int(threadIdx.x);
#endif
}

}  // namespace

CUtensorMap tensor_map(Device& d, const void* data, int64_t rows, int64_t columns, int64_t ld, int box_rows,
                       int element_bytes) {
  CUtensorMap map{};
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[1] = {cuuint64_t(ld * element_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(128 / element_bytes), cuuint32_t(box_rows)}, step[2] = {1, 1};
  const auto type = element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUresult r =
      encoder(d)(&map, type, 2, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  KDA_CHECK(r == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(r), " for [", rows, ",", columns, "]");
  return map;
}

bool has_sm90a_code(const Context& ctx) {
  Device& d = device_of(ctx);
  if (d.sm90a_code < 0) {
    cudaFuncAttributes code{};
    d.sm90a_code = d.properties.major == 9 && cudaFuncGetAttributes(&code, code_of_this_binary) == cudaSuccess &&
                   code.sharedSizeBytes > 0;
  }
  return d.sm90a_code;
}

}  // namespace kda::cuda
