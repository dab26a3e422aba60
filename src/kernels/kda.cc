#include "kernels/kda.h"

#include "kernels/kda_check.h"

namespace kda {

void door::check_forward(const char* op, const Context& ctx, const KdaForward& a) {
  KDA_CHECK(a.q.shape.rank == 3, op, ": q must be [T,H,K], got ", a.q.shape);
  KDA_CHECK(a.v.shape.rank == 3, op, ": v must be [T,H,V], got ", a.v.shape);
  KDA_CHECK(a.state.shape.rank == 4, op, ": state must be [slots,H,V,K], got ", a.state.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2);
  KDA_CHECK(H > 0 && K > 0 && V > 0, op, ": H, K and V must be > 0, got ", H, ", ", K, " and ", V);
  door::check(op, "q", a.q, {T, H, K});
  door::check(op, "k", a.k, {T, H, K});
  door::check(op, "v", a.v, {T, H, V});
  door::check(op, "log_decay", a.log_decay, {T, H, K});
  door::check(op, "beta", a.beta, {T, H});
  door::check(op, "state", a.state, {a.state.dim(0), H, V, K});
  door::check(op, "o", a.o, {T, H, V});
  door::check_packing(op, a.packing, T);
  door::check_slots(op, ctx, a.slots, a.packing.N(), a.state.dim(0));
}

void kda_forward(Context& ctx, const KdaForward& a) {
  constexpr const char* op = "kda_forward";
  door::check_forward(op, ctx, a);
  body(ctx, ctx.backend->kda_forward, op)(ctx, a);
}

void kda_output(Context& ctx, const KdaOutput& a) {
  constexpr const char* op = "kda_output";
  KDA_CHECK(a.o.shape.rank == 3, op, ": o must be [T,H,V], got ", a.o.shape);
  const int64_t T = a.o.dim(0), H = a.o.dim(1), V = a.o.dim(2);
  door::check(op, "o", a.o, {T, H, V});
  door::check(op, "g", a.g, {T, H, V});
  door::check(op, "g_bias", a.g_bias, {H * V});
  door::check(op, "w", a.w, {V});
  door::check(op, "y", a.y, {T, H, V});
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->kda_output, op)(ctx, a);
}

}  // namespace kda
