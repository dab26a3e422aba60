#include "kernels/attention_train.h"

#include "kernels/kda_check.h"

namespace kda {

namespace {
struct Sizes {
  int64_t T, H, G, d;
};
Sizes check_inputs(const char* op, const ConstView& q, const ConstView& k, const ConstView& v, const Packing& packing) {
  KDA_CHECK(q.shape.rank == 3 && q.dim(2) > 0, op, ": q must be [T,H,d], got ", q.shape);
  const Sizes s{q.dim(0), q.dim(1), k.dim(1), q.dim(2)};
  KDA_CHECK(k.shape.rank == 3 && s.G > 0 && s.H % s.G == 0, op, ": k must be [T,G,d] with G dividing ", s.H, ", got ",
            k.shape);
  door::check(op, "q", q, {s.T, s.H, s.d});
  door::check(op, "k", k, {s.T, s.G, s.d});
  door::check(op, "v", v, {s.T, s.G, s.d});
  door::check_packing(op, packing, s.T);
  return s;
}
}  // namespace

void attention_train(Context& ctx, const AttentionTrain& a) {
  const char* op = "attention_train";
  const Sizes s = check_inputs(op, a.q, a.k, a.v, a.packing);
  door::check(op, "o", a.o, {s.T, s.H, s.d});
  door::check(op, "lse", a.lse, {s.T, s.H});
  body(ctx, ctx.backend->attention_train, op)(ctx, a);
}

void attention_backward(Context& ctx, const AttentionBackward& a) {
  const char* op = "attention_backward";
  const Sizes s = check_inputs(op, a.q, a.k, a.v, a.packing);
  door::check(op, "o", a.o, {s.T, s.H, s.d});
  door::check(op, "d_o", a.d_o, {s.T, s.H, s.d});
  door::check(op, "lse", a.lse, {s.T, s.H});
  door::check(op, "dq", a.dq, {s.T, s.H, s.d});
  door::check(op, "dk", a.dk, {s.T, s.G, s.d});
  door::check(op, "dv", a.dv, {s.T, s.G, s.d});
  body(ctx, ctx.backend->attention_backward, op)(ctx, a);
}

}  // namespace kda
