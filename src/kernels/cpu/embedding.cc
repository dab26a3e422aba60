#include "kernels/embedding.h"

#include <cstring>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

namespace kda::cpu {

namespace {
template <class E>
void gather(Context& ctx, const Embedding& a) {
  const E* table = a.table.as<E>();
  const int32_t* ids = a.ids.as<int32_t>();
  float* y = a.y.as<float>();
  const int64_t D = a.table.dim(1);
  in_pieces(*ctx.pool, a.ids.dim(0), D, [=](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      const E* row = table + int64_t(ids[t]) * D;
      if constexpr (std::is_same_v<E, float>) {
        std::memcpy(y + t * D, row, size_t(D) * sizeof(float));
      } else {
        for (int64_t d = 0; d < D; ++d) y[t * D + d] = float(row[d]);
      }
    }
  });
}
}  // namespace

void embedding(Context& ctx, const Embedding& a) {
  if (a.table.dtype == Dtype::bf16) return gather<bf16>(ctx, a);
  if (a.table.dtype == Dtype::f16) return gather<f16>(ctx, a);
  gather<float>(ctx, a);
}

}  // namespace kda::cpu
