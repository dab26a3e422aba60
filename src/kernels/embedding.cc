#include "kernels/embedding.h"

namespace kda {

void embedding(Context& ctx, const Embedding& a) {
  KDA_CHECK(a.table.shape.rank == 2, "embedding: table must be [vocabulary,D], got ", a.table.shape);
  KDA_CHECK(a.table.dtype == Dtype::f32 || a.table.dtype == Dtype::bf16 || a.table.dtype == Dtype::f16,
            "embedding: table must be f32, bf16 or f16, got ", name_of(a.table.dtype));
  KDA_CHECK(a.ids.shape.rank == 1 && a.ids.dtype == Dtype::i32, "embedding: ids must be i32 [T], got ",
            name_of(a.ids.dtype), " ", a.ids.shape);
  const Shape want{a.ids.dim(0), a.table.dim(1)};
  KDA_CHECK(a.y.shape == want, "embedding: y must be ", want, ", got ", a.y.shape);
  body(ctx, ctx.backend->embedding, "embedding")(ctx, a);
}

}  // namespace kda
