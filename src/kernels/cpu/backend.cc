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
      .embedding = nullptr,
      .rms_norm = nullptr,
      .matmul = nullptr,
      .matvec = nullptr,
      .add_rows = nullptr,
      .add_bias = nullptr,
      .relu2 = nullptr,
      .swiglu = nullptr,
      .rope = nullptr,
      .attention = nullptr,
      .conv_silu = nullptr,
      .kda_prep = nullptr,
      .kda_forward = nullptr,
      .kda_output = nullptr,
      .kda_decode = nullptr,
      .token_loss = nullptr,
  };
  return table;
}

}  // namespace kda
