// The KDA layer's part of TrainPass (model/training_parts.h).
#include <algorithm>

#include "kernels/conv.h"
#include "kernels/conv_backward.h"
#include "kernels/kda.h"
#include "kernels/kda_backward.h"
#include "kernels/kda_prep.h"
#include "model/training_parts.h"

namespace kda::training {

namespace {

struct Sizes {
  int64_t H, K, V, HK, HV;
  explicit Sizes(const LayerSpec& s) : H(s.kda_heads), K(s.K), V(s.V), HK(H * K), HV(H * V) {}
};

KdaGateParams gate_of(const LayerSpec& s) {
  return {.kind = s.bounded_gate ? KdaGate::bounded : KdaGate::softplus,
          .lower_bound = float(s.lower_bound),
          .beta_scale = s.allow_neg_eigval ? 2.0f : 1.0f};
}

void convolve(Pass& p, ConstView x, const Tensor& taps, View y) {
  conv_silu(
      p.ctx,
      {.x = x, .w = taps, .window = p.window, .channel = 0, .slots = p.no_slots, .packing = *p.rows.packing, .y = y});
}

}  // namespace

KdaKept keep_kda(const Context& ctx, Cutter& c, const LayerWeights& w, const Rows& r) {
  const Sizes s(w.spec);
  const Shape keys{r.T, s.HK}, values{r.T, s.HV}, heads{r.T, s.H};
  const int64_t states =
      r.packing ? kda_kept_floats(ctx, *r.packing, s.H, s.K, s.V) : kda_kept_floats(ctx, r.T, r.N, s.H, s.K, s.V);
  KdaKept k;
  for (View* v : {&k.q, &k.k, &k.conv_q, &k.conv_k, &k.unit_q, &k.unit_k, &k.f, &k.log_decay}) *v = c.take(keys);
  for (View* v : {&k.v, &k.conv_v, &k.g, &k.o, &k.y}) *v = c.take(values);
  for (View* v : {&k.b, &k.beta}) *v = c.take(heads);
  k.f_mid = c.take({r.T, w.kda.f0.N()});
  k.g_mid = c.take({r.T, w.kda.g0.N()});
  k.states = c.take({states});
  return k;
}

KdaScratch kda_scratch(Cutter& c, const LayerWeights& w, int64_t T, int64_t D) {
  const Sizes s(w.spec);
  KdaScratch k;
  k.d_y = c.take({T, std::max(s.HV, D)});
  for (View* v : {&k.dq, &k.dk, &k.df}) *v = c.take({T, s.HK});
  k.db = c.take({T, s.H});
  k.d_f_mid = c.take({T, w.kda.f0.N()});
  k.d_g_mid = c.take({T, w.kda.g0.N()});
  return k;
}

void kda_workspace(Workspace& most, const LayerWeights& w) {
  const Sizes s(w.spec);
  const KdaWeights& k = w.kda;
  for (const Linear* m : {&k.q, &k.k, &k.v, &k.f0, &k.f1, &k.b, &k.g0, &k.g1, &k.o}) most.product(*m);
  const Context& ctx = most.ctx();
  const int64_t T = most.T();
  most.add(kda_forward_keep_workspace_bytes(ctx, T, s.H, s.K, s.V));
  most.add(kda_backward_workspace_bytes(ctx, T, s.H, s.K, s.V));
  most.add(kda_prep_backward_workspace_bytes(ctx, T, s.H, s.K));
  most.add(kda_output_backward_workspace_bytes(ctx, T, s.H, s.V));
  for (int64_t C : {s.HK, s.HV}) most.add(conv_silu_backward_workspace_bytes(ctx, T, C));
}

void kda_forward_pass(Pass& p, const LayerWeights& layer, const KdaKept& m, ConstView h, View out) {
  const KdaWeights& w = layer.kda;
  const Sizes s(layer.spec);
  const Shape keys{p.rows.T, s.H, s.K}, values{p.rows.T, s.H, s.V};
  multiply(p.ctx, h, {{&w.q, m.q}, {&w.k, m.k}, {&w.v, m.v}, {&w.f0, m.f_mid}, {&w.g0, m.g_mid}, {&w.b, m.b}});
  multiply(p.ctx, m.f_mid, {{&w.f1, m.f}});
  multiply(p.ctx, m.g_mid, {{&w.g1, m.g}});
  convolve(p, m.q, w.q_conv, m.conv_q);
  convolve(p, m.k, w.k_conv, m.conv_k);
  convolve(p, m.v, w.v_conv, m.conv_v);
  kda_prep(p.ctx, {.q = reshape(m.conv_q, keys),
                   .k = reshape(m.conv_k, keys),
                   .f = reshape(m.f, keys),
                   .b = m.b,
                   .A_log = w.A_log,
                   .dt_bias = w.dt_bias,
                   .gate = gate_of(layer.spec),
                   .log_decay = reshape(m.log_decay, keys),
                   .beta = m.beta,
                   .unit_q = reshape(m.unit_q, keys),
                   .unit_k = reshape(m.unit_k, keys)});
  kda_forward_keep(p.ctx, {.forward = {.q = reshape(m.unit_q, keys),
                                       .k = reshape(m.unit_k, keys),
                                       .v = reshape(m.conv_v, values),
                                       .log_decay = reshape(m.log_decay, keys),
                                       .beta = m.beta,
                                       .state = reshape(p.state, {1, s.H, s.V, s.K}),
                                       .slots = p.no_slots,
                                       .packing = *p.rows.packing,
                                       .o = reshape(m.o, values)},
                           .kept = m.states});
  kda_output(p.ctx, {.o = reshape(m.o, values),
                     .g = reshape(m.g, values),
                     .g_bias = w.g_bias,
                     .w = w.o_norm,
                     .y = reshape(m.y, values),
                     .eps = p.eps});
  multiply(p.ctx, m.y, {{&w.o, out}});
}

View kda_backward_pass(Pass& p, const LayerWeights& layer, const LayerWeights& gradient, const KdaKept& m,
                       const KdaScratch& t, ConstView h, ConstView d_out, bool want_dh) {
  const KdaWeights &w = layer.kda, &g = gradient.kda;
  const Sizes s(layer.spec);
  const int64_t T = p.rows.T;
  const Shape keys{T, s.H, s.K}, values{T, s.H, s.V};
  const bool inside = want_dh || any_kda(g, true);
  const View d_y = reshape(t.d_y, {T, s.HV});
  multiply_backward(p.ctx, m.y, {{&w.o, &g.o, d_out}}, inside ? d_y : View{});
  if (!inside) return {};
  const View dg = m.y;  // y was needed for dW alone
  kda_output_backward(p.ctx, {.o = reshape(m.o, values),
                              .g = reshape(m.g, values),
                              .g_bias = w.g_bias,
                              .w = w.o_norm,
                              .dy = reshape(d_y, values),
                              .eps = p.eps,
                              .d_o = reshape(d_y, values),
                              .dg = reshape(dg, values),
                              .d_g_bias = g.g_bias,
                              .dw = g.o_norm});
  const View dv = m.o;
  kda_backward(p.ctx, {.q = reshape(m.unit_q, keys),
                       .k = reshape(m.unit_k, keys),
                       .v = reshape(m.conv_v, values),
                       .log_decay = reshape(m.log_decay, keys),
                       .beta = m.beta,
                       .kept = m.states,
                       .packing = *p.rows.packing,
                       .d_o = reshape(d_y, values),
                       .d_state_out = {},
                       .dq = reshape(t.dq, keys),
                       .dk = reshape(t.dk, keys),
                       .dv = reshape(dv, values),
                       .d_log_decay = reshape(t.df, keys),
                       .d_beta = t.db,
                       .d_state_in = {}});
  kda_prep_backward(p.ctx, {.q = reshape(m.conv_q, keys),
                            .k = reshape(m.conv_k, keys),
                            .f = reshape(m.f, keys),
                            .b = m.b,
                            .A_log = w.A_log,
                            .dt_bias = w.dt_bias,
                            .gate = gate_of(layer.spec),
                            .dq = reshape(t.dq, keys),
                            .dk = reshape(t.dk, keys),
                            .df = reshape(t.df, keys),
                            .db = t.db,
                            .dA_log = g.A_log,
                            .d_dt_bias = g.dt_bias});
  const auto conv_backward = [&](View x, const Tensor& taps, View dy, View dx, View dw) {
    conv_silu_backward(p.ctx, {.x = x, .w = taps, .packing = *p.rows.packing, .dy = dy, .dx = dx, .dw = dw});
  };
  const View dq = m.unit_q, dk = m.unit_k, d_pre_v = m.conv_v;
  conv_backward(m.q, w.q_conv, t.dq, dq, g.q_conv);
  conv_backward(m.k, w.k_conv, t.dk, dk, g.k_conv);
  conv_backward(m.v, w.v_conv, dv, d_pre_v, g.v_conv);
  multiply_backward(p.ctx, m.f_mid, {{&w.f1, &g.f1, t.df}}, t.d_f_mid);
  multiply_backward(p.ctx, m.g_mid, {{&w.g1, &g.g1, dg}}, t.d_g_mid);
  const View dh = want_dh ? reshape(t.d_y, {T, h.dim(1)}) : View{};
  multiply_backward(p.ctx, h,
                    {{&w.q, &g.q, dq},
                     {&w.k, &g.k, dk},
                     {&w.v, &g.v, d_pre_v},
                     {&w.f0, &g.f0, t.d_f_mid},
                     {&w.g0, &g.g0, t.d_g_mid},
                     {&w.b, &g.b, t.db}},
                    dh);
  return dh;
}

bool any_kda(const KdaWeights& w, bool inside) {
  const std::initializer_list<const Tensor*> tensors = {&w.q.w,    &w.k.w,   &w.v.w,     &w.f0.w,   &w.f1.w,
                                                        &w.b.w,    &w.g0.w,  &w.g1.w,    &w.q_conv, &w.k_conv,
                                                        &w.v_conv, &w.A_log, &w.dt_bias, &w.g_bias, &w.o_norm};
  return (!inside && w.o.w) || std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return bool(*t); });
}

}  // namespace kda::training
