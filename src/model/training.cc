#include "model/training.h"

#include <algorithm>

#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/norm_backward.h"
#include "kernels/pointwise.h"
#include "kernels/pointwise_backward.h"
#include "model/training_parts.h"

namespace kda {

using namespace training;

namespace {

struct MixerKept {
  KdaKept kda;
  FullKept full;
};
struct LayerKept {
  View mixer_h;
  MixerKept mixer;
  View mlp_x, mlp_h;  // mlp_x: the stream between mixer and MLP
  MlpKept mlp;
};
struct MixerScratch {
  View d_out;  // where the mixer's output has a cotangent of its own
  KdaScratch kda;
  FullScratch full;
};

MixerKept keep_mixer(const Context& ctx, Cutter& c, const LayerWeights& w, const Rows& r) {
  MixerKept m;
  if (w.spec.mixer == Mixer::full)
    m.full = keep_full(c, w, r.T);
  else
    m.kda = keep_kda(ctx, c, w, r);
  return m;
}

MixerScratch mixer_scratch(Cutter& c, const LayerWeights& w, int64_t T, int64_t D) {
  MixerScratch t;
  t.d_out = c.take({T, D});
  if (w.spec.mixer == Mixer::full)
    t.full = full_scratch(c, w, T, D);
  else
    t.kda = kda_scratch(c, w, T, D);
  return t;
}

// Where everything of a batch lies. With `recompute` all layers share one place, and a mixer's backward pass works in
// the memory of the MLP, which is done by then.
struct Layout {
  std::vector<View> x;  // [L+1] of [T,D]: the stream at each layer's start, and after the last
  std::vector<LayerKept> layers;
  std::vector<MlpScratch> mlp_scratch;
  std::vector<MixerScratch> mixer_scratch;
  int64_t activation_bytes = 0, scratch_bytes = 0;
};

Layout lay_out(const Context& ctx, const Weights& w, const TrainSizes& sizes, const Rows& r, void* activations,
               void* scratch) {
  const int64_t T = r.T, D = w.config.width;
  Layout out;
  Cutter keep(activations), work(scratch);
  if (!sizes.mixers_only)
    for (size_t l = 0; l <= w.layers.size(); ++l) out.x.push_back(keep.take({T, D}));
  out.activation_bytes = keep.used();
  const Cutter start = keep, work_start = work;
  for (const LayerWeights& layer : w.layers) {
    if (sizes.recompute || sizes.mixers_only) keep = start;
    LayerKept m;
    Cutter after;
    if (sizes.mixers_only) {
      m.mixer = keep_mixer(ctx, keep, layer, r);
      after = work = work_start;
    } else {
      m.mixer_h = keep.take({T, D});
      m.mixer = keep_mixer(ctx, keep, layer, r);
      after = keep;
      m.mlp_x = keep.take({T, D});
      m.mlp_h = keep.take({T, D});
      m.mlp = keep_mlp(keep, layer, T);
      if (!sizes.recompute) after = work = work_start;
      Cutter& mlp = sizes.recompute ? keep : work;
      out.mlp_scratch.push_back(kda::training::mlp_scratch(mlp, layer, T, D));
      out.scratch_bytes = std::max(out.scratch_bytes, work.used());
    }
    out.mixer_scratch.push_back(kda::mixer_scratch(after, layer, T, D));
    out.layers.push_back(m);
    if (sizes.recompute && !sizes.mixers_only)
      out.activation_bytes = std::max(out.activation_bytes, after.used());
    else
      out.scratch_bytes = std::max(out.scratch_bytes, after.used());
    out.activation_bytes = std::max(out.activation_bytes, keep.used());
  }
  return out;
}

// All that a pass allocates besides activations and layout scratch.
struct Extra {
  int64_t workspace = 0, window = 0, state = 0;  // bytes, floats of a token, floats
  int64_t tables = 0;                            // rotary frequencies, floats
};

Extra extra_memory(const Context& ctx, const Weights& w, const TrainSizes& sizes) {
  Extra e;
  Workspace most(ctx, sizes.rows);
  for (const LayerWeights& l : w.layers) {
    const LayerSpec& s = l.spec;
    if (s.mixer == Mixer::full) {
      full_workspace(most, l);
      if (s.rope) e.tables += s.head_dim / 2;
    } else {
      kda_workspace(most, l);
      e.window = std::max({e.window, s.kda_heads * s.K, s.kda_heads * s.V});
      e.state = std::max(e.state, s.kda_heads * s.K * s.V);
    }
    if (!sizes.mixers_only) mlp_workspace(most, l);
  }
  if (!sizes.mixers_only) most.norm(w.config.width);
  e.workspace = int64_t(most.bytes());
  return e;
}

int64_t index_count(const TrainSizes& s) { return 2 * s.rows + 2 * s.sequences + 1; }  // ids, position, start, slots

void check_sizes(const TrainSizes& s) {
  KDA_CHECK(s.rows >= 1 && s.sequences >= 1, "training pass: rows and sequences must be at least 1, got ", s.rows,
            " and ", s.sequences);
}

TrainBytes bytes_of(const Layout& l, const Extra& e, const TrainSizes& s) {
  return {.activations = l.activation_bytes,
          .scratch = l.scratch_bytes + e.workspace +
                     int64_t(sizeof(float)) * (3 * e.window + e.state + e.tables + index_count(s))};
}

}  // namespace

struct TrainPass::Impl {
  enum class Done { nothing, forward, mixer };

