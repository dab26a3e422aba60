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
  Packing packing;
  Slots slots;
  int64_t T;
  float eps;
  bool decode;  // one token a sequence: products by matvec, norms and sums with them
  View x;       // [T,D]  the residual stream
  View h;       // [T,D]  prompts: what a part takes, then what it adds to x; decode: scratch

  View take(int64_t rows, int64_t width) { return buffers.arena.take(buffers.activation, {rows, width}); }

  using Parts = std::initializer_list<std::pair<const Linear*, View>>;
  static std::vector<MatmulSegment> segments(Parts parts) {
    std::vector<MatmulSegment> out;
    for (const auto& [m, y] : parts) out.push_back({m->view(), y});
    return out;
  }
  void biases(Parts parts) {
    for (const auto& [m, y] : parts)
      if (m->bias) add_bias(ctx, {.bias = m->bias, .y = y});
  }

  // What a part of a layer does first: the products of the normed residual stream, which prompts find in h.
  void enter(const Tensor& norm, Parts parts) {
    const auto s = segments(parts);
    if (decode)
      norm_matvec(ctx, {.x = x, .norm = norm, .eps = eps, .segments = s, .h = h});
    else
      matmul(ctx, {.x = h, .segments = s});
    biases(parts);
  }
  void enter_relu2(const Tensor& norm, const Linear& m, View y) {
    if (m.bias) {
      enter(norm, {{&m, y}});
      return relu2(ctx, {.x = y, .y = y});
    }
    const auto s = segments({{&m, y}});
    if (decode)
      norm_matvec_relu2(ctx, {.x = x, .norm = norm, .eps = eps, .segments = s, .h = h});
    else
      matmul_relu2(ctx, {.x = h, .segments = s});
  }
  // Products of two inputs of their own.
  void both(ConstView a, const Linear& to_a, View ya, ConstView b, const Linear& to_b, View yb) {
    const MatmulSegment s[] = {{to_a.view(), ya, a}, {to_b.view(), yb, b}};
    if (decode) return matvec(ctx, {.x = a, .segments = s});
    const MatmulSegment first{to_a.view(), ya}, second{to_b.view(), yb};
    matmul(ctx, {.x = a, .segments = {&first, 1}});
    matmul(ctx, {.x = b, .segments = {&second, 1}});
  }
  // What it does last: its product joins x, at once or, in prompts, with the next norm.
  void leave(ConstView in, const Linear& m) {
    if (decode) {
      matvec_add(ctx, {.x = in, .w = m.view(), .y = x, .h = h});
      return biases({{&m, x}});
    }
    const auto s = segments({{&m, h}});
    matmul(ctx, {.x = in, .segments = s});
    biases({{&m, h}});
  }
};

namespace {
View reshape(View v, Shape s) { return {v.data, v.dtype, s}; }
}  // namespace

Transformer::Transformer(Context& ctx, Weights w) : Transformer(std::move(w)) {
  if (ctx.backend == &cpu_backend()) return;
  for (Tensor& t : inv_freq_) {
    if (!t) continue;
    Tensor there = ctx.backend->alloc(t.dtype(), t.shape());
    ctx.backend->copy(ctx, there.v.data, t.v.data, t.v.bytes());
    t = std::move(there);
  }
}

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
  p.enter(weights_.layers[layer].mixer_norm, {{&w.q, q}, {&w.k, k}, {&w.v, v}});
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
  p.leave(o, w.o);
}

void Transformer::kda_attention(Pass& p, size_t layer) const {
  const KdaWeights& w = weights_.layers[layer].kda;
  const LayerSpec& s = weights_.layers[layer].spec;
  const LayerState& state = p.pool.layer(layer);
  const int64_t T = p.T, H = s.kda_heads, K = s.K, V = s.V, HK = H * K, HV = H * V;
  const KdaGateParams gate{.kind = s.bounded_gate ? KdaGate::bounded : KdaGate::softplus,
                           .lower_bound = float(s.lower_bound),
                           .beta_scale = s.allow_neg_eigval ? 2.0f : 1.0f};
  const View q = p.take(T, HK), k = p.take(T, HK), v = p.take(T, HV), f = p.take(T, HK), g = p.take(T, HV),
             b = p.take(T, H), f_mid = p.take(T, w.f0.N()), g_mid = p.take(T, w.g0.N());
  p.enter(weights_.layers[layer].mixer_norm,
          {{&w.q, q}, {&w.k, k}, {&w.v, v}, {&w.f0, f_mid}, {&w.g0, g_mid}, {&w.b, b}});
  p.both(f_mid, w.f1, f, g_mid, w.g1, g);
  const View o = p.take(T, HV);
  if (p.decode) {
    kda_decode(p.ctx, {.q = q, .k = k, .v = v, .f = f, .b = b, .g = g,
                       .q_conv = w.q_conv, .k_conv = w.k_conv, .v_conv = w.v_conv,
                       .A_log = w.A_log, .dt_bias = w.dt_bias, .g_bias = w.g_bias, .o_norm = w.o_norm,
                       .gate = gate, .eps = p.eps, .window = state.window, .state = state.S, .slots = p.slots, .y = o});
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
    kda_prefill(p.ctx, {.q = reshape(cq, keys), .k = reshape(ck, keys), .v = reshape(cv, values), .f = reshape(f, keys),
                        .b = b, .A_log = w.A_log, .dt_bias = w.dt_bias, .gate = gate, .state = state.S,
                        .slots = p.slots, .packing = p.packing, .o = reshape(o, values)});
    kda_output(p.ctx, {.o = reshape(o, values), .g = reshape(g, values), .g_bias = w.g_bias, .w = w.o_norm,
                       .y = reshape(o, values), .eps = p.eps});
  }
  p.leave(o, w.o);
}

