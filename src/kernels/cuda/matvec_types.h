// kernels/cuda/matvec_types.h — what the kernels of mat-vecs call things.
#pragma once

namespace kda::cuda {

enum class Weight { bf16, f8, i8 };
enum class Finish { write, relu2, add };  // y = v; y = max(v, 0)^2; y += v

inline constexpr int kMaxSegments = 8;  // matrices of a launch

}  // namespace kda::cuda
