// Full attention's part of TrainPass (model/training_parts.h), and the MLP's.
#include <algorithm>

#include "kernels/attention_train.h"
#include "kernels/matmul.h"
#include "kernels/matmul_backward.h"
#include "kernels/norm_backward.h"
#include "kernels/pointwise.h"
#include "kernels/pointwise_backward.h"
#include "kernels/rope.h"
#include "model/training_parts.h"

namespace kda::training {

void Workspace::product(const Linear& m) {
  if (!m.w) return;
  add(matmul_workspace_bytes(ctx_, T_, m.K(), m.N()));
  add(matmul_dx_workspace_bytes(ctx_, T_, m.K(), m.N()));
  add(matmul_dw_workspace_bytes(ctx_, T_, m.K(), m.N()));
  if (m.bias) add(add_bias_backward_workspace_bytes(ctx_, T_, m.N()));
}

void Workspace::norm(int64_t D) { add(rms_norm_backward_workspace_bytes(ctx_, T_, D)); }

void multiply(Context& ctx, ConstView x, std::initializer_list<std::pair<const Linear*, View>> parts) {
  std::vector<MatmulSegment> segments;
  for (const auto& [m, y] : parts) segments.push_back({m->view(), y});
  matmul(ctx, {.x = x, .segments = segments});
  for (const auto& [m, y] : parts)
    if (m->bias) add_bias(ctx, {.bias = m->bias, .y = y});
}

void multiply_backward(Context& ctx, ConstView x, std::initializer_list<Backward> parts, View dx) {
  std::vector<MatmulDwSegment> dw;
  std::vector<MatmulDxSegment> through;
  for (const Backward& b : parts) {
    if (b.gradient->w) dw.push_back({b.dy, b.gradient->w});
    if (b.gradient->bias) add_bias_backward(ctx, {.dy = b.dy, .dbias = b.gradient->bias});
    through.push_back({b.weights->view(), b.dy});
  }
  if (!dw.empty()) matmul_dw(ctx, {.x = x, .segments = dw});
  if (dx.data) matmul_dx(ctx, {.segments = through, .dx = dx});
}

namespace {

// In place: [T,heads*d] turned by each token's angle, or back.
void turn(Pass& p, const LayerSpec& s, int64_t heads, View x, bool back) {
  if (!s.rope) return;
  const Rope args{.x = reshape(x, {p.rows.T, heads, s.head_dim}),
                  .position = p.position,
                  .inv_freq = {p.inv_freq, Dtype::f32, {s.head_dim / 2}},
                  .factor = p.rope_factor};
  back ? rope_backward(p.ctx, args) : rope(p.ctx, args);
}

}  // namespace

FullKept keep_full(Cutter& c, const LayerWeights& w, int64_t T) {
  const LayerSpec& s = w.spec;
  const int64_t q = s.heads * s.head_dim, k = s.kv_heads * s.head_dim;
  FullKept m;
  m.q = c.take({T, q});
  m.k = c.take({T, k});
  m.v = c.take({T, k});
  m.o = c.take({T, q});
  m.lse = c.take({T, s.heads});
  return m;
}

FullScratch full_scratch(Cutter& c, const LayerWeights& w, int64_t T, int64_t D) {
  const LayerSpec& s = w.spec;
  const int64_t q = s.heads * s.head_dim, k = s.kv_heads * s.head_dim;
  FullScratch t;
  t.d_o = c.take({T, std::max(q, D)});
  t.dq = c.take({T, q});
  t.dk = c.take({T, k});
  t.dv = c.take({T, k});
  return t;
}

void full_workspace(Workspace& most, const LayerWeights& w) {
  const LayerSpec& s = w.spec;
  for (const Linear* m : {&w.full.q, &w.full.k, &w.full.v, &w.full.o}) most.product(*m);
  most.add(attention_train_workspace_bytes(most.ctx(), most.T(), s.heads, s.head_dim));
  most.add(attention_backward_workspace_bytes(most.ctx(), most.T(), s.heads, s.kv_heads, s.head_dim));
}

void full_forward_pass(Pass& p, const LayerWeights& layer, const FullKept& m, ConstView h, View out) {
  const FullAttentionWeights& w = layer.full;
  const LayerSpec& s = layer.spec;
  const int64_t T = p.rows.T;
  const Shape heads{T, s.heads, s.head_dim}, kv_heads{T, s.kv_heads, s.head_dim};
  multiply(p.ctx, h, {{&w.q, m.q}, {&w.k, m.k}, {&w.v, m.v}});
  turn(p, s, s.heads, m.q, false);
  turn(p, s, s.kv_heads, m.k, false);
  attention_train(p.ctx, {.q = reshape(m.q, heads),
                          .k = reshape(m.k, kv_heads),
                          .v = reshape(m.v, kv_heads),
                          .packing = *p.rows.packing,
                          .o = reshape(m.o, heads),
                          .lse = m.lse});
  multiply(p.ctx, m.o, {{&w.o, out}});
}

View full_backward_pass(Pass& p, const LayerWeights& layer, const LayerWeights& gradient, const FullKept& m,
                        const FullScratch& t, ConstView h, ConstView d_out, bool want_dh) {
  const FullAttentionWeights &w = layer.full, &g = gradient.full;
  const LayerSpec& s = layer.spec;
  const int64_t T = p.rows.T;
  const Shape heads{T, s.heads, s.head_dim}, kv_heads{T, s.kv_heads, s.head_dim};
  const bool inside = want_dh || any_full(g, true);
  const View d_o = reshape(t.d_o, {T, s.heads * s.head_dim});
  multiply_backward(p.ctx, m.o, {{&w.o, &g.o, d_out}}, inside ? d_o : View{});
  if (!inside) return {};
  attention_backward(p.ctx, {.q = reshape(m.q, heads),
                             .k = reshape(m.k, kv_heads),
                             .v = reshape(m.v, kv_heads),
                             .o = reshape(m.o, heads),
                             .d_o = reshape(d_o, heads),
                             .lse = m.lse,
                             .packing = *p.rows.packing,
                             .dq = reshape(t.dq, heads),
                             .dk = reshape(t.dk, kv_heads),
                             .dv = reshape(t.dv, kv_heads)});
  turn(p, s, s.heads, t.dq, true);
  turn(p, s, s.kv_heads, t.dk, true);
  const View dh = want_dh ? reshape(t.d_o, {T, h.dim(1)}) : View{};
  multiply_backward(p.ctx, h, {{&w.q, &g.q, t.dq}, {&w.k, &g.k, t.dk}, {&w.v, &g.v, t.dv}}, dh);
  return dh;
}

bool any_full(const FullAttentionWeights& w, bool inside) {
  const auto any = [](const Linear& m) { return m.w || m.bias; };
  return any(w.q) || any(w.k) || any(w.v) || (!inside && any(w.o));
}

MlpKept keep_mlp(Cutter& c, const LayerWeights& w, int64_t T) {
  const Shape s{T, w.spec.mlp_width};
  MlpKept m;
  if (w.mlp.gate.w) m.gate = c.take(s);
  m.up = c.take(s);
  m.y = c.take(s);
  return m;
}

MlpScratch mlp_scratch(Cutter& c, const LayerWeights& w, int64_t T, int64_t D) {
  MlpScratch t;
  t.dh = c.take({T, D});
  if (w.mlp.gate.w) t.d_up = c.take({T, w.spec.mlp_width});
  return t;
}

void mlp_workspace(Workspace& most, const LayerWeights& w) {
  for (const Linear* m : {&w.mlp.gate, &w.mlp.up, &w.mlp.down}) most.product(*m);
}

void mlp_forward_pass(Pass& p, const LayerWeights& layer, const MlpKept& m, ConstView h, View out) {
  const MlpWeights& w = layer.mlp;
  if (w.gate.w) {
    multiply(p.ctx, h, {{&w.gate, m.gate}, {&w.up, m.up}});
    swiglu(p.ctx, {.gate = m.gate, .up = m.up, .y = m.y});
  } else {
    multiply(p.ctx, h, {{&w.up, m.up}});
    relu2(p.ctx, {.x = m.up, .y = m.y});
  }
  if (out.data) multiply(p.ctx, m.y, {{&w.down, out}});
}

View mlp_backward_pass(Pass& p, const LayerWeights& layer, const LayerWeights& gradient, const MlpKept& m,
                       const MlpScratch& t, ConstView h, ConstView d_out, bool want_dh) {
  const MlpWeights &w = layer.mlp, &g = gradient.mlp;
  const bool inside = want_dh || any_mlp(g, true);
  const View d_y = m.y;  // dW takes y first
  multiply_backward(p.ctx, m.y, {{&w.down, &g.down, d_out}}, inside ? d_y : View{});
  if (!inside) return {};
  const View dh = want_dh ? t.dh : View{};
  if (w.gate.w) {
    swiglu_backward(p.ctx, {.gate = m.gate, .up = m.up, .dy = d_y, .dgate = d_y, .dup = t.d_up});
    multiply_backward(p.ctx, h, {{&w.gate, &g.gate, d_y}, {&w.up, &g.up, t.d_up}}, dh);
  } else {
    relu2_backward(p.ctx, {.x = m.up, .dy = d_y, .dx = d_y});
    multiply_backward(p.ctx, h, {{&w.up, &g.up, d_y}}, dh);
  }
  return dh;
}

bool any_mlp(const MlpWeights& w, bool inside) {
  const auto any = [](const Linear& m) { return m.w || m.bias; };
  return any(w.gate) || any(w.up) || (!inside && any(w.down));
}

}  // namespace kda::training