  Impl(Context& ctx, const Weights& weights, const TrainSizes& s) : w(weights), sizes(s) {
    check_sizes(s);
    const auto alloc = ctx.backend->alloc;
    const Layout plan = lay_out(ctx, w, sizes, {.T = s.rows, .N = s.sequences}, nullptr, nullptr);
    const Extra extra = extra_memory(ctx, w, sizes);
    activations = alloc(Dtype::u8, {plan.activation_bytes});
    scratch = alloc(Dtype::u8, {plan.scratch_bytes});
    workspace = alloc(Dtype::u8, {extra.workspace});
    window = alloc(Dtype::f32, {3 * extra.window});
    state = alloc(Dtype::f32, {extra.state});
    ids = alloc(Dtype::i32, {s.rows});
    position = alloc(Dtype::i32, {s.rows});
    start = alloc(Dtype::i32, {s.sequences + 1});
    slots = alloc(Dtype::i32, {s.sequences});
    const std::vector<int32_t> none(size_t(s.sequences), -1);
    ctx.backend->copy(ctx, slots.v.data, none.data(), none.size() * sizeof(int32_t));
    for (const LayerWeights& l : w.layers) {
      RopeTable table;
      if (l.spec.mixer == Mixer::full && l.spec.rope) table = rope_table(w.config.rope, l.spec.head_dim);
      Tensor inv_freq;
      if (!table.inv_freq.empty()) {
        inv_freq = alloc(Dtype::f32, {int64_t(table.inv_freq.size())});
        ctx.backend->copy(ctx, inv_freq.v.data, table.inv_freq.data(), table.inv_freq.size() * sizeof(float));
      }
      inv_freqs.push_back(inv_freq);
      rope_factors.push_back(table.factor);
    }
  }

  // Checks the batch, brings its arrays to the backend and lays out its memory.
  void begin(Context& ctx, const Batch& b) {
    done = Done::nothing;
    rows.T = int64_t(b.ids.size());
    rows.N = int64_t(b.start.size()) - 1;
    KDA_CHECK(rows.N >= 1 && b.start.front() == 0 && b.start.back() == rows.T && std::ranges::is_sorted(b.start),
              "training pass: start must rise from 0 to ", rows.T);
    KDA_CHECK(rows.T <= sizes.rows && rows.N <= sizes.sequences, "training pass: ", rows.T, " tokens in ", rows.N,
              " sequences, planned for ", sizes.rows, " in ", sizes.sequences);
    for (int32_t id : b.ids)
      KDA_CHECK(id >= 0 && id < w.config.vocabulary, "token id ", id, " outside the vocabulary of ",
                w.config.vocabulary);
    host_start.assign(b.start.begin(), b.start.end());
    std::vector<int32_t> at(b.ids.size());
    for (size_t n = 0; n + 1 < host_start.size(); ++n)
      for (int32_t t = host_start[n]; t < host_start[n + 1]; ++t) at[size_t(t)] = t - host_start[n];
    const auto upload = [&](const Tensor& to, std::span<const int32_t> from) {
      if (!from.empty()) ctx.backend->copy(ctx, to.v.data, from.data(), from.size_bytes());
    };
    upload(ids, b.ids);
    upload(position, at);
    upload(start, host_start);
    packing = {host_start, start.v.as<int32_t>()};
    rows.packing = &packing;
    layout = lay_out(ctx, w, sizes, rows, activations.v.data, scratch.v.data);
  }

