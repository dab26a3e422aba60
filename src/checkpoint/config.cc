#include "checkpoint/config.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "checkpoint/config_fields.h"
#include "checkpoint/json.h"
#include "checkpoint/tensor_table.h"

namespace kda {

namespace {
// Far above any model, and such that no sum over all layers of a product of two leaves 64 bits.
constexpr int64_t kMaxSize = int64_t(1) << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHead = 1 << 16;

// Tensors under canonical names; only those of the table's world, the rest is for the loader to complain about.
struct Tensors {
  std::map<std::string, std::vector<int64_t>> shapes;
  int64_t layers = 0;  // one more than the largest layer number met

  const std::vector<int64_t>* find(const std::string& name) const {
    const auto it = shapes.find(name);
    return it == shapes.end() ? nullptr : &it->second;
  }
  // First dimension, or all elements of a vector however many dimensions it was given; 0 when absent or absurd.
  int64_t rows(const std::string& name) const {
    const auto* s = find(name);
    return s && !s->empty() && s->front() > 0 && s->front() <= kMaxSize ? s->front() : 0;
  }
  int64_t elements(const std::string& name) const {
    const auto* s = find(name);
    if (!s) return 0;
    int64_t n = 1;
    for (int64_t d : *s) {
      if (d < 1 || d > kMaxSize || n > kMaxSize / d) return 0;
      n *= d;
    }
    return n;
  }
};

std::string mixer_of(int64_t layer) { return cat("model.layers.", layer, ".self_attn."); }

Tensors canonical(const TensorShapes& given) {
  Tensors out;
  for (const auto& [name, shape] : given) {
    const std::string c = canonical_name(name);
    if (c.empty()) continue;
    out.shapes.emplace(c, shape);
    if (c.starts_with("model.layers.")) out.layers = std::max<int64_t>(out.layers, std::stol(c.substr(13)) + 1);
  }
  return out;
}

const char* name_of(Mixer m) { return m == Mixer::kda ? "KDA" : "full attention"; }

// A source that says what each layer is: layer number (from 0) -> kind.
struct KindSource {
  std::string name;
  std::vector<std::optional<Mixer>> kinds;
};

void read_kind_sources(const Fields& f, int64_t layers, std::vector<KindSource>& out) {
  const auto listed = [&](const std::string& name) -> KindSource& {
    return out.emplace_back(KindSource{name, std::vector<std::optional<Mixer>>(size_t(layers))});
  };
  if (const auto* types = f.find("layer_types")) {
    KDA_CHECK(types->is_array() && types->size() == size_t(layers), f.where(), ": layer_types must be a list of ",
              layers, " names, one for each layer");
    auto& s = listed("layer_types");
    for (size_t l = 0; l < size_t(layers); ++l) {
      const auto& t = (*types)[l];
      if (t == "full_attention")
        s.kinds[l] = Mixer::full;
      else if (t == "linear_attention")
        s.kinds[l] = Mixer::kda;
      else
        throw Error(cat(f.where(), ": layer_types of layer ", l, " is ", t.is_string() ? t.dump() : "no string",
                        ", known are full_attention and linear_attention"));
    }
  }
  if (const auto attn = f.object("attn")) {
    auto& s = listed("attn.layers");
    s.kinds.assign(size_t(layers), Mixer::kda);
    KDA_CHECK(attn->has("layers"), attn->where(), ": layers is missing");
    for (int64_t l : attn->integers("layers", 0, layers - 1)) s.kinds[size_t(l)] = Mixer::full;
  }
  if (const auto linear = f.object("linear_attn_config")) {
    auto& s = listed("linear_attn_config");
    for (const auto& [key, kind] : {std::pair("kda_layers", Mixer::kda), std::pair("full_attn_layers", Mixer::full)})
      for (int64_t l : linear->integers(key, 1, layers)) s.kinds[size_t(l - 1)] = kind;
  }
}

RopeConfig read_rope(const Fields& f, std::optional<double> fla_theta) {
  RopeConfig r;
  const auto scaling = f.object(f.has("rope_parameters") ? "rope_parameters" : "rope_scaling");  // new and old style
  if (fla_theta) r.theta = *fla_theta;
  if (const auto theta = f.number("rope_theta")) r.theta = *theta;
  if (scaling) {
    for (const auto& [key, v] : scaling->raw().items())
      KDA_CHECK(!v.is_structured(), scaling->where(), ": ", key,
                " holds settings of its own; only one rotary setting for all layers can be used");
    if (const auto theta = scaling->number("rope_theta")) r.theta = *theta;
    std::string type = scaling->string("rope_type").value_or(scaling->string("type").value_or("default"));
    if (type == "default")
      r.kind = RopeKind::standard;
    else if (type == "linear")
      r.kind = RopeKind::linear;
    else if (type == "llama3")
      r.kind = RopeKind::llama3;
    else if (type == "yarn")
      r.kind = RopeKind::yarn;
    else
      throw Error(
          cat(scaling->where(), ": rope_type '", type, "' is not known; known are default, linear, llama3, yarn"));
    const auto need = [&](const char* key) {
      const auto v = scaling->number(key);
      KDA_CHECK(v, scaling->where(), ": ", key, " is missing, rope_type ", type, " needs it");
      return *v;
    };
    const double trained = double(f.integer("max_position_embeddings", 0, INT64_MAX).value_or(0));
    if (r.kind != RopeKind::standard) r.factor = need("factor");
    if (r.kind == RopeKind::llama3 || r.kind == RopeKind::yarn) {
      auto original = scaling->number("original_max_position_embeddings");
      if (!original) original = f.number("original_max_position_embeddings");
      r.original_max_position_embeddings = original.value_or(trained);
      KDA_CHECK(r.original_max_position_embeddings >= 1, scaling->where(), ": original_max_position_embeddings is ",
                r.original_max_position_embeddings, ", needed at least 1");
    }
    if (r.kind == RopeKind::llama3) {
      r.low_freq_factor = need("low_freq_factor");
      r.high_freq_factor = need("high_freq_factor");
      KDA_CHECK(r.low_freq_factor > 0 && r.high_freq_factor > r.low_freq_factor, scaling->where(),
                ": needed 0 < low_freq_factor < high_freq_factor, found ", r.low_freq_factor, " and ",
                r.high_freq_factor);
    }
    if (r.kind == RopeKind::yarn) {
      const auto positive = [&](const char* key, double otherwise) {
        const double v = scaling->number(key).value_or(0);  // 0 means the default, as in transformers
        KDA_CHECK(v >= 0, scaling->where(), ": ", key, " is ", v, ", needed above 0");
        return v > 0 ? v : otherwise;
      };
      r.beta_fast = positive("beta_fast", 32);
      r.beta_slow = positive("beta_slow", 1);
      r.attention_factor = scaling->number("attention_factor");
      r.mscale = scaling->number("mscale");
      r.mscale_all_dim = scaling->number("mscale_all_dim");
      r.truncate = scaling->boolean("truncate").value_or(true);
    }
    const double partial = scaling->number("partial_rotary_factor").value_or(1);
    KDA_CHECK(partial == 1, scaling->where(), ": partial_rotary_factor ", partial, " cannot be honoured, only 1");
  }
  KDA_CHECK(r.theta > 1 && r.theta <= 1e30, f.where(), ": rope_theta is ", r.theta, ", needed above 1");
  KDA_CHECK(r.factor > 0 && r.factor <= 1e9, f.where(), ": rotary factor is ", r.factor, ", needed above 0");
  return r;
}

std::vector<int32_t> ids(const Fields& f, const char* key) {
  std::vector<int32_t> out;
  for (int64_t id : f.integers(key, -1, INT32_MAX))
    if (id >= 0) out.push_back(int32_t(id));  // -1 stands for none in old files
  return out;
}

// Sizes of a KDA layer, from its tensors.
void read_kda_sizes(const Tensors& t, int64_t layer, const std::string& where, LayerSpec& s) {
  const std::string at = cat(where, ": layer ", layer, " (KDA): ");
  const std::string m = mixer_of(layer);
  const int64_t H = t.elements(m + "A_log"), q = t.rows(m + "q_proj.weight"), v = t.rows(m + "v_proj.weight");
  KDA_CHECK(H > 0, at, "A_log has no usable shape");
  KDA_CHECK(q > 0 && v > 0, at, "q_proj and v_proj are needed to know its sizes, and one is missing or without rows");
  s.kda_heads = H;
  KDA_CHECK(q % H == 0, at, "q_proj has ", q, " rows, not a multiple of the ", H, " heads of A_log");
  s.K = q / H;
  s.V = t.elements(m + "o_norm.weight");
  if (!s.V) {  // missing: the loader will list it; guess so that the rest can be compared
    KDA_CHECK(v % H == 0, at, "v_proj has ", v, " rows, not a multiple of the ", H, " heads of A_log");
    s.V = v / H;
  }
  KDA_CHECK(s.K <= kMaxHead && s.V <= kMaxHead, at, "heads of K = ", s.K, " and V = ", s.V, " are wider than ",
            kMaxHead);
  KDA_CHECK(H <= kMaxSize / s.V, at, H, " heads of V = ", s.V, " are too many");
  KDA_CHECK(v == H * s.V || v % s.V != 0 || v / s.V <= H, at, "grouped values (", v / s.V, " value heads over ", H,
            " heads) are not supported");
  for (const char* conv : {"q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"})
    if (const auto* shape = t.find(m + conv); shape && !shape->empty())
      KDA_CHECK(shape->back() == 4, at, conv, " is ", shape->back(), " taps wide, only 4 are supported");
}

// fla's fields and Kimi's, where present, against what the tensors say.
void check_kda_fields(const Fields& f, const std::vector<LayerSpec>& layers) {
  KDA_CHECK(f.boolean("use_short_conv").value_or(true), f.where(),
            ": use_short_conv false is not supported: KDA layers without convolutions");
  const int64_t taps = f.integer("conv_size", 0, kMaxSize).value_or(4);
  KDA_CHECK(taps == 4, f.where(), ": conv_size ", taps, " is not supported, only 4");
  const auto heads = f.integer("num_heads", 1, kMaxSize), head = f.integer("head_dim", 1, kMaxHead),
             v_heads = f.integer("num_v_heads", 1, kMaxSize);
  const double expand = f.number("expand_v").value_or(1);
  const bool fla = f.string("model_type") == "kda";
  const auto linear = f.object("linear_attn_config");
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSpec& s = layers[l];
    if (s.mixer != Mixer::kda) continue;
    const auto agree = [&](const std::string& field, std::optional<int64_t> says, int64_t tensors, const char* what) {
      KDA_CHECK(!says || *says == tensors, f.where(), ": layer ", l, ": ", field, " says ", what, " = ",
                says.value_or(0), ", the tensors say ", tensors);
    };
    if (fla) {
      agree("num_heads", heads, s.kda_heads, "H");
      agree("head_dim", head, s.K, "K");
      if (head)
        agree("head_dim * expand_v", int64_t(std::llround(std::clamp(double(*head) * expand, 0.0, 1e15))), s.V, "V");
      KDA_CHECK(!v_heads || *v_heads == s.kda_heads, f.where(), ": num_v_heads ", v_heads.value_or(0), " over ",
                s.kda_heads, " heads: grouped values are not supported");
    }
    if (linear) {
      agree("linear_attn_config.num_heads", linear->integer("num_heads", 1, kMaxSize), s.kda_heads, "H");
      agree("linear_attn_config.head_dim", linear->integer("head_dim", 1, kMaxHead), s.K, "K");
      agree("linear_attn_config.short_conv_kernel_size", linear->integer("short_conv_kernel_size", 1, kMaxSize), 4,
            "convolution taps");
    }
  }
}

Activation read_activation(const Fields& f, const std::string& type) {
  const bool arcee = type.starts_with("arcee");
  const std::string act = f.string("hidden_act").value_or(arcee ? "relu2" : "silu");
  if (act == "relu2" && arcee) return Activation::relu2;
  // arcee itself has no gated form; students made from gated teachers do.
  if ((act == "silu" || act == "swish") && type != "arcee") return Activation::swiglu;
  throw Error(cat(f.where(), ": hidden_act '", act, "' is not supported for model_type ", type, "; needed ",
                  type == "arcee" ? "relu2"
                  : arcee         ? "relu2 or silu"
                                  : "silu"));
}

Dtype read_dtype(const Fields& f) {
  const auto name = f.has("dtype") ? f.string("dtype") : f.string("torch_dtype");
  if (!name || *name == "bfloat16") return Dtype::bf16;
  if (*name == "float16") return Dtype::f16;
  KDA_CHECK(*name == "float32" || *name == "auto", f.where(), ": dtype '", *name,
            "' is not supported; needed bfloat16, float16 or float32");
  return Dtype::f32;
}
}  // namespace

