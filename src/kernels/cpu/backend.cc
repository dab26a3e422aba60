// kernels/cpu/backend.cc — the CPU's row of the table. Bodies are declared in kernels/cpu/ops.h.
#include "kernels/backend.h"

#include <cstring>

#include "kernels/cpu/ops.h"

namespace kda {

const Backend& cpu_backend() {
  static const Backend table{
      .name = "cpu",
      .alloc = host_tensor,
      .copy = [](Context&, void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); },
      .embedding = cpu::embedding,
      .rms_norm = cpu::rms_norm,
      .matmul = cpu::matmul,
      .matvec = cpu::matvec,
      .add_rows = cpu::add_rows,
      .add_bias = cpu::add_bias,
      .relu2 = cpu::relu2,
      .swiglu = cpu::swiglu,
      .rope = cpu::rope,
      .attention = cpu::attention,
      .conv_silu = nullptr,
      .kda_prep = nullptr,
      .kda_forward = nullptr,
      .kda_output = nullptr,
      .kda_decode = nullptr,
      .token_loss = cpu::token_loss,
  };
  return table;
}

}  // namespace kda
