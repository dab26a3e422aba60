#include "kernels/pointwise_backward.h"

#include "kernels/kda_check.h"

namespace kda {

namespace {
void rows(const char* op, const ConstView& dy) {
  KDA_CHECK(dy.shape.rank == 2, op, ": dy must have two dimensions, got ", dy.shape);
  door::check(op, "dy", dy, dy.shape);
}
}  // namespace

void add_bias_backward(Context& ctx, const AddBiasBackward& a) {
  const char* op = "add_bias_backward";
  rows(op, a.dy);
  door::check(op, "dbias", a.dbias, {a.dy.dim(1)});
  body(ctx, ctx.backend->add_bias_backward, op)(ctx, a);
}

void relu2_backward(Context& ctx, const Relu2Backward& a) {
  const char* op = "relu2_backward";
  rows(op, a.dy);
  door::check(op, "x", a.x, a.dy.shape);
  door::check(op, "dx", a.dx, a.dy.shape);
  body(ctx, ctx.backend->relu2_backward, op)(ctx, a);
}

void swiglu_backward(Context& ctx, const SwiGluBackward& a) {
  const char* op = "swiglu_backward";
  rows(op, a.dy);
  door::check(op, "gate", a.gate, a.dy.shape);
  door::check(op, "up", a.up, a.dy.shape);
  door::check(op, "dgate", a.dgate, a.dy.shape);
  door::check(op, "dup", a.dup, a.dy.shape);
  body(ctx, ctx.backend->swiglu_backward, op)(ctx, a);
}

void embedding_backward(Context& ctx, const EmbeddingBackward& a) {
  const char* op = "embedding_backward";
  rows(op, a.dy);
  KDA_CHECK(a.ids.dtype == Dtype::i32 && a.ids.shape == Shape{a.dy.dim(0)}, op, ": ids must be i32 [", a.dy.dim(0),
            "], got ", name_of(a.ids.dtype), " ", a.ids.shape);
  KDA_CHECK(a.dtable.shape.rank == 2, op, ": dtable must be [vocabulary,D], got ", a.dtable.shape);
  door::check(op, "dtable", a.dtable, {a.dtable.dim(0), a.dy.dim(1)});
  body(ctx, ctx.backend->embedding_backward, op)(ctx, a);
}

}  // namespace kda