  Pass pass(Context& ctx, size_t layer) {
    ctx.workspace = workspace;
    const LayerSpec& s = w.layers[layer].spec;
    const int64_t channels = std::max(s.kda_heads * s.K, s.kda_heads * s.V);
    const int32_t* none = slots.v.as<int32_t>();
    return {.ctx = ctx,
            .rows = rows,
            .no_slots = {none, none},
            .window = {window.v.data, Dtype::f32, {1, 3, channels}},
            .state = state,
            .position = {position.v.data, Dtype::i32, {rows.T}},
            .eps = float(w.config.norm_eps),
            .inv_freq = inv_freqs[layer] ? inv_freqs[layer].v.as<float>() : nullptr,
            .rope_factor = rope_factors[layer]};
  }

  ConstView batch_ids() const { return {ids.v.data, Dtype::i32, {rows.T}}; }

  void mixer(Pass& p, size_t l, ConstView h, View out) {
    const LayerKept& m = layout.layers[l];
    if (w.layers[l].spec.mixer == Mixer::full)
      full_forward_pass(p, w.layers[l], m.mixer.full, h, out);
    else
      kda_forward_pass(p, w.layers[l], m.mixer.kda, h, out);
  }

  View mixer_backward(Pass& p, size_t l, const LayerWeights& gradient, ConstView h, ConstView d_out, bool want_dh) {
    const LayerKept& m = layout.layers[l];
    const MixerScratch& t = layout.mixer_scratch[l];
    if (w.layers[l].spec.mixer == Mixer::full)
      return full_backward_pass(p, w.layers[l], gradient, m.mixer.full, t.full, h, d_out, want_dh);
    return kda_backward_pass(p, w.layers[l], gradient, m.mixer.kda, t.kda, h, d_out, want_dh);
  }

  // Fills what layer l keeps, and x[l+1]; `again`: only what is kept.
  template <class OnTap>
  void layer(Context& ctx, size_t l, bool again, const OnTap& tap) {
    Pass p = pass(ctx, l);
    const LayerWeights& weights = w.layers[l];
    const LayerKept& m = layout.layers[l];
    const View x = layout.x[l], next = again ? View{} : layout.x[l + 1];
    rms_norm(ctx, {.x = x, .w = weights.mixer_norm, .y = m.mixer_h, .eps = p.eps});
    tap(int64_t(l), TapPoint::mixer_in, m.mixer_h);
    mixer(p, l, m.mixer_h, m.mlp_x);
    tap(int64_t(l), TapPoint::mixer_out, m.mlp_x);
    add_rows(ctx, {.x = x, .y = m.mlp_x});
    rms_norm(ctx, {.x = m.mlp_x, .w = weights.mlp_norm, .y = m.mlp_h, .eps = p.eps});
    mlp_forward_pass(p, weights, m.mlp, m.mlp_h, next);
    if (again) return;
    add_rows(ctx, {.x = m.mlp_x, .y = next});
    tap(int64_t(l), TapPoint::layer_out, next);
  }

