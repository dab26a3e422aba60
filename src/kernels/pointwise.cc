#include "kernels/pointwise.h"

namespace kda {

namespace {
void same(const char* op, const char* name, const ConstView& x, const ConstView& y) {
  KDA_CHECK(x.shape == y.shape && x.dtype == y.dtype, op, ": ", name, " must be ", name_of(y.dtype), " ", y.shape,
            " as y is, got ", name_of(x.dtype), " ", x.shape);
}
void rows(const char* op, const ConstView& y) {
  KDA_CHECK(y.shape.rank == 2, op, ": y must have two dimensions, got ", y.shape);
}
}  // namespace

void add_rows(Context& ctx, const AddRows& a) {
  rows("add_rows", a.y);
  KDA_CHECK(a.y.dtype == Dtype::f32 || a.y.dtype == ctx.backend->activation, "add_rows: y must be f32, got ",
            name_of(a.y.dtype));
  KDA_CHECK(a.x.shape == a.y.shape && (a.x.dtype == a.y.dtype || a.x.dtype == ctx.backend->activation),
            "add_rows: x must be ", name_of(a.y.dtype), " ", a.y.shape, " as y is, got ", name_of(a.x.dtype), " ",
            a.x.shape);
  body(ctx, ctx.backend->add_rows, "add_rows")(ctx, a);
}

void add_bias(Context& ctx, const AddBias& a) {
  rows("add_bias", a.y);
  KDA_CHECK(a.bias.shape == Shape{a.y.dim(1)}, "add_bias: bias must be [", a.y.dim(1), "], got ", a.bias.shape);
  body(ctx, ctx.backend->add_bias, "add_bias")(ctx, a);
}

void relu2(Context& ctx, const Relu2& a) {
  rows("relu2", a.y);
  same("relu2", "x", a.x, a.y);
  body(ctx, ctx.backend->relu2, "relu2")(ctx, a);
}

void swiglu(Context& ctx, const SwiGlu& a) {
  rows("swiglu", a.y);
  same("swiglu", "gate", a.gate, a.y);
  same("swiglu", "up", a.up, a.y);
  body(ctx, ctx.backend->swiglu, "swiglu")(ctx, a);
}

}  // namespace kda
