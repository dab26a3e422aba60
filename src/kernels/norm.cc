#include "kernels/norm.h"

#include <utility>

namespace kda {

void rms_norm(Context& ctx, const RmsNorm& a) {
  KDA_CHECK(a.x.shape.rank == 2, "rms_norm: x must be [R,D], got ", a.x.shape);
  const Dtype act = ctx.backend->activation;
  KDA_CHECK(a.x.dtype == Dtype::f32, "rms_norm: x must be f32, got ", name_of(a.x.dtype));
  KDA_CHECK(a.y.shape == a.x.shape && a.y.dtype == act, "rms_norm: y must be ", name_of(act), " ", a.x.shape, ", got ",
            name_of(a.y.dtype), " ", a.y.shape);
  KDA_CHECK(a.w.shape == Shape{a.x.dim(1)}, "rms_norm: w must be [", a.x.dim(1), "], got ", a.w.shape);
  KDA_CHECK(a.eps >= 0, "rms_norm: eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->rms_norm, "rms_norm")(ctx, a);
}

void add_rms_norm(Context& ctx, const AddRmsNorm& a) {
  constexpr const char* op = "add_rms_norm";
  const Dtype act = ctx.backend->activation;
  KDA_CHECK(a.x.shape.rank == 2 && a.x.dtype == Dtype::f32, op, ": x must be f32 [R,D], got ", name_of(a.x.dtype), " ",
            a.x.shape);
  for (const auto& [name, v] : {std::pair<const char*, ConstView>{"add", a.add}, {"y", a.y}})
    KDA_CHECK(v.shape == a.x.shape && v.dtype == act, op, ": ", name, " must be ", name_of(act), " ", a.x.shape,
              ", got ", name_of(v.dtype), " ", v.shape);
  KDA_CHECK(a.w.shape == Shape{a.x.dim(1)}, op, ": w must be [", a.x.dim(1), "], got ", a.w.shape);
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->add_rms_norm, op)(ctx, a);
}

}  // namespace kda
