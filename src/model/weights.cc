#include "model/weights.h"

#include <cstring>

#include "base/error.h"

namespace kda {

namespace {

Tensor as_f32(const Tensor& t) {
  if (t.dtype() == Dtype::f32) return t;
  Tensor out = host_tensor(Dtype::f32, t.shape());
  float* to = out.v.as<float>();
  const int64_t n = t.shape().size();
  if (t.dtype() == Dtype::bf16) {
    const bf16* from = t.v.as<bf16>();
    for (int64_t i = 0; i < n; ++i) to[i] = float(from[i]);
  } else {
    const f16* from = t.v.as<f16>();
    for (int64_t i = 0; i < n; ++i) to[i] = float(from[i]);
  }
  return out;
}

std::string layer_name(size_t l, const char* part) { return cat("model.layers.", l, ".", part); }

}  // namespace

Weights arrange_weights(const Checkpoint& c) {
  Weights w;
  w.config = c.config;
  w.embedding = c.at("model.embed_tokens.weight");
  w.final_norm = as_f32(c.at("model.norm.weight"));
  w.head.w = c.config.tied_head ? w.embedding : c.at("lm_head.weight");
  for (size_t l = 0; l < c.config.layers.size(); ++l) {
    const LayerSpec& spec = c.config.layers[l];
    const auto linear = [&](const std::string& part, bool bias = false) {
      Linear out;
      out.w = c.at(layer_name(l, (part + ".weight").c_str()));
      if (bias) out.bias = as_f32(c.at(layer_name(l, (part + ".bias").c_str())));
      return out;
    };
    const auto vector = [&](const char* part) { return as_f32(c.at(layer_name(l, part))); };
    LayerWeights layer;
    layer.spec = spec;
    layer.mixer_norm = vector("input_layernorm.weight");
    layer.mlp_norm = vector("post_attention_layernorm.weight");
    if (spec.mixer == Mixer::full) {
      layer.full = {.q = linear("self_attn.q_proj", spec.qkv_bias),
                    .k = linear("self_attn.k_proj", spec.qkv_bias),
                    .v = linear("self_attn.v_proj", spec.qkv_bias),
                    .o = linear("self_attn.o_proj", spec.o_bias)};
    } else {
      layer.kda = {.q = linear("self_attn.q_proj"),
                   .k = linear("self_attn.k_proj"),
                   .v = linear("self_attn.v_proj"),
                   .f0 = linear("self_attn.f_proj.0"),
                   .f1 = linear("self_attn.f_proj.1"),
                   .b = linear("self_attn.b_proj"),
                   .g0 = linear("self_attn.g_proj.0"),
                   .g1 = linear("self_attn.g_proj.1"),
                   .o = linear("self_attn.o_proj"),
                   .q_conv = vector("self_attn.q_conv1d.weight"),
                   .k_conv = vector("self_attn.k_conv1d.weight"),
                   .v_conv = vector("self_attn.v_conv1d.weight"),
                   .A_log = vector("self_attn.A_log"),
                   .dt_bias = vector("self_attn.dt_bias"),
                   .g_bias = vector("self_attn.g_proj.1.bias"),
                   .o_norm = vector("self_attn.o_norm.weight")};
    }
    if (c.config.activation == Activation::swiglu) layer.mlp.gate = linear("mlp.gate_proj", spec.mlp_bias);
    layer.mlp.up = linear("mlp.up_proj", spec.mlp_bias);
    layer.mlp.down = linear("mlp.down_proj", spec.mlp_bias);
    w.layers.push_back(std::move(layer));
  }
  return w;
}

void each_parameter(Weights& w, const std::function<void(const std::string&, Tensor&)>& f) {
  f("model.embed_tokens.weight", w.embedding);
  for (size_t l = 0; l < w.layers.size(); ++l) {
    LayerWeights& layer = w.layers[l];
    const LayerSpec& s = layer.spec;
    const auto vector = [&](const char* part, Tensor& t) { f(layer_name(l, part), t); };
    const auto linear = [&](const std::string& part, Linear& m, bool bias = false) {
      f(layer_name(l, (part + ".weight").c_str()), m.w);
      if (bias) f(layer_name(l, (part + ".bias").c_str()), m.bias);
    };
    vector("input_layernorm.weight", layer.mixer_norm);
    if (s.mixer == Mixer::full) {
      linear("self_attn.q_proj", layer.full.q, s.qkv_bias);
      linear("self_attn.k_proj", layer.full.k, s.qkv_bias);
      linear("self_attn.v_proj", layer.full.v, s.qkv_bias);
      linear("self_attn.o_proj", layer.full.o, s.o_bias);
    } else {
      KdaWeights& k = layer.kda;
      linear("self_attn.q_proj", k.q);
      linear("self_attn.k_proj", k.k);
      linear("self_attn.v_proj", k.v);
      vector("self_attn.q_conv1d.weight", k.q_conv);
      vector("self_attn.k_conv1d.weight", k.k_conv);
      vector("self_attn.v_conv1d.weight", k.v_conv);
      linear("self_attn.f_proj.0", k.f0);
      linear("self_attn.f_proj.1", k.f1);
      linear("self_attn.b_proj", k.b);
      linear("self_attn.g_proj.0", k.g0);
      linear("self_attn.g_proj.1", k.g1);
      vector("self_attn.g_proj.1.bias", k.g_bias);
      vector("self_attn.A_log", k.A_log);
      vector("self_attn.dt_bias", k.dt_bias);
      vector("self_attn.o_norm.weight", k.o_norm);
      linear("self_attn.o_proj", k.o);
    }
    vector("post_attention_layernorm.weight", layer.mlp_norm);
    if (w.config.activation == Activation::swiglu) linear("mlp.gate_proj", layer.mlp.gate, s.mlp_bias);
    linear("mlp.up_proj", layer.mlp.up, s.mlp_bias);
    linear("mlp.down_proj", layer.mlp.down, s.mlp_bias);
  }
  f("model.norm.weight", w.final_norm);
  if (!w.config.tied_head) f("lm_head.weight", w.head.w);
}

namespace {

template <class F>
void each_linear(Weights& w, F f) {
  for (size_t l = 0; l < w.layers.size(); ++l) {
    LayerWeights& layer = w.layers[l];
    const auto visit = [&](const char* part, Linear& m, bool large) {
      if (m.w) f(layer_name(l, part), m, large);
    };
    FullAttentionWeights& a = layer.full;
    KdaWeights& k = layer.kda;
    const bool full = layer.spec.mixer == Mixer::full;
    visit("self_attn.q_proj.weight", full ? a.q : k.q, true);
    visit("self_attn.k_proj.weight", full ? a.k : k.k, true);
    visit("self_attn.v_proj.weight", full ? a.v : k.v, true);
    visit("self_attn.o_proj.weight", full ? a.o : k.o, true);
    visit("self_attn.f_proj.0.weight", k.f0, false);
    visit("self_attn.f_proj.1.weight", k.f1, false);
    visit("self_attn.b_proj.weight", k.b, false);
    visit("self_attn.g_proj.0.weight", k.g0, false);
    visit("self_attn.g_proj.1.weight", k.g1, false);
    visit("mlp.gate_proj.weight", layer.mlp.gate, true);
    visit("mlp.up_proj.weight", layer.mlp.up, true);
    visit("mlp.down_proj.weight", layer.mlp.down, true);
  }
  f(std::string("lm_head.weight"), w.head, true);
}

}  // namespace

std::vector<NamedLinear> quantizable(Weights& w) {
  std::vector<NamedLinear> out;
  each_linear(w, [&](const std::string& name, Linear& m, bool large) {
    if (large) out.push_back({name, &m});
  });
  return out;
}

int64_t Weights::decode_bytes() const {
  int64_t bytes = 0;
  each_linear(const_cast<Weights&>(*this), [&](const std::string&, Linear& m, bool) {
    bytes += int64_t(m.w.v.bytes()) + (m.scale ? int64_t(m.scale.v.bytes()) : 0);
  });
  return bytes;
}

}  // namespace kda
