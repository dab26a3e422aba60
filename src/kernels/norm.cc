#include "kernels/norm.h"

namespace kda {

void rms_norm(Context& ctx, const RmsNorm& a) {
  KDA_CHECK(a.x.shape.rank == 2, "rms_norm: x must be [R,D], got ", a.x.shape);
  KDA_CHECK(a.y.shape == a.x.shape && a.y.dtype == a.x.dtype, "rms_norm: y must be ", name_of(a.x.dtype), " ",
            a.x.shape, " as x is, got ", name_of(a.y.dtype), " ", a.y.shape);
  KDA_CHECK(a.w.shape == Shape{a.x.dim(1)}, "rms_norm: w must be [", a.x.dim(1), "], got ", a.w.shape);
  KDA_CHECK(a.eps >= 0, "rms_norm: eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->rms_norm, "rms_norm")(ctx, a);
}

}  // namespace kda