  const Weights& w;
  TrainSizes sizes;
  Tensor activations, scratch, workspace, window, state, ids, position, start, slots;
  std::vector<Tensor> inv_freqs;
  std::vector<float> rope_factors;
  // of the last batch
  Done done = Done::nothing;
  Rows rows;
  std::vector<int32_t> host_start;
  Packing packing;
  Layout layout;
  size_t mixer_layer = 0;
  ConstView mixer_in;
};

TrainPass::TrainPass(Context& ctx, const Weights& w, const TrainSizes& s) : impl_(std::make_unique<Impl>(ctx, w, s)) {}
TrainPass::~TrainPass() = default;

TrainBytes TrainPass::plan(Context& ctx, const Weights& w, const TrainSizes& s) {
  check_sizes(s);
  return bytes_of(lay_out(ctx, w, s, {.T = s.rows, .N = s.sequences}, nullptr, nullptr), extra_memory(ctx, w, s), s);
}

View TrainPass::forward(Context& ctx, const Batch& batch, std::span<const Tap> taps) {
  Impl& m = *impl_;
  KDA_CHECK(!m.sizes.mixers_only, "training pass: built for mixers only, asked for a whole forward pass");
  m.begin(ctx, batch);
  const auto tap = [&](int64_t layer, TapPoint point, View from) {
    for (const Tap& t : taps)
      if (t.layer == layer && t.point == point) ctx.backend->copy(ctx, t.to.data, from.data, from.bytes());
  };
  embedding(ctx, {.table = m.w.embedding, .ids = m.batch_ids(), .y = m.layout.x[0]});
  tap(-1, TapPoint::layer_out, m.layout.x[0]);
  for (size_t l = 0; l < m.w.layers.size(); ++l) m.layer(ctx, l, false, tap);
  m.done = Impl::Done::forward;
  return m.layout.x.back();
}

void TrainPass::backward(Context& ctx, View d_x, std::span<const Cotangent> cotangents, Weights& gradients) {
  Impl& m = *impl_;
  const size_t L = m.w.layers.size();
  KDA_CHECK(m.done == Impl::Done::forward, "training pass: backward() must follow forward(), once");
  KDA_CHECK(gradients.layers.size() == L, "training pass: gradients of ", gradients.layers.size(), " layers for ", L);
  KDA_CHECK(d_x.shape == Shape({m.rows.T, m.w.config.width}), "training pass: d_x is ", d_x.shape, ", needed [",
            m.rows.T, ",", m.w.config.width, "]");
  m.done = Impl::Done::nothing;

  // wanted[l]: something at or below the start of layer l has a gradient.
  const auto mixer_wanted = [&](size_t l) {
    const LayerWeights& g = gradients.layers[l];
    return g.mixer_norm || any_kda(g.kda, false) || any_full(g.full, false);
  };
  std::vector<bool> wanted(L + 1);
  wanted[0] = bool(gradients.embedding);
  for (size_t l = 0; l < L; ++l) {
    const LayerWeights& g = gradients.layers[l];
    wanted[l + 1] = wanted[l] || mixer_wanted(l) || g.mlp_norm || any_mlp(g.mlp, false);
  }
  const auto cotangent = [&](int64_t l, TapPoint point, View to) {
    for (const Cotangent& c : cotangents)
      if (c.layer == l && c.point == point) add_rows(ctx, {.x = c.value, .y = to});
  };
  for (const Cotangent& c : cotangents)
    KDA_CHECK(c.point != TapPoint::mixer_in, "training pass: a mixer's input takes no cotangent");

  for (size_t l = L; l-- > 0 && wanted[l + 1];) {
    cotangent(int64_t(l), TapPoint::layer_out, d_x);
    // The last layer's activations still stand.
    if (m.sizes.recompute && l + 1 < L) m.layer(ctx, l, true, [](int64_t, TapPoint, View) {});
    Pass p = m.pass(ctx, l);
    const LayerWeights &w = m.w.layers[l], &g = gradients.layers[l];
    const LayerKept& kept = m.layout.layers[l];
    const auto norm_backward = [&](View x, const Tensor& weight, View dh, const Tensor& dw) {
      if (dh.data) rms_norm_backward(ctx, {.x = x, .w = weight, .dy = dh, .dx = d_x, .dw = dw, .eps = p.eps});
    };
    const bool mixer = wanted[l] || mixer_wanted(l);
    const View d_mlp =
        mlp_backward_pass(p, w, g, kept.mlp, m.layout.mlp_scratch[l], kept.mlp_h, d_x, mixer || g.mlp_norm);
    norm_backward(kept.mlp_x, w.mlp_norm, d_mlp, g.mlp_norm);
    if (!mixer) break;

    View d_out = d_x;
    const auto own = [&](const Cotangent& c) { return c.layer == int64_t(l) && c.point == TapPoint::mixer_out; };
    if (std::ranges::any_of(cotangents, own)) {
      d_out = m.layout.mixer_scratch[l].d_out;
      ctx.backend->copy(ctx, d_out.data, d_x.data, d_x.bytes());
      cotangent(int64_t(l), TapPoint::mixer_out, d_out);
    }
    const View d_mixer = m.mixer_backward(p, l, g, kept.mixer_h, d_out, wanted[l] || g.mixer_norm);
    norm_backward(m.layout.x[l], w.mixer_norm, d_mixer, g.mixer_norm);
  }
  if (!gradients.embedding) return;
  cotangent(-1, TapPoint::layer_out, d_x);
  embedding_backward(ctx, {.ids = m.batch_ids(), .dy = d_x, .dtable = gradients.embedding});
}

void TrainPass::mixer_forward(Context& ctx, const Batch& batch, size_t layer, ConstView in, View out) {
  Impl& m = *impl_;
  KDA_CHECK(layer < m.w.layers.size(), "training pass: layer ", layer, " of ", m.w.layers.size());
  m.begin(ctx, batch);
  Pass p = m.pass(ctx, layer);
  m.mixer(p, layer, in, out);
  m.done = Impl::Done::mixer;
  m.mixer_layer = layer;
  m.mixer_in = in;
}

void TrainPass::mixer_backward(Context& ctx, ConstView d_out, Weights& gradients) {
  Impl& m = *impl_;
  KDA_CHECK(m.done == Impl::Done::mixer, "training pass: mixer_backward() must follow mixer_forward(), once");
  m.done = Impl::Done::nothing;
  Pass p = m.pass(ctx, m.mixer_layer);
  m.mixer_backward(p, m.mixer_layer, gradients.layers[m.mixer_layer], m.mixer_in, d_out, false);
}

}  // namespace kda
