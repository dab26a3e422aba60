#include "model/transformer.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/conv.h"
#include "kernels/embedding.h"
#include "kernels/kda.h"
#include "kernels/kda_decode.h"
#include "kernels/kda_prep.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"
#include "kernels/rope.h"

namespace kda {

// What the parts of one pass share.
struct Transformer::Pass {
  Context& ctx;
  Buffers& buffers;
  StatePool& pool;
  Phase phase;
  Packing packing;
  Slots slots;
  int64_t T;
  View x;   // [T,D]
  View h;   // [T,D]  what a part takes, then what it adds to x

  View take(int64_t rows, int64_t width) { return buffers.arena.take({rows, width}); }

  void multiply(ConstView in, std::initializer_list<std::pair<const Linear*, View>> parts) {
    std::vector<MatmulSegment> segments;
    for (const auto& [m, y] : parts) segments.push_back({m->view(), y});
    const Matmul args{.x = in, .segments = segments};
    phase == Phase::prefill ? matmul(ctx, args) : matvec(ctx, args);
    for (const auto& [m, y] : parts)
      if (m->bias) add_bias(ctx, {.bias = m->bias, .y = y});
  }
};

namespace {
View reshape(View v, Shape s) { return {v.data, v.dtype, s}; }
}  // namespace

Transformer::Transformer(Weights w) : weights_(std::move(w)) {
  for (const LayerWeights& l : weights_.layers) {
    Tensor inv_freq;
    float factor = 1;
    if (l.spec.mixer == Mixer::full && l.spec.rope) {
      const RopeTable table = rope_table(weights_.config.rope, l.spec.head_dim);
      inv_freq = host_tensor(Dtype::f32, {int64_t(table.inv_freq.size())});
      std::copy(table.inv_freq.begin(), table.inv_freq.end(), inv_freq.v.as<float>());
      factor = table.factor;
    }
    inv_freq_.push_back(inv_freq);
    rope_factor_.push_back(factor);
  }
}

void Transformer::full_attention(Pass& p, size_t layer) const {
  const FullAttentionWeights& w = weights_.layers[layer].full;
  const LayerSpec& s = weights_.layers[layer].spec;
  const LayerState& state = p.pool.layer(layer);
  const View q = p.take(p.T, s.heads * s.head_dim), k = p.take(p.T, s.kv_heads * s.head_dim),
             v = p.take(p.T, s.kv_heads * s.head_dim), o = p.take(p.T, s.heads * s.head_dim);
  const Shape heads{p.T, s.heads, s.head_dim}, kv_heads{p.T, s.kv_heads, s.head_dim};
  p.multiply(p.h, {{&w.q, q}, {&w.k, k}, {&w.v, v}});
  if (s.rope) {
    const ConstView position{p.buffers.position.v.data, Dtype::i32, {p.T}};
    for (const View& x : {reshape(q, heads), reshape(k, kv_heads)})
      rope(p.ctx, {.x = x, .position = position, .inv_freq = inv_freq_[layer], .factor = rope_factor_[layer]});
  }
  attention(p.ctx, {.q = reshape(q, heads),
                    .k = reshape(k, kv_heads),
                    .v = reshape(v, kv_heads),
                    .k_cache = state.k,
                    .v_cache = state.v,
                    .slot = p.slots.out,
                    .past = p.buffers.past.v.as<int32_t>(),
                    .packing = p.packing,
                    .o = reshape(o, heads)});
  p.multiply(o, {{&w.o, p.h}});
}

void Transformer::kda_attention(Pass& p, size_t layer) const {
  const KdaWeights& w = weights_.layers[layer].kda;
  const LayerSpec& s = weights_.layers[layer].spec;
  const LayerState& state = p.pool.layer(layer);
  const int64_t T = p.T, H = s.kda_heads, K = s.K, V = s.V, HK = H * K, HV = H * V;
  const KdaGateParams gate{.kind = s.bounded_gate ? KdaGate::bounded : KdaGate::softplus,
                           .lower_bound = float(s.lower_bound),
                           .beta_scale = s.allow_neg_eigval ? 2.0f : 1.0f};
  const float eps = float(weights_.config.norm_eps);
  const View q = p.take(T, HK), k = p.take(T, HK), v = p.take(T, HV), f = p.take(T, HK), g = p.take(T, HV),
             b = p.take(T, H), f_mid = p.take(T, w.f0.N()), g_mid = p.take(T, w.g0.N());
  p.multiply(p.h, {{&w.q, q}, {&w.k, k}, {&w.v, v}, {&w.f0, f_mid}, {&w.g0, g_mid}, {&w.b, b}});
  p.multiply(f_mid, {{&w.f1, f}});
  p.multiply(g_mid, {{&w.g1, g}});
  const View o = p.take(T, HV);
  if (p.phase == Phase::decode) {
    kda_decode(p.ctx, {.q = q, .k = k, .v = v, .f = f, .b = b, .g = g,
                       .q_conv = w.q_conv, .k_conv = w.k_conv, .v_conv = w.v_conv,
                       .A_log = w.A_log, .dt_bias = w.dt_bias, .g_bias = w.g_bias, .o_norm = w.o_norm,
                       .gate = gate, .eps = eps, .window = state.window, .state = state.S, .slots = p.slots, .y = o});
  } else {
    const View cq = p.take(T, HK), ck = p.take(T, HK), cv = p.take(T, HV);
    const auto conv = [&](View x, const Tensor& taps, int64_t channel, View y) {
      conv_silu(p.ctx, {.x = x, .w = taps, .window = state.window, .channel = channel, .slots = p.slots,
                        .packing = p.packing, .y = y});
    };
    conv(q, w.q_conv, 0, cq);
    conv(k, w.k_conv, HK, ck);
    conv(v, w.v_conv, 2 * HK, cv);
    const Shape keys{T, H, K}, values{T, H, V};
    kda_prep(p.ctx, {.q = reshape(cq, keys), .k = reshape(ck, keys), .f = reshape(f, keys), .b = b,
                     .A_log = w.A_log, .dt_bias = w.dt_bias, .gate = gate, .log_decay = reshape(f, keys), .beta = b});
    kda_forward(p.ctx, {.q = reshape(cq, keys), .k = reshape(ck, keys), .v = reshape(cv, values),
                        .log_decay = reshape(f, keys), .beta = b, .state = state.S, .slots = p.slots,
                        .packing = p.packing, .o = reshape(o, values)});
    kda_output(p.ctx, {.o = reshape(o, values), .g = reshape(g, values), .g_bias = w.g_bias, .w = w.o_norm,
                       .y = reshape(o, values), .eps = eps});
  }
  p.multiply(o, {{&w.o, p.h}});
}

void Transformer::mlp(Pass& p, size_t layer) const {
  const MlpWeights& w = weights_.layers[layer].mlp;
  const int64_t F = weights_.layers[layer].spec.mlp_width;
  const View up = p.take(p.T, F);
  if (weights_.config.activation == Activation::swiglu) {
    const View gate = p.take(p.T, F);
    p.multiply(p.h, {{&w.gate, gate}, {&w.up, up}});
    swiglu(p.ctx, {.gate = gate, .up = up, .y = up});
  } else {
    p.multiply(p.h, {{&w.up, up}});
    relu2(p.ctx, {.x = up, .y = up});
  }
  p.multiply(up, {{&w.down, p.h}});
}

void Transformer::run(Context& ctx, Buffers& b, StatePool& pool, const Step& step, std::span<const Tap> taps,
                      Phase phase) const {
  const int64_t T = int64_t(step.ids.size()), N = int64_t(step.start.size()) - 1, D = config().width;
  KDA_CHECK(N >= 1 && step.start.front() == 0 && step.start.back() == T, "forward: start must run from 0 to ", T);
  KDA_CHECK(int64_t(step.slot_in.size()) == N && int64_t(step.slot_out.size()) == N && int64_t(step.past.size()) == N,
            "forward: slot and past arrays must have ", N, " entries");
  KDA_CHECK(T <= b.rows, "forward: ", T, " tokens, buffers planned for ", b.rows);
  for (int32_t id : step.ids)
    KDA_CHECK(id >= 0 && id < config().vocabulary, "token id ", id, " outside the vocabulary of ", config().vocabulary);
  std::vector<int32_t> position(step.ids.size());
  for (int64_t n = 0; n < N; ++n) {
    const int64_t from = step.start[size_t(n)], to = step.start[size_t(n) + 1];
    for (int64_t t = from; t < to; ++t) position[size_t(t)] = int32_t(step.past[size_t(n)] + t - from);
    KDA_CHECK(step.slot_in[size_t(n)] < 0 || step.slot_in[size_t(n)] == step.slot_out[size_t(n)],
              "forward: a sequence continues in place; to branch, copy its slot first");
  }
  ctx.workspace = b.workspace;
  const auto upload = [&](const Tensor& to, std::span<const int32_t> from) {
    if (!from.empty()) ctx.backend->copy(ctx, to.v.data, from.data(), from.size_bytes());
  };
  upload(b.ids, step.ids);
  upload(b.position, position);
  upload(b.start, step.start);
  upload(b.slot_in, step.slot_in);
  upload(b.slot_out, step.slot_out);
  upload(b.past, step.past);

  Pass p{.ctx = ctx,
         .buffers = b,
         .pool = pool,
         .phase = phase,
         .packing = {step.start, b.start.v.as<int32_t>()},
         .slots = {b.slot_in.v.as<int32_t>(), b.slot_out.v.as<int32_t>()},
         .T = T,
         .x = reshape(b.x, {T, D}),
         .h = {}};
  const auto tap = [&](int64_t layer, TapPoint point, View from) {
    for (const Tap& t : taps)
      if (t.layer == layer && t.point == point) ctx.backend->copy(ctx, t.to.data, from.data, from.bytes());
  };
  const float eps = float(config().norm_eps);
  embedding(ctx, {.table = weights_.embedding, .ids = {b.ids.v.data, Dtype::i32, {T}}, .y = p.x});
  tap(-1, TapPoint::layer_out, p.x);
  for (size_t l = 0; l < weights_.layers.size(); ++l) {
    const LayerWeights& w = weights_.layers[l];
    b.arena.reset();
    p.h = p.take(T, D);
    rms_norm(ctx, {.x = p.x, .w = w.mixer_norm, .y = p.h, .eps = eps});
    tap(int64_t(l), TapPoint::mixer_in, p.h);
    w.spec.mixer == Mixer::full ? full_attention(p, l) : kda_attention(p, l);
    tap(int64_t(l), TapPoint::mixer_out, p.h);
    add_rows(ctx, {.x = p.h, .y = p.x});
    b.arena.reset();
    p.h = p.take(T, D);
    rms_norm(ctx, {.x = p.x, .w = w.mlp_norm, .y = p.h, .eps = eps});
    mlp(p, l);
    add_rows(ctx, {.x = p.h, .y = p.x});
    tap(int64_t(l), TapPoint::layer_out, p.x);
  }
}

void Transformer::prefill(Context& ctx, Buffers& b, StatePool& pool, const Step& step, std::span<const Tap> taps) const {
  run(ctx, b, pool, step, taps, Phase::prefill);
}

void Transformer::decode(Context& ctx, Buffers& b, StatePool& pool, const Step& step) const {
  for (size_t n = 0; n + 1 < step.start.size(); ++n)
    KDA_CHECK(step.start[n + 1] == int32_t(n) + 1, "decode: one token a sequence");
  run(ctx, b, pool, step, {}, Phase::decode);
}

void Transformer::choose_logits(Context& ctx, Buffers& b, std::span<const int32_t> rows, View logits) const {
  const int64_t R = int64_t(rows.size()), D = config().width;
  ctx.workspace = b.workspace;
  b.arena.reset();
  const View h = b.arena.take({R, D});
  const std::byte* x = static_cast<const std::byte*>(b.x.v.data);
  const size_t row_bytes = size_t(D) * sizeof(float);
  for (int64_t r = 0; r < R; ++r)
    ctx.backend->copy(ctx, static_cast<std::byte*>(h.data) + size_t(r) * row_bytes, x + size_t(rows[size_t(r)]) * row_bytes,
                      row_bytes);
  rms_norm(ctx, {.x = h, .w = weights_.final_norm, .y = h, .eps = float(config().norm_eps)});
  const MatmulSegment segment{weights_.head.view(), logits};
  matvec(ctx, {.x = h, .segments = {&segment, 1}});
}

void Transformer::score_logits(Context& ctx, Buffers& b, int64_t first_row, View logits) const {
  const int64_t R = logits.dim(0), D = config().width;
  ctx.workspace = b.workspace;
  b.arena.reset();
  const View h = b.arena.take({R, D});
  const ConstView x{static_cast<const float*>(b.x.v.data) + first_row * D, Dtype::f32, {R, D}};
  rms_norm(ctx, {.x = x, .w = weights_.final_norm, .y = h, .eps = float(config().norm_eps)});
  const MatmulSegment segment{weights_.head.view(), logits};
  matmul(ctx, {.x = h, .segments = {&segment, 1}});
}

}  // namespace kda
