#include "kernels/optimizer.h"

#include "kernels/kda_check.h"

namespace kda {

void adamw(Context& ctx, const AdamW& a) {
  const char* op = "adamw";
  door::check(op, "p", a.p, a.p.shape);
  const auto same = [&](const char* name, const ConstView& v, Dtype d) {
    KDA_CHECK(v.size() == a.p.size() && v.dtype == d && (v.data || !v.size()), op, ": ", name, " must be ", name_of(d),
              " with the ", a.p.size(), " elements of p, got ", name_of(v.dtype), " ", v.shape);
  };
  same("g", a.g, Dtype::f32);
  same("m", a.m, Dtype::f32);
  same("v", a.v, Dtype::f32);
  if (a.working.data) same("working", a.working, Dtype::bf16);
  KDA_CHECK(a.step >= 1, op, ": step counts from 1, got ", a.step);
  KDA_CHECK(a.beta1 >= 0 && a.beta1 < 1 && a.beta2 >= 0 && a.beta2 < 1, op, ": betas must lie in [0,1), got ", a.beta1,
            " and ", a.beta2);
  body(ctx, ctx.backend->adamw, op)(ctx, a);
}

void sum_squares(Context& ctx, const SumSquares& a) {
  const char* op = "sum_squares";
  door::check(op, "x", a.x, a.x.shape);
  door::check(op, "sum", a.sum, {1});
  body(ctx, ctx.backend->sum_squares, op)(ctx, a);
}

}  // namespace kda
