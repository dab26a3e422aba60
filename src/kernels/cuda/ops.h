// kernels/cuda/ops.h — the CUDA bodies, one for each line of the table. Arguments were checked by the doors.
#pragma once
#include "kernels/backend.h"

namespace kda::cuda {

// memory.cu
Tensor alloc(Dtype, Shape);
void copy(Context&, void* dst, const void* src, size_t bytes);
void upload(Context&, std::span<const Transfer>);

void embedding(Context&, const Embedding&);
void rms_norm(Context&, const RmsNorm&);
void add_rms_norm(Context&, const AddRmsNorm&);
void matmul(Context&, const Matmul&);
void matmul_relu2(Context&, const Matmul&);
size_t matmul_workspace(const Context&, int64_t R, int64_t K, int64_t N);
void matvec(Context&, const Matmul&);
void norm_matvec(Context&, const NormMatvec&);
void norm_matvec_relu2(Context&, const NormMatvec&);
void matvec_add(Context&, const MatvecAdd&);
size_t matvec_workspace(const Context&, int64_t R, int64_t K, int64_t N);
void add_rows(Context&, const AddRows&);
void add_bias(Context&, const AddBias&);
void relu2(Context&, const Relu2&);
void swiglu(Context&, const SwiGlu&);
void rope(Context&, const Rope&);
void attention(Context&, const Attention&);
size_t attention_workspace(const Context&, int64_t T, int64_t H, int64_t d, int64_t capacity);
void conv_silu(Context&, const Conv&);
void kda_output(Context&, const KdaOutput&);
void kda_decode(Context&, const KdaDecode&);
size_t kda_decode_workspace(const Context&, int64_t N, int64_t H, int64_t K, int64_t V);
void quantize_rows(Context&, const QuantizeRows&);
void sample(Context&, const Sample&);
void kda_prefill(Context&, const KdaPrefill&);
size_t kda_prefill_workspace(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V);

}  // namespace kda::cuda
