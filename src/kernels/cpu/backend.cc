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
      .conv_silu = cpu::conv_silu,
      .kda_prep = cpu::kda_prep,
      .kda_forward = cpu::kda_forward,
      .kda_output = cpu::kda_output,
      .kda_decode = cpu::kda_decode,
  };
  return table;
}

}  // namespace kda