ModelConfig parse_config(std::string_view text, const TensorShapes& given, const std::string& where) {
  const nlohmann::json json = parse_json_object(text, where);
  const Fields f(json, where);
  ModelConfig c;
  c.text = text;
  const auto type = f.string("model_type");
  KDA_CHECK(type, where, ": model_type is missing; known are arcee, arcee_kda, kda, llama");
  c.model_type = *type;
  KDA_CHECK(*type == "arcee" || *type == "arcee_kda" || *type == "kda" || *type == "llama", where, ": model_type '",
            *type, "' is not supported; known are arcee, arcee_kda, kda, llama");
  const bool fla = *type == "kda";
  check_config_fields(json, where, c.warnings);

  const auto need = [&](const Fields& from, const char* key, int64_t highest) {
    const auto v = from.integer(key, 1, highest);
    KDA_CHECK(v, from.where(), ": ", key, " is missing");
    return *v;
  };
  c.vocabulary = need(f, "vocab_size", kMaxSize);
  c.width = need(f, "hidden_size", kMaxSize);
  c.activation = read_activation(f, *type);
  c.norm_eps = f.number(fla ? "norm_eps" : "rms_norm_eps").value_or(fla || *type == "llama" ? 1e-6 : 1e-5);
  KDA_CHECK(c.norm_eps > 0 && c.norm_eps < 1, where, ": norm eps is ", c.norm_eps, ", needed between 0 and 1");
  c.tied_head = f.boolean("tie_word_embeddings").value_or(false);
  c.dtype = read_dtype(f);
  c.max_positions = f.integer("max_position_embeddings", 0, INT64_MAX).value_or(0);
  if (const auto v = ids(f, "bos_token_id"); !v.empty()) c.bos = v[0];
  if (const auto v = ids(f, "pad_token_id"); !v.empty()) c.pad = v[0];
  c.eos = ids(f, "eos_token_id");

  const Tensors tensors = canonical(given);
  const int64_t layers = need(f, "num_hidden_layers", kMaxLayers);
  KDA_CHECK(layers == tensors.layers, where, ": num_hidden_layers is ", layers, ", the tensors are those of ",
            tensors.layers, " layers");

  // One MLP width for all layers, whose tensors the table checks one by one. fla may leave it to a formula: then each
  // layer's tensors say it.
  const int64_t mlp = f.integer("intermediate_size", 1, kMaxSize).value_or(0);
  KDA_CHECK(mlp || fla, where, ": intermediate_size is missing");

  // Full attention.
  const auto attn = f.object("attn");
  std::optional<double> fla_theta;
  if (attn) {
    check_attn_fields(attn->raw(), attn->where(), c.warnings);
    fla_theta = attn->number("rope_theta");
    KDA_CHECK(!attn->raw().contains("rope_theta") || fla_theta, attn->where(), ": rope_theta is null, needed a number");
  }
  c.rope = read_rope(f, fla_theta);
  LayerSpec full;
  const auto read_full = [&](int64_t layer) {
    if (full.heads) return;
    if (fla) {
      KDA_CHECK(attn, where, ": layer ", layer,
                " has no A_log, so it is full attention, but there is no attn in the config");
      full.heads = need(*attn, "num_heads", kMaxSize);
      full.kv_heads = attn->integer("num_kv_heads", 1, kMaxSize).value_or(full.heads);
      full.qkv_bias = attn->boolean("qkv_bias").value_or(false);
    } else {
      full.heads = need(f, "num_attention_heads", kMaxSize);
      full.kv_heads = f.integer("num_key_value_heads", 1, kMaxSize).value_or(full.heads);
      full.qkv_bias = full.o_bias = f.boolean("attention_bias").value_or(false);
      full.head_dim = f.integer("head_dim", 1, kMaxHead).value_or(0);
    }
    if (!full.head_dim) {
      KDA_CHECK(c.width % full.heads == 0, where, ": hidden_size ", c.width, " is not a multiple of the ", full.heads,
                " heads, and head_dim is not given");
      full.head_dim = c.width / full.heads;
    }
    KDA_CHECK(full.heads % full.kv_heads == 0, where, ": ", full.heads, " query heads cannot share ", full.kv_heads,
              " key/value heads evenly");
    KDA_CHECK(full.head_dim <= kMaxHead && full.heads <= kMaxSize / full.head_dim, where, ": ", full.heads,
              " heads of ", full.head_dim, " are too many");
  };

  // KDA's gate: fla computes the bounded one exactly when lower_bound is given.
  const auto lower = f.number("lower_bound");
  KDA_CHECK(lower || !f.boolean("safe_gate").value_or(false), where, ": safe_gate needs a lower_bound");
  KDA_CHECK(!lower || (*lower >= -5 && *lower < 0), where, ": lower_bound is ", lower.value_or(0),
            ", needed in [-5, 0)");
  const bool neg = f.boolean("allow_neg_eigval").value_or(false);
  const bool mlp_bias = !fla && f.boolean("mlp_bias").value_or(false);

  std::vector<int64_t> rotary;
  if (f.has("no_rope_layers")) {
    rotary = f.integers("no_rope_layers", 0, 1);
    KDA_CHECK(rotary.size() == size_t(layers), where, ": no_rope_layers has ", rotary.size(),
              " entries, needed one for each of ", layers, " layers");
  }
  std::vector<KindSource> sources;
  read_kind_sources(f, layers, sources);

  for (int64_t l = 0; l < layers; ++l) {
    const bool kda = tensors.find(mixer_of(l) + "A_log");
    for (const auto& s : sources)
      if (const auto says = s.kinds[size_t(l)])
        KDA_CHECK((*says == Mixer::kda) == kda, where, ": layer ", l, ": ", s.name, " says ", name_of(*says),
                  ", the tensors say ", name_of(kda ? Mixer::kda : Mixer::full),
                  kda ? " (there is an A_log)" : " (there is no A_log)");
    LayerSpec s;
    if (kda) {
      s.mixer = Mixer::kda;
      read_kda_sizes(tensors, l, where, s);
      s.bounded_gate = lower.has_value();
      s.lower_bound = lower.value_or(-5);
      s.allow_neg_eigval = neg;
      s.rope = false;
    } else {
      read_full(l);
      s = full;
      if (!rotary.empty()) s.rope = rotary[size_t(l)] == 1;
      KDA_CHECK(!s.rope || s.head_dim % 2 == 0, where, ": head_dim ", s.head_dim,
                " is odd, rotary positions need pairs");
    }
    s.mlp_width = mlp ? mlp : tensors.rows(cat("model.layers.", l, ".mlp.up_proj.weight"));
    KDA_CHECK(s.mlp_width, where, ": layer ", l,
              ": neither intermediate_size nor a usable mlp.up_proj says how wide the MLP is");
    s.mlp_bias = mlp_bias;
    c.layers.push_back(s);
  }
  check_kda_fields(f, c.layers);
  return c;
}

int64_t ModelConfig::parameters() const {
  int64_t n = 0;
  for (const auto& t : tensor_table(*this)) n += t.shape.size();
  return n;
}

int64_t ModelConfig::state_bytes() const {
  int64_t n = 0;
  for (const auto& s : layers)
    if (s.mixer == Mixer::kda) n += 4 * s.kda_heads * (s.V * s.K + 3 * (2 * s.K + s.V));
  return n;
}

int64_t ModelConfig::kv_bytes_per_token(Dtype kept) const {
  int64_t n = 0;
  for (const auto& s : layers)
    if (s.mixer == Mixer::full) n += 2 * s.kv_heads * s.head_dim * int64_t(size_of(kept));
  return n;
}

}  // namespace kda