void Transformer::mlp(Pass& p, size_t layer) const {
  const MlpWeights& w = weights_.layers[layer].mlp;
  const Tensor& norm = weights_.layers[layer].mlp_norm;
  const int64_t F = weights_.layers[layer].spec.mlp_width;
  const View up = p.take(p.T, F);
  if (config().activation == Activation::swiglu) {
    const View gate = p.take(p.T, F);
    p.enter(norm, {{&w.gate, gate}, {&w.up, up}});
    swiglu(p.ctx, {.gate = gate, .up = up, .y = up});
  } else {
    p.enter_relu2(norm, w.up, up);
  }
  p.leave(up, w.down);
}

void Transformer::upload(Context& ctx, Buffers& b, const Step& step) const {
  const int64_t T = int64_t(step.ids.size()), N = int64_t(step.start.size()) - 1;
  KDA_CHECK(N >= 1 && step.start.front() == 0 && step.start.back() == T, "forward: start must run from 0 to ", T);
  KDA_CHECK(int64_t(step.slot_in.size()) == N && int64_t(step.slot_out.size()) == N && int64_t(step.past.size()) == N,
            "forward: slot and past arrays must have ", N, " entries");
  KDA_CHECK(T <= b.rows && N <= b.sequences, "forward: ", T, " tokens in ", N, " sequences, buffers planned for ",
            b.rows, " in ", b.sequences);
  for (int32_t id : step.ids)
    KDA_CHECK(id >= 0 && id < config().vocabulary, "token id ", id, " outside the vocabulary of ", config().vocabulary);
  std::vector<int32_t> position(step.ids.size());
  for (int64_t n = 0; n < N; ++n) {
    const int64_t from = step.start[size_t(n)], to = step.start[size_t(n) + 1];
    for (int64_t t = from; t < to; ++t) position[size_t(t)] = int32_t(step.past[size_t(n)] + t - from);
    KDA_CHECK(step.slot_in[size_t(n)] < 0 || step.slot_in[size_t(n)] == step.slot_out[size_t(n)],
              "forward: a sequence continues in place; to branch, copy its slot first");
  }
  const auto copy = [&](const Tensor& to, std::span<const int32_t> from) {
    if (!from.empty()) ctx.backend->copy(ctx, to.v.data, from.data(), from.size_bytes());
  };
  copy(b.ids, step.ids);
  copy(b.position, position);
  const auto copy_new = [&](const Tensor& to, std::vector<int32_t>& there, std::span<const int32_t> from) {
    if (std::equal(there.begin(), there.end(), from.begin(), from.end())) return;
    copy(to, from);
    there.assign(from.begin(), from.end());
  };
  copy_new(b.start, b.start_there, step.start);
  copy_new(b.slot_in, b.slot_in_there, step.slot_in);
  copy_new(b.slot_out, b.slot_out_there, step.slot_out);
  copy(b.past, step.past);
}

Transformer::Pass Transformer::begin(Context& ctx, Buffers& b, StatePool& pool, std::span<const int32_t> start) const {
  const int64_t T = start.back();
  ctx.workspace = b.workspace;
  b.arena.reset();
  Pass p{.ctx = ctx,
         .buffers = b,
         .pool = pool,
         .packing = {start, b.start.v.as<int32_t>()},
         .slots = {b.slot_in.v.as<int32_t>(), b.slot_out.v.as<int32_t>()},
         .T = T,
         .eps = float(config().norm_eps),
         .decode = false,
         .x = reshape(b.x, {T, config().width}),
         .h = {}};
  embedding(ctx, {.table = weights_.embedding, .ids = {b.ids.v.data, Dtype::i32, {T}}, .y = p.x});
  p.h = p.take(T, config().width);
  return p;
}

