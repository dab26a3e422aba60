#include "kernels/rope.h"

#include "kernels/pointwise_backward.h"

namespace kda {

namespace {
void check(const char* op, const Rope& a) {
  KDA_CHECK(a.x.shape.rank == 3 && a.x.dim(2) % 2 == 0, op, ": x must be [T,H,d] with d even, got ", a.x.shape);
  KDA_CHECK(a.position.shape == Shape{a.x.dim(0)} && a.position.dtype == Dtype::i32, op, ": position must be i32 [",
            a.x.dim(0), "], got ", name_of(a.position.dtype), " ", a.position.shape);
  KDA_CHECK(a.inv_freq.shape == Shape{a.x.dim(2) / 2} && a.inv_freq.dtype == Dtype::f32, op, ": inv_freq must be f32 [",
            a.x.dim(2) / 2, "], got ", name_of(a.inv_freq.dtype), " ", a.inv_freq.shape);
}
}  // namespace

void rope(Context& ctx, const Rope& a) {
  check("rope", a);
  body(ctx, ctx.backend->rope, "rope")(ctx, a);
}

void rope_backward(Context& ctx, const Rope& a) {
  check("rope_backward", a);
  body(ctx, ctx.backend->rope_backward, "rope_backward")(ctx, a);
}

}  // namespace kda
