#include "kernels/norm_backward.h"

#include "kernels/kda_check.h"

namespace kda {

void rms_norm_backward(Context& ctx, const RmsNormBackward& a) {
  const char* op = "rms_norm_backward";
  KDA_CHECK(a.x.shape.rank == 2, op, ": x must be [R,D], got ", a.x.shape);
  const int64_t D = a.x.dim(1);
  door::check(op, "x", a.x, a.x.shape);
  door::check(op, "w", a.w, {D});
  door::check(op, "dy", a.dy, a.x.shape);
  door::check(op, "dx", a.dx, a.x.shape);
  if (a.dw.data) door::check(op, "dw", a.dw, {D});
  KDA_CHECK(!door::overlap(a.dx, a.dy) && !door::overlap(a.dx, a.x), op, ": dx must have memory of its own");
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->rms_norm_backward, op)(ctx, a);
}

}  // namespace kda
