#include "kernels/rope.h"

namespace kda {

void rope(Context& ctx, const Rope& a) {
  KDA_CHECK(a.x.shape.rank == 3 && a.x.dim(2) % 2 == 0, "rope: x must be [T,H,d] with d even, got ", a.x.shape);
  KDA_CHECK(a.position.shape == Shape{a.x.dim(0)} && a.position.dtype == Dtype::i32, "rope: position must be i32 [",
            a.x.dim(0), "], got ", name_of(a.position.dtype), " ", a.position.shape);
  KDA_CHECK(a.inv_freq.shape == Shape{a.x.dim(2) / 2} && a.inv_freq.dtype == Dtype::f32, "rope: inv_freq must be f32 [",
            a.x.dim(2) / 2, "], got ", name_of(a.inv_freq.dtype), " ", a.inv_freq.shape);
  body(ctx, ctx.backend->rope, "rope")(ctx, a);
}

}  // namespace kda
