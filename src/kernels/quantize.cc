#include "kernels/quantize.h"

namespace kda {

void quantize_rows(Context& ctx, const QuantizeRows& a) {
  constexpr const char* op = "quantize_rows";
  KDA_CHECK(a.w.shape.rank == 2 && a.w.dtype == Dtype::bf16, op, ": w must be bf16 [N,K], got ", name_of(a.w.dtype),
            " ", a.w.shape);
  KDA_CHECK(a.q.shape == a.w.shape && (a.q.dtype == Dtype::i8 || a.q.dtype == Dtype::f8_e4m3), op,
            ": q must be i8 or f8_e4m3 ", a.w.shape, ", got ", name_of(a.q.dtype), " ", a.q.shape);
  KDA_CHECK(a.scale.shape == Shape{a.w.dim(0)} && a.scale.dtype == Dtype::f32, op, ": scale must be f32 [", a.w.dim(0),
            "], got ", name_of(a.scale.dtype), " ", a.scale.shape);
  body(ctx, ctx.backend->quantize_rows, op)(ctx, a);
}

}  // namespace kda
