#include "kernels/kda_decode.h"

#include "kernels/conv.h"
#include "kernels/kda_check.h"

namespace kda {

void kda_decode(Context& ctx, const KdaDecode& a) {
  constexpr const char* op = "kda_decode";
  KDA_CHECK(a.q.shape.rank == 2, op, ": q must be [N,H*K], got ", a.q.shape);
  KDA_CHECK(a.state.shape.rank == 4, op, ": state must be [slots,H,V,K], got ", a.state.shape);
  const int64_t N = a.q.dim(0), slots = a.state.dim(0), H = a.state.dim(1), V = a.state.dim(2), K = a.state.dim(3);
  KDA_CHECK(H > 0 && K > 0 && V > 0, op, ": H, K and V must be > 0, got ", H, ", ", K, " and ", V);
  const int64_t HK = H * K, HV = H * V;
  door::check_act(ctx, op, "q", a.q, {N, HK});
  door::check_act(ctx, op, "k", a.k, {N, HK});
  door::check_act(ctx, op, "v", a.v, {N, HV});
  door::check_act(ctx, op, "f", a.f, {N, HK});
  door::check_act(ctx, op, "b", a.b, {N, H});
  door::check_act(ctx, op, "g", a.g, {N, HV});
  door::check(op, "q_conv", a.q_conv, {HK, kConvTaps});
  door::check(op, "k_conv", a.k_conv, {HK, kConvTaps});
  door::check(op, "v_conv", a.v_conv, {HV, kConvTaps});
  door::check(op, "A_log", a.A_log, {H});
  door::check(op, "dt_bias", a.dt_bias, {HK});
  door::check(op, "g_bias", a.g_bias, {HV});
  door::check(op, "o_norm", a.o_norm, {V});
  door::check_act(ctx, op, "window", a.window, {slots, kConvTaps - 1, 2 * HK + HV});
  door::check(op, "state", a.state, {slots, H, V, K});
  door::check_act(ctx, op, "y", a.y, {N, HV});
  KDA_CHECK(a.eps >= 0, op, ": eps must be >= 0, got ", a.eps);
  check_gate(op, a.gate);
  door::check_slots(op, ctx, a.slots, N, slots);
  body(ctx, ctx.backend->kda_decode, op)(ctx, a);
}

size_t kda_decode_workspace_bytes(const Context& ctx, int64_t N, int64_t H, int64_t K, int64_t V) {
  return ctx.backend->kda_decode_workspace(ctx, N, H, K, V);
}

}  // namespace kda
