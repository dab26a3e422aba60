// kernels/cpu/backend.cc — the CPU's row of the table. Bodies are declared in kernels/cpu/ops.h.
#include "kernels/backend.h"

#include <cstring>

#include "kernels/cpu/ops.h"

namespace kda {

namespace {
void copy(Context&, void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }
void upload(Context&, std::span<const Transfer> all) {
  for (const Transfer& t : all) std::memcpy(t.to, t.from.data, t.from.bytes);
}
}  // namespace

const Backend& cpu_backend() {
  static const Backend table{
      .name = "cpu",
      .activation = Dtype::f32,
      .unavailable = [] { return std::string(); },
      .open = [](Context&) {},
      .alloc = host_tensor,
      .copy = copy,
      .upload = upload,
      .record = nullptr,
      .matmul_workspace = cpu::matmul_workspace,
      .matvec_workspace = cpu::matvec_workspace,
      .attention_workspace = cpu::attention_workspace,
      .kda_prefill_workspace = cpu::kda_prefill_workspace,
      .kda_decode_workspace = cpu::kda_decode_workspace,
      .sample_workspace = nullptr,
      .embedding = cpu::embedding,
      .rms_norm = cpu::rms_norm,
      .add_rms_norm = cpu::add_rms_norm,
      .matmul = cpu::matmul,
      .matmul_relu2 = cpu::matmul_relu2,
      .matvec = cpu::matvec,
      .norm_matvec = cpu::norm_matvec,
      .norm_matvec_relu2 = cpu::norm_matvec_relu2,
      .matvec_add = cpu::matvec_add,
      .add_rows = cpu::add_rows,
      .add_bias = cpu::add_bias,
      .relu2 = cpu::relu2,
      .swiglu = cpu::swiglu,
      .rope = cpu::rope,
      .attention = cpu::attention,
      .conv_silu = cpu::conv_silu,
      .kda_prep = cpu::kda_prep,
      .kda_forward = cpu::kda_forward,
      .kda_prefill = cpu::kda_prefill,
      .kda_output = cpu::kda_output,
      .kda_decode = cpu::kda_decode,
      .sample = nullptr,         // runtime/sampler.h draws on the host
      .quantize_rows = nullptr,  // quantize_rows_i8 works in host memory
      .matmul_dx = cpu::matmul_dx,
      .matmul_dw = cpu::matmul_dw,
      .rms_norm_backward = cpu::rms_norm_backward,
      .add_bias_backward = cpu::add_bias_backward,
      .relu2_backward = cpu::relu2_backward,
      .swiglu_backward = cpu::swiglu_backward,
      .embedding_backward = cpu::embedding_backward,
      .rope_backward = cpu::rope_backward,
      .attention_train = cpu::attention_train,
      .attention_backward = cpu::attention_backward,
      .adamw = cpu::adamw,
      .sum_squares = cpu::sum_squares,
      .conv_silu_backward = cpu::conv_silu_backward,
      .kda_forward_keep = cpu::kda_forward_keep,
      .kda_backward = cpu::kda_backward,
      .kda_prep_backward = cpu::kda_prep_backward,
      .kda_output_backward = cpu::kda_output_backward,
      .logits_loss = cpu::logits_loss,
      .hidden_loss = cpu::hidden_loss,
      .top_k = cpu::top_k,
  };
  return table;
}

}  // namespace kda