void Transformer::prefill(Context& ctx, Buffers& b, StatePool& pool, const Step& step, std::span<const Tap> taps) const {
  upload(ctx, b, step);
  const auto tap = [&](int64_t layer, TapPoint point, View from) {
    for (const Tap& t : taps)
      if (t.layer == layer && t.point == point) {
        KDA_CHECK(t.to.dtype == from.dtype && t.to.bytes() == from.bytes(), "forward: a tap must be ",
                  name_of(from.dtype), " ", from.shape, ", got ", name_of(t.to.dtype), " ", t.to.shape);
        ctx.backend->copy(ctx, t.to.data, from.data, from.bytes());
      }
  };
  Pass p = begin(ctx, b, pool, step.start);
  tap(-1, TapPoint::layer_out, p.x);
  const std::vector<LayerWeights>& layers = weights_.layers;
  if (layers.empty()) return;
  rms_norm(ctx, {.x = p.x, .w = layers[0].mixer_norm, .y = p.h, .eps = p.eps});
  for (size_t l = 0; l < layers.size(); ++l) {
    tap(int64_t(l), TapPoint::mixer_in, p.h);
    layers[l].spec.mixer == Mixer::full ? full_attention(p, l) : kda_attention(p, l);
    tap(int64_t(l), TapPoint::mixer_out, p.h);
    add_rms_norm(ctx, {.x = p.x, .add = p.h, .w = layers[l].mlp_norm, .y = p.h, .eps = p.eps});
    b.arena.reset();
    p.h = p.take(p.T, config().width);  // the same memory
    mlp(p, l);
    if (l + 1 < layers.size())
      add_rms_norm(ctx, {.x = p.x, .add = p.h, .w = layers[l + 1].mixer_norm, .y = p.h, .eps = p.eps});
    else
      add_rows(ctx, {.x = p.h, .y = p.x});
    tap(int64_t(l), TapPoint::layer_out, p.x);
    b.arena.reset();
    p.h = p.take(p.T, config().width);
  }
}

void Transformer::decode(Context& ctx, Buffers& b, StatePool& pool, const Step& step) const {
  decode_arrays(ctx, b, step);
  decode_pass(ctx, b, pool, int64_t(step.ids.size()));
}

void Transformer::decode_arrays(Context& ctx, Buffers& b, const Step& step) const {
  for (size_t n = 0; n + 1 < step.start.size(); ++n)
    KDA_CHECK(step.start[n + 1] == int32_t(n) + 1, "decode: one token a sequence");
  upload(ctx, b, step);
}

void Transformer::decode_pass(Context& ctx, Buffers& b, StatePool& pool, int64_t N) const {
  std::vector<int32_t> start(size_t(N) + 1);
  for (size_t n = 0; n < start.size(); ++n) start[n] = int32_t(n);
  Pass p = begin(ctx, b, pool, start);
  p.decode = true;
  for (size_t l = 0; l < weights_.layers.size(); ++l) {
    b.arena.reset();
    p.h = p.take(N, config().width);
    weights_.layers[l].spec.mixer == Mixer::full ? full_attention(p, l) : kda_attention(p, l);
    b.arena.reset();
    p.h = p.take(N, config().width);
    mlp(p, l);
  }
}

void Transformer::choose_logits(Context& ctx, Buffers& b, std::span<const int32_t> rows, View logits) const {
  const int64_t R = logits.dim(0), D = config().width;
  ctx.workspace = b.workspace;
  b.arena.reset();
  View x = reshape(b.x, {R, D});
  if (!rows.empty()) {
    KDA_CHECK(int64_t(rows.size()) == R && R <= b.sequences, "logits of ", rows.size(), " rows, buffers planned for ",
              b.sequences);
    ctx.backend->copy(ctx, b.picked.v.data, rows.data(), rows.size_bytes());
    x = b.arena.take(Dtype::f32, {R, D});
    embedding(ctx, {.table = b.x, .ids = {b.picked.v.data, Dtype::i32, {R}}, .y = x});
  }
  const View h = b.arena.take(b.activation, {R, D});
  const MatmulSegment segment{weights_.head.view(), logits};
  norm_matvec(ctx, {.x = x, .norm = weights_.final_norm, .eps = float(config().norm_eps), .segments = {&segment, 1},
                    .h = h});
}

void Transformer::score_logits(Context& ctx, Buffers& b, int64_t first_row, View logits) const {
  const int64_t R = logits.dim(0), D = config().width;
  ctx.workspace = b.workspace;
  b.arena.reset();
  const View h = b.arena.take(b.activation, {R, D});
  const ConstView x{static_cast<const float*>(b.x.v.data) + first_row * D, Dtype::f32, {R, D}};
  rms_norm(ctx, {.x = x, .w = weights_.final_norm, .y = h, .eps = float(config().norm_eps)});
  const MatmulSegment segment{weights_.head.view(), logits};
  matmul(ctx, {.x = h, .segments = {&segment, 1}});
}

}  // namespace kda
