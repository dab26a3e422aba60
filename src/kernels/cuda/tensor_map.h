// kernels/cuda/tensor_map.h — host side of sm_90a's copy engine: how a matrix is cut into boxes.
#pragma once
#include <cuda.h>

#include "kernels/cuda/device.h"

namespace kda::cuda {

// A matrix [rows,columns] of bf16, or of elements of one byte, rows ld elements apart (these and the address multiples
// of 16 bytes), read or written by boxes of `box_rows` rows of 128 bytes; what lies outside reads as zeros and is not
// written.
CUtensorMap tensor_map(Device&, const void* data, int64_t rows, int64_t columns, int64_t ld, int box_rows,
                       int element_bytes = 2);

// Whether this binary has machine code for sm_90a and the device runs it: a build with PTX of compute_80 alone has
// empty bodies in its place.
bool has_sm90a_code(const Context&);

}  // namespace kda::cuda
