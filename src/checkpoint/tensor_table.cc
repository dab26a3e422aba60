#include "checkpoint/tensor_table.h"

#include <map>

namespace kda {

namespace {
struct Spelling {
  std::string_view canonical, other;
};
// Other spellings of what follows `model.layers.N.`, `mixer.` standing for `self_attn.` and `attn.` alike.
constexpr Spelling kLayerSpellings[] = {
    {"input_layernorm.weight", "attn_norm.weight"},     {"post_attention_layernorm.weight", "mlp_norm.weight"},
    {"mixer.f_proj.0.weight", "mixer.f_a_proj.weight"}, {"mixer.f_proj.1.weight", "mixer.f_b_proj.weight"},
    {"mixer.g_proj.0.weight", "mixer.g_a_proj.weight"}, {"mixer.g_proj.1.weight", "mixer.g_b_proj.weight"},
    {"mixer.g_proj.1.bias", "mixer.g_b_proj.bias"},
};
constexpr Spelling kTopSpellings[] = {{"model.embed_tokens.weight", "model.embeddings.weight"}};

constexpr std::string_view kTopNames[] = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"};
constexpr std::string_view kLayerNames[] = {
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "mixer.q_proj.weight",    "mixer.k_proj.weight",
    "mixer.v_proj.weight",    "mixer.o_proj.weight",
    "mixer.q_proj.bias",      "mixer.k_proj.bias",
    "mixer.v_proj.bias",      "mixer.o_proj.bias",
    "mixer.b_proj.weight",    "mixer.q_conv1d.weight",
    "mixer.k_conv1d.weight",  "mixer.v_conv1d.weight",
    "mixer.f_proj.0.weight",  "mixer.f_proj.1.weight",
    "mixer.g_proj.0.weight",  "mixer.g_proj.1.weight",
    "mixer.g_proj.1.bias",    "mixer.A_log",
    "mixer.dt_bias",          "mixer.o_norm.weight",
    "mlp.gate_proj.weight",   "mlp.up_proj.weight",
    "mlp.down_proj.weight",   "mlp.gate_proj.bias",
    "mlp.up_proj.bias",       "mlp.down_proj.bias",
};

constexpr std::string_view kLayers = "model.layers.";

// "model.layers.12.attn.q_proj.weight" -> prefix "model.layers.12.", rest "mixer.q_proj.weight"
bool split_layer(std::string_view name, std::string& prefix, std::string& rest) {
  if (!name.starts_with(kLayers)) return false;
  size_t i = kLayers.size();
  while (i < name.size() && name[i] >= '0' && name[i] <= '9') ++i;
  const size_t digits = i - kLayers.size();
  if (digits == 0 || digits > 9 || (digits > 1 && name[kLayers.size()] == '0')) return false;
  if (i >= name.size() || name[i] != '.') return false;
  prefix = name.substr(0, i + 1);
  const std::string_view tail = name.substr(i + 1);
  for (std::string_view mixer : {"self_attn.", "attn."}) {
    if (!tail.starts_with(mixer)) continue;
    rest = cat("mixer.", tail.substr(mixer.size()));
    return true;
  }
  rest = tail;
  return true;
}

std::string with_mixer(std::string_view rest, std::string_view mixer) {
  constexpr std::string_view kMixer = "mixer.";
  return rest.starts_with(kMixer) ? cat(mixer, rest.substr(kMixer.size())) : std::string(rest);
}

std::vector<std::string> spellings_of(const std::string& name) {
  std::vector<std::string> out;
  for (const auto& s : kTopSpellings)
    if (name == s.canonical) out.emplace_back(s.other);
  std::string prefix, rest;
  if (!split_layer(name, prefix, rest)) return out;
  std::vector<std::string_view> forms{rest};
  for (const auto& s : kLayerSpellings)
    if (rest == s.canonical) forms.push_back(s.other);
  for (std::string_view form : forms)
    for (std::string_view mixer : {"self_attn.", "attn."}) {
      std::string spelling = prefix + with_mixer(form, mixer);
      if (spelling != name && (out.empty() || out.back() != spelling)) out.push_back(std::move(spelling));
    }
  return out;
}
}  // namespace

std::string canonical_name(std::string_view name) {
  for (std::string_view top : kTopNames)
    if (name == top) return std::string(name);
  for (const auto& s : kTopSpellings)
    if (name == s.other) return std::string(s.canonical);
  std::string prefix, rest;
  if (!split_layer(name, prefix, rest)) return {};
  for (const auto& s : kLayerSpellings)
    if (rest == s.other) rest = s.canonical;
  for (std::string_view known : kLayerNames)
    if (rest == known) return prefix + with_mixer(rest, "self_attn.");
  return {};
}

bool is_computed_buffer(std::string_view name) {
  if (name == "model.rotary_emb.inv_freq") return true;
  std::string prefix, rest;
  return split_layer(name, prefix, rest) && (rest == "mixer.rotary_emb.inv_freq" || rest == "mixer.rotary.inv_freq");
}

std::vector<TensorSpec> tensor_table(const ModelConfig& c) {
  std::vector<TensorSpec> out;
  const auto add = [&](std::string name, Shape shape, std::string group, Init init = Init::normal) -> TensorSpec& {
    TensorSpec& t = out.emplace_back();
    t.name = std::move(name);
    t.spellings = spellings_of(t.name);
    t.shape = shape;
    t.file_shape.assign(shape.dim.begin(), shape.dim.begin() + shape.rank);
    t.init = init;
    t.decay = shape.rank == 2 && init == Init::normal;
    t.group = std::move(group);
    return t;
  };
  add("model.embed_tokens.weight", {c.vocabulary, c.width}, "embedding");
  for (size_t l = 0; l < c.layers.size(); ++l) {
    const LayerSpec& s = c.layers[l];
    const std::string layer = cat(kLayers, l, "."), mixer = layer + "self_attn.", mlp = layer + "mlp.";
    const size_t first = out.size();
    add(layer + "input_layernorm.weight", {c.width}, "norm", Init::ones);
    if (s.mixer == Mixer::full) {
      const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
      const struct {
        const char* name;
        int64_t rows, columns;
        bool bias;
      } projections[] = {{"q_proj", q, c.width, s.qkv_bias},
                         {"k_proj", kv, c.width, s.qkv_bias},
                         {"v_proj", kv, c.width, s.qkv_bias},
                         {"o_proj", c.width, q, s.o_bias}};
      for (const auto& p : projections) {
        add(cat(mixer, p.name, ".weight"), {p.rows, p.columns}, "attention");
        if (p.bias) add(cat(mixer, p.name, ".bias"), {p.rows}, "attention", Init::zeros);
      }
    } else {
      const int64_t k = s.kda_heads * s.K, v = s.kda_heads * s.V;
      add(mixer + "q_proj.weight", {k, c.width}, "kda");
      add(mixer + "k_proj.weight", {k, c.width}, "kda");
      add(mixer + "v_proj.weight", {v, c.width}, "kda");
      for (const auto& [name, channels] : {std::pair("q", k), std::pair("k", k), std::pair("v", v)})
        add(cat(mixer, name, "_conv1d.weight"), {channels, 4}, "kda", Init::conv).file_shape = {channels, 1, 4};
      add(mixer + "f_proj.0.weight", {s.V, c.width}, "kda");
      add(mixer + "f_proj.1.weight", {k, s.V}, "kda");
      add(mixer + "b_proj.weight", {s.kda_heads, c.width}, "kda");
      add(mixer + "g_proj.0.weight", {s.V, c.width}, "kda");
      add(mixer + "g_proj.1.weight", {v, s.V}, "kda");
      add(mixer + "g_proj.1.bias", {v}, "kda", Init::zeros);
      add(mixer + "A_log", {s.kda_heads}, "kda", Init::a_log).fp32 = true;
      add(mixer + "dt_bias", {k}, "kda", Init::dt_bias).fp32 = true;
      add(mixer + "o_norm.weight", {s.V}, "kda", Init::ones);
      add(mixer + "o_proj.weight", {c.width, v}, "kda");
    }
    add(layer + "post_attention_layernorm.weight", {c.width}, "norm", Init::ones);
    const struct {
      const char* name;
      int64_t rows, columns;
    } matrices[] = {
        {"gate_proj", s.mlp_width, c.width}, {"up_proj", s.mlp_width, c.width}, {"down_proj", c.width, s.mlp_width}};
    for (const auto& m : matrices) {
      if (&m == matrices && c.activation != Activation::swiglu) continue;
      add(cat(mlp, m.name, ".weight"), {m.rows, m.columns}, "mlp");
      if (s.mlp_bias) add(cat(mlp, m.name, ".bias"), {m.rows}, "mlp", Init::zeros);
    }
    for (size_t i = first; i < out.size(); ++i) out[i].layer = int64_t(l);
  }
  add("model.norm.weight", {c.width}, "norm", Init::ones);
  if (!c.tied_head) add("lm_head.weight", {c.vocabulary, c.width}, "head");
  return out;
}

}  // namespace kda
