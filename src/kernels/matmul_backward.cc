#include "kernels/matmul_backward.h"

#include "kernels/kda_check.h"

namespace kda {

void matmul_dx(Context& ctx, const MatmulDx& a) {
  const char* op = "matmul_dx";
  KDA_CHECK(a.dx.shape.rank == 2 && a.dx.dim(1) > 0, op, ": dx must be [R,K] with K > 0, got ", a.dx.shape);
  KDA_CHECK(!a.segments.empty() && a.segments.size() <= 8, op, ": needs 1 to 8 matrices, got ", a.segments.size());
  const int64_t R = a.dx.dim(0), K = a.dx.dim(1);
  door::check(op, "dx", a.dx, {R, K});
  for (size_t i = 0; i < a.segments.size(); ++i) {
    const auto& [w, dy] = a.segments[i];
    KDA_CHECK(w.w.shape.rank == 2 && w.w.dim(1) == K, op, ": matrix ", i, " must be [N,", K, "], got ", w.w.shape);
    KDA_CHECK((w.w.dtype == Dtype::f32 || w.w.dtype == Dtype::bf16 || w.w.dtype == Dtype::f16) && !w.scale.data, op,
              ": matrix ", i, " must be f32, bf16 or f16 without scales, got ", name_of(w.w.dtype));
    const Shape want{R, w.w.dim(0)};
    KDA_CHECK(dy.dtype == Dtype::f32 && dy.shape == want, op, ": dy of matrix ", i, " must be f32 ", want, ", got ",
              name_of(dy.dtype), " ", dy.shape);
  }
  body(ctx, ctx.backend->matmul_dx, op)(ctx, a);
}

void matmul_dw(Context& ctx, const MatmulDw& a) {
  const char* op = "matmul_dw";
  KDA_CHECK(a.x.shape.rank == 2 && a.x.dim(1) > 0, op, ": x must be [R,K] with K > 0, got ", a.x.shape);
  KDA_CHECK(!a.segments.empty() && a.segments.size() <= 8, op, ": needs 1 to 8 matrices, got ", a.segments.size());
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  door::check(op, "x", a.x, {R, K});
  for (size_t i = 0; i < a.segments.size(); ++i) {
    const auto& [dy, dw] = a.segments[i];
    KDA_CHECK(dy.dtype == Dtype::f32 && dy.shape.rank == 2 && dy.dim(0) == R, op, ": dy of matrix ", i,
              " must be f32 [", R, ",N], got ", name_of(dy.dtype), " ", dy.shape);
    const Shape want{dy.dim(1), K};
    KDA_CHECK(dw.dtype == Dtype::f32 && dw.shape == want, op, ": dw of matrix ", i, " must be f32 ", want, ", got ",
              name_of(dw.dtype), " ", dw.shape);
  }
  body(ctx, ctx.backend->matmul_dw, op)(ctx, a);
}

}  // namespace kda
