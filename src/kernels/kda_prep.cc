#include "kernels/kda_prep.h"

#include "kernels/kda_check.h"

namespace kda {

void check_gate(const char* op, const KdaGateParams& g) {
  KDA_CHECK(g.kind == KdaGate::softplus || (g.lower_bound >= -5 && g.lower_bound < 0), op,
            ": lower_bound must be in [-5,0), got ", g.lower_bound);
  KDA_CHECK(g.beta_scale > 0 && g.beta_scale <= 2, op, ": beta_scale must be in (0,2], got ", g.beta_scale);
}

void kda_prep(Context& ctx, const KdaPrep& a) {
  constexpr const char* op = "kda_prep";
  KDA_CHECK(a.q.shape.rank == 3, op, ": q must be [T,H,K], got ", a.q.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), K = a.q.dim(2);
  const Shape thk{T, H, K};
  door::check(op, "q", a.q, thk);
  door::check(op, "k", a.k, thk);
  door::check(op, "f", a.f, thk);
  door::check(op, "b", a.b, {T, H});
  door::check(op, "A_log", a.A_log, {H});
  door::check(op, "dt_bias", a.dt_bias, {H * K});
  door::check(op, "log_decay", a.log_decay, thk);
  door::check(op, "beta", a.beta, {T, H});
  if (a.unit_q.data) door::check(op, "unit_q", a.unit_q, thk);
  if (a.unit_k.data) door::check(op, "unit_k", a.unit_k, thk);
  check_gate(op, a.gate);
  body(ctx, ctx.backend->kda_prep, op)(ctx, a);
}

}  // namespace kda
