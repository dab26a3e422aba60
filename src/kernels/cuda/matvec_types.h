// kernels/cuda/matvec_types.h — what the kernels of mat-vecs call things.
#pragma once
#include <cstdint>

#include "base/dtype.h"

namespace kda::cuda {

enum class Weight : uint8_t { bf16, f8, i8 };
inline Weight weight_of(Dtype d) {
  return d == Dtype::bf16 ? Weight::bf16 : d == Dtype::f8_e4m3 ? Weight::f8 : Weight::i8;
}
enum class Finish : uint8_t { write, relu2, add };  // y = v; y = max(v, 0)^2; y += v

inline constexpr int kMaxSegments = 8;  // matrices of a launch

}  // namespace kda::cuda
