// kernels/cpu/ops.h — the CPU bodies, one for each line of the table. Arguments were checked by the doors.
#pragma once
#include "kernels/backend.h"

namespace kda::cpu {

size_t matmul_workspace(const Context&, int64_t R, int64_t K, int64_t N);
size_t matvec_workspace(const Context&, int64_t R, int64_t K, int64_t N);
size_t attention_workspace(const Context&, int64_t T, int64_t H, int64_t d, int64_t capacity);
size_t kda_prefill_workspace(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V);
size_t kda_decode_workspace(const Context&, int64_t N, int64_t H, int64_t K, int64_t V);
void embedding(Context&, const Embedding&);
void rms_norm(Context&, const RmsNorm&);
void add_rms_norm(Context&, const AddRmsNorm&);
void matmul(Context&, const Matmul&);
void matmul_relu2(Context&, const Matmul&);
void matvec(Context&, const Matmul&);
void norm_matvec(Context&, const NormMatvec&);
void norm_matvec_relu2(Context&, const NormMatvec&);
void matvec_add(Context&, const MatvecAdd&);
void add_rows(Context&, const AddRows&);
void add_bias(Context&, const AddBias&);
void relu2(Context&, const Relu2&);
void swiglu(Context&, const SwiGlu&);
void rope(Context&, const Rope&);
void attention(Context&, const Attention&);
void conv_silu(Context&, const Conv&);
void kda_prep(Context&, const KdaPrep&);
void kda_forward(Context&, const KdaForward&);
void kda_prefill(Context&, const KdaPrefill&);
void kda_output(Context&, const KdaOutput&);
void kda_decode(Context&, const KdaDecode&);
void logits_loss(Context&, const LogitsLoss&);
void hidden_loss(Context&, const HiddenLoss&);
void top_k(Context&, const TopK&);
void matmul_dx(Context&, const MatmulDx&);
void matmul_dw(Context&, const MatmulDw&);
void rms_norm_backward(Context&, const RmsNormBackward&);
void add_bias_backward(Context&, const AddBiasBackward&);
void relu2_backward(Context&, const Relu2Backward&);
void swiglu_backward(Context&, const SwiGluBackward&);
void embedding_backward(Context&, const EmbeddingBackward&);
void rope_backward(Context&, const Rope&);
void attention_train(Context&, const AttentionTrain&);
void attention_backward(Context&, const AttentionBackward&);
void adamw(Context&, const AdamW&);
void sum_squares(Context&, const SumSquares&);
void conv_silu_backward(Context&, const ConvBackward&);
void kda_forward_keep(Context&, const KdaForwardKeep&);
void kda_backward(Context&, const KdaBackward&);
void kda_prep_backward(Context&, const KdaPrepBackward&);
void kda_output_backward(Context&, const KdaOutputBackward&);

}  // namespace kda::cpu
