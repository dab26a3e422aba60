#include "kernels/kda_backward.h"

#include "kernels/kda_check.h"

namespace kda {
namespace {

// A gradient of a parameter: absent, or of this shape.
void check_wanted(const char* op, const char* name, const View& v, const Shape& want) {
  if (v.data) door::check(op, name, v, want);
}

}  // namespace

void kda_forward_keep(Context& ctx, const KdaForwardKeep& a) {
  constexpr const char* op = "kda_forward_keep";
  const KdaForward& f = a.forward;
  door::check_forward(op, ctx, f);
  door::check(op, "kept", a.kept, {kda_kept_floats(ctx, f.packing, f.q.dim(1), f.q.dim(2), f.v.dim(2))});
  body(ctx, ctx.backend->kda_forward_keep, op)(ctx, a);
}

void kda_backward(Context& ctx, const KdaBackward& a) {
  constexpr const char* op = "kda_backward";
  KDA_CHECK(a.q.shape.rank == 3, op, ": q must be [T,H,K], got ", a.q.shape);
  KDA_CHECK(a.v.shape.rank == 3, op, ": v must be [T,H,V], got ", a.v.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = a.packing.N();
  KDA_CHECK(H > 0 && K > 0 && V > 0, op, ": H, K and V must be > 0, got ", H, ", ", K, " and ", V);
  door::check_packing(op, a.packing, T);
  door::check(op, "q", a.q, {T, H, K});
  door::check(op, "k", a.k, {T, H, K});
  door::check(op, "v", a.v, {T, H, V});
  door::check(op, "log_decay", a.log_decay, {T, H, K});
  door::check(op, "beta", a.beta, {T, H});
  door::check(op, "kept", a.kept, {kda_kept_floats(ctx, a.packing, H, K, V)});
  door::check(op, "d_o", a.d_o, {T, H, V});
  if (a.d_state_out.data) door::check(op, "d_state_out", a.d_state_out, {N, H, V, K});
  door::check(op, "dq", a.dq, {T, H, K});
  door::check(op, "dk", a.dk, {T, H, K});
  door::check(op, "dv", a.dv, {T, H, V});
  door::check(op, "d_log_decay", a.d_log_decay, {T, H, K});
  door::check(op, "d_beta", a.d_beta, {T, H});
  check_wanted(op, "d_state_in", a.d_state_in, {N, H, V, K});
  body(ctx, ctx.backend->kda_backward, op)(ctx, a);
}

void kda_prep_backward(Context& ctx, const KdaPrepBackward& a) {
  constexpr const char* op = "kda_prep_backward";
  KDA_CHECK(a.q.shape.rank == 3, op, ": q must be [T,H,K], got ", a.q.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2);
  const Shape thk{T, H, K};
  door::check(op, "q", a.q, thk);
  door::check(op, "k", a.k, thk);
  door::check(op, "f", a.f, thk);
  door::check(op, "b", a.b, {T, H});
  door::check(op, "A_log", a.A_log, {H});
  door::check(op, "dt_bias", a.dt_bias, {H * K});
  door::check(op, "dq", a.dq, thk);
  door::check(op, "dk", a.dk, thk);
  door::check(op, "df", a.df, thk);
  door::check(op, "db", a.db, {T, H});
  check_wanted(op, "dA_log", a.dA_log, {H});
  check_wanted(op, "d_dt_bias", a.d_dt_bias, {H * K});
  check_gate(op, a.gate);
  body(ctx, ctx.backend->kda_prep_backward, op)(ctx, a);
}

void kda_output_backward(Context& ctx, const KdaOutputBackward& a) {
  constexpr const char* op = "kda_output_backward";
  KDA_CHECK(a.o.shape.rank == 3, op, ": o must be [T,H,V], got ", a.o.shape);
  const int64_t T = a.o.dim(0), H = a.o.dim(1), V = a.o.dim(2);
  const Shape thv{T, H, V};
  door::check(op, "o", a.o, thv);
  door::check(op, "g", a.g, thv);
  door::check(op, "g_bias", a.g_bias, {H * V});
  door::check(op, "w", a.w, {V});
  door::check(op, "dy", a.dy, thv);
  door::check(op, "d_o", a.d_o, thv);
  door::check(op, "dg", a.dg, thv);
  check_wanted(op, "d_g_bias", a.d_g_bias, {H * V});
  check_wanted(op, "dw", a.dw, {V});
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  body(ctx, ctx.backend->kda_output_backward, op)(ctx, a);
}

}  // namespace kda
