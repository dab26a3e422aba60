#include "kernels/kda.h"

#include <utility>

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

void kda_prefill(Context& ctx, const KdaPrefill& a) {
  constexpr const char* op = "kda_prefill";
  KDA_CHECK(a.q.shape.rank == 3, op, ": q must be [T,H,K], got ", a.q.shape);
  KDA_CHECK(a.v.shape.rank == 3, op, ": v must be [T,H,V], got ", a.v.shape);
  KDA_CHECK(a.state.shape.rank == 4, op, ": state must be [slots,H,V,K], got ", a.state.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2);
  KDA_CHECK(H > 0 && K > 0 && V > 0, op, ": H, K and V must be > 0, got ", H, ", ", K, " and ", V);
  for (const auto& [name, v] : {std::pair<const char*, ConstView>{"q", a.q}, {"k", a.k}, {"f", a.f}})
    door::check_act(ctx, op, name, v, {T, H, K});
  door::check_act(ctx, op, "v", a.v, {T, H, V});
  door::check_act(ctx, op, "b", a.b, {T, H});
  door::check_act(ctx, op, "o", a.o, {T, H, V});
  door::check(op, "A_log", a.A_log, {H});
  door::check(op, "dt_bias", a.dt_bias, {H * K});
  door::check(op, "state", a.state, {a.state.dim(0), H, V, K});
  check_gate(op, a.gate);
  door::check_packing(op, a.packing, T);
  door::check_slots(op, ctx, a.slots, a.packing.N(), a.state.dim(0));
  door::check_marks(op, a.marks, a.packing, a.state.dim(0));
  body(ctx, ctx.backend->kda_prefill, op)(ctx, a);
}

size_t kda_prefill_workspace_bytes(const Context& ctx, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V) {
  return ctx.backend->kda_prefill_workspace(ctx, T, N, H, K, V);
}

void kda_output(Context& ctx, const KdaOutput& a) {
  constexpr const char* op = "kda_output";
  KDA_CHECK(a.o.shape.rank == 3, op, ": o must be [T,H,V], got ", a.o.shape);
  const int64_t T = a.o.dim(0), H = a.o.dim(1), V = a.o.dim(2);
  door::check_act(ctx, op, "o", a.o, {T, H, V});
  door::check_act(ctx, op, "g", a.g, {T, H, V});
  door::check(op, "g_bias", a.g_bias, {H * V});
  door::check(op, "w", a.w, {V});
  door::check_act(ctx, op, "y", a.y, {T, H, V});
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->kda_output, op)(ctx, a);
}

}  // namespace kda
