#include "kernels/matmul.h"

namespace kda {

namespace {
bool is_weight(const Context& ctx, Dtype d) {
  if (d == Dtype::bf16 || d == Dtype::i8) return true;
  const bool cpu = ctx.backend->activation == Dtype::f32;
  return cpu ? d == Dtype::f32 || d == Dtype::f16 : d == Dtype::f8_e4m3;
}

void check(const Context& ctx, const Matmul& a, const char* op) {
  const Dtype act = ctx.backend->activation;
  KDA_CHECK(a.x.shape.rank == 2 && a.x.dtype == act, op, ": x must be ", name_of(act), " [R,K], got ",
            name_of(a.x.dtype), " ", a.x.shape);
  KDA_CHECK(!a.segments.empty() && a.segments.size() <= 8, op, ": needs 1 to 8 matrices, got ", a.segments.size());
  const int64_t R = a.x.dim(0);
  for (size_t i = 0; i < a.segments.size(); ++i) {
    const auto& [w, y, own] = a.segments[i];
    const ConstView x = own.data ? own : a.x;
    KDA_CHECK(x.shape.rank == 2 && x.dim(0) == R && x.dim(1) > 0 && x.dtype == act, op, ": x of matrix ", i,
              " must be ", name_of(act), " [", R, ",K] with K > 0, got ", name_of(x.dtype), " ", x.shape);
    const int64_t K = x.dim(1);
    KDA_CHECK(w.w.shape.rank == 2 && w.w.dim(1) == K, op, ": matrix ", i, " must be [N,", K, "], got ", w.w.shape);
    KDA_CHECK(is_weight(ctx, w.w.dtype), op, ": matrix ", i, " must be ",
              ctx.backend->activation == Dtype::f32 ? "f32, bf16, f16 or i8" : "bf16, i8 or f8_e4m3", ", got ",
              name_of(w.w.dtype));
    const int64_t N = w.w.dim(0);
    if (w.w.dtype == Dtype::i8 || w.w.dtype == Dtype::f8_e4m3) {
      KDA_CHECK(w.scale.data && w.scale.dtype == Dtype::f32 && w.scale.shape == Shape{N}, op, ": matrix ", i, " is ",
                name_of(w.w.dtype), " and needs f32 scales [", N, "], got ", name_of(w.scale.dtype), " ", w.scale.shape);
    } else {
      KDA_CHECK(!w.scale.data, op, ": matrix ", i, " is ", name_of(w.w.dtype), " and takes no scales");
    }
    KDA_CHECK((y.dtype == act || y.dtype == Dtype::f32) && y.shape == Shape({R, N}), op, ": y of matrix ", i,
              " must be f32 [", R, ",", N, "], got ", name_of(y.dtype), " ", y.shape);
  }
}

void check_scratch(const Context& ctx, const View& h, const Shape& want, const char* op) {
  KDA_CHECK(h.shape == want && h.dtype == ctx.backend->activation, op, ": h must be ",
            name_of(ctx.backend->activation), " ", want, ", got ", name_of(h.dtype), " ", h.shape);
}

void check(const Context& ctx, const NormMatvec& a, const char* op) {
  KDA_CHECK(a.x.shape.rank == 2 && a.x.dtype == Dtype::f32, op, ": x must be f32 [R,K], got ", name_of(a.x.dtype), " ",
            a.x.shape);
  KDA_CHECK(a.norm.shape == Shape{a.x.dim(1)} && a.norm.dtype == Dtype::f32, op, ": norm must be f32 [", a.x.dim(1),
            "], got ", name_of(a.norm.dtype), " ", a.norm.shape);
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  check_scratch(ctx, a.h, a.x.shape, op);
  for (const MatmulSegment& s : a.segments) KDA_CHECK(!s.x.data, op, ": its matrices share their input");
  check(ctx, Matmul{.x = a.h, .segments = a.segments}, op);
}
}  // namespace

void matmul(Context& ctx, const Matmul& a) {
  for (const MatmulSegment& s : a.segments) KDA_CHECK(!s.x.data, "matmul: its matrices share their input");
  check(ctx, a, "matmul");
  body(ctx, ctx.backend->matmul, "matmul")(ctx, a);
}

void matmul_relu2(Context& ctx, const Matmul& a) {
  for (const MatmulSegment& s : a.segments) KDA_CHECK(!s.x.data, "matmul_relu2: its matrices share their input");
  check(ctx, a, "matmul_relu2");
  body(ctx, ctx.backend->matmul_relu2, "matmul_relu2")(ctx, a);
}

void matvec(Context& ctx, const Matmul& a) {
  check(ctx, a, "matvec");
  body(ctx, ctx.backend->matvec, "matvec")(ctx, a);
}

void norm_matvec(Context& ctx, const NormMatvec& a) {
  check(ctx, a, "norm_matvec");
  body(ctx, ctx.backend->norm_matvec, "norm_matvec")(ctx, a);
}

void norm_matvec_relu2(Context& ctx, const NormMatvec& a) {
  check(ctx, a, "norm_matvec_relu2");
  body(ctx, ctx.backend->norm_matvec_relu2, "norm_matvec_relu2")(ctx, a);
}

void matvec_add(Context& ctx, const MatvecAdd& a) {
  const MatmulSegment segment{a.w, a.y};
  check(ctx, Matmul{.x = a.x, .segments = {&segment, 1}}, "matvec_add");
  KDA_CHECK(a.y.dtype == Dtype::f32, "matvec_add: y must be f32, got ", name_of(a.y.dtype));
  check_scratch(ctx, a.h, a.y.shape, "matvec_add");
  body(ctx, ctx.backend->matvec_add, "matvec_add")(ctx, a);
}

size_t matmul_workspace_bytes(const Context& ctx, int64_t R, int64_t K, int64_t N) {
  return ctx.backend->matmul_workspace(ctx, R, K, N);
}

size_t matvec_workspace_bytes(const Context& ctx, int64_t R, int64_t K, int64_t N) {
  return ctx.backend->matvec_workspace(ctx, R, K, N);
}

}  // namespace kda
