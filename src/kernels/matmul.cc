#include "kernels/matmul.h"

namespace kda {

namespace {
bool is_weight(Dtype d) { return d == Dtype::f32 || d == Dtype::bf16 || d == Dtype::f16 || d == Dtype::i8; }

void check(const Matmul& a, const char* op) {
  KDA_CHECK(a.x.shape.rank == 2 && a.x.dtype == Dtype::f32, op, ": x must be f32 [R,K], got ", name_of(a.x.dtype), " ",
            a.x.shape);
  KDA_CHECK(!a.segments.empty() && a.segments.size() <= 8, op, ": needs 1 to 8 matrices, got ", a.segments.size());
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  KDA_CHECK(K > 0, op, ": x must have at least one column, got ", a.x.shape);
  for (size_t i = 0; i < a.segments.size(); ++i) {
    const auto& [w, y] = a.segments[i];
    KDA_CHECK(w.w.shape.rank == 2 && w.w.dim(1) == K, op, ": matrix ", i, " must be [N,", K, "], got ", w.w.shape);
    KDA_CHECK(is_weight(w.w.dtype), op, ": matrix ", i, " must be f32, bf16, f16 or i8, got ", name_of(w.w.dtype));
    const int64_t N = w.w.dim(0);
    if (w.w.dtype == Dtype::i8) {
      KDA_CHECK(w.scale.data && w.scale.dtype == Dtype::f32 && w.scale.shape == Shape{N}, op, ": matrix ", i,
                " is i8 and needs f32 scales [", N, "], got ", name_of(w.scale.dtype), " ", w.scale.shape);
    } else {
      KDA_CHECK(!w.scale.data, op, ": matrix ", i, " is ", name_of(w.w.dtype), " and takes no scales");
    }
    KDA_CHECK(y.dtype == Dtype::f32 && y.shape == Shape({R, N}), op, ": y of matrix ", i, " must be f32 [", R, ",", N,
              "], got ", name_of(y.dtype), " ", y.shape);
  }
}
}  // namespace

void matmul(Context& ctx, const Matmul& a) {
  check(a, "matmul");
  body(ctx, ctx.backend->matmul, "matmul")(ctx, a);
}

void matvec(Context& ctx, const Matmul& a) {
  check(a, "matvec");
  body(ctx, ctx.backend->matvec, "matvec")(ctx, a);
}

}  // namespace kda
