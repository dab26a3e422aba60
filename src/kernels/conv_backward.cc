#include "kernels/conv_backward.h"

#include "kernels/conv.h"
#include "kernels/kda_check.h"

namespace kda {

void conv_silu_backward(Context& ctx, const ConvBackward& a) {
  constexpr const char* op = "conv_silu_backward";
  KDA_CHECK(a.x.shape.rank == 2, op, ": x must be [T,C], got ", a.x.shape);
  const int64_t T = a.x.dim(0), C = a.x.dim(1);
  door::check(op, "x", a.x, {T, C});
  door::check(op, "w", a.w, {C, kConvTaps});
  door::check(op, "dy", a.dy, {T, C});
  door::check(op, "dx", a.dx, {T, C});
  if (a.dw.data) door::check(op, "dw", a.dw, {C, kConvTaps});
  KDA_CHECK(!door::overlap(a.x, a.dx), op, ": dx may not be x's memory");
  KDA_CHECK(!door::overlap(a.dy, a.dx), op, ": dx may not be dy's memory");
  door::check_packing(op, a.packing, T);
  body(ctx, ctx.backend->conv_silu_backward, op)(ctx, a);
}

}  // namespace kda
