#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/config.h"

namespace kda {

namespace {
using Json = nlohmann::ordered_json;

Json rope_json(const RopeConfig& r) {
  Json j = {{"rope_theta", r.theta}};
  switch (r.kind) {
    case RopeKind::standard: j["rope_type"] = "default"; break;
    case RopeKind::linear: j["rope_type"] = "linear"; break;
    case RopeKind::llama3: j["rope_type"] = "llama3"; break;
    case RopeKind::yarn: j["rope_type"] = "yarn"; break;
  }
  if (r.kind != RopeKind::standard) j["factor"] = r.factor;
  if (r.kind == RopeKind::llama3 || r.kind == RopeKind::yarn)
    j["original_max_position_embeddings"] = r.original_max_position_embeddings;
  if (r.kind == RopeKind::llama3) {
    j["low_freq_factor"] = r.low_freq_factor;
    j["high_freq_factor"] = r.high_freq_factor;
  }
  if (r.kind == RopeKind::yarn) {
    j["beta_fast"] = r.beta_fast;
    j["beta_slow"] = r.beta_slow;
    if (r.attention_factor) j["attention_factor"] = *r.attention_factor;
    if (r.mscale) j["mscale"] = *r.mscale;
    if (r.mscale_all_dim) j["mscale_all_dim"] = *r.mscale_all_dim;
    if (!r.truncate) j["truncate"] = false;
  }
  return j;
}

const char* dtype_name(Dtype t) {
  switch (t) {
    case Dtype::bf16: return "bfloat16";
    case Dtype::f16: return "float16";
    case Dtype::f32: return "float32";
    default: throw Error(cat("write_config: weights cannot be stored in ", name_of(t)));
  }
}
}  // namespace

std::string write_config(const ModelConfig& c) {
  KDA_CHECK(!c.layers.empty(), "write_config: a model without layers");
  // One set of fields stands for all layers of a kind.
  const LayerSpec *full = nullptr, *kda = nullptr;
  for (const LayerSpec& s : c.layers) {
    const LayerSpec*& first = s.mixer == Mixer::kda ? kda : full;
    if (!first) first = &s;
    const LayerSpec &a = *first, &any = c.layers[0];
    const bool same = s.mixer == Mixer::kda
                          ? a.bounded_gate == s.bounded_gate && a.lower_bound == s.lower_bound &&
                                a.allow_neg_eigval == s.allow_neg_eigval
                          : a.heads == s.heads && a.kv_heads == s.kv_heads && a.head_dim == s.head_dim &&
                                a.qkv_bias == s.qkv_bias && a.o_bias == s.o_bias;
    KDA_CHECK(same && s.mlp_width == any.mlp_width && s.mlp_bias == any.mlp_bias, "write_config: layer ",
              &s - c.layers.data(), " differs from others of its kind; config.json has one set of sizes for all");
  }
  KDA_CHECK(!full || full->qkv_bias == full->o_bias,
            "write_config: biases on q, k, v but not on o cannot be written as ", "attention_bias");
  const bool relu2 = c.activation == Activation::relu2;
  Json j;
  const char* type = kda ? "arcee_kda" : relu2 ? "arcee" : "llama";
  j["architectures"] = {kda ? "ArceeKDAForCausalLM" : relu2 ? "ArceeForCausalLM" : "LlamaForCausalLM"};
  j["model_type"] = type;
  j["hidden_act"] = relu2 ? "relu2" : "silu";
  j["vocab_size"] = c.vocabulary;
  j["hidden_size"] = c.width;
  j["intermediate_size"] = c.layers[0].mlp_width;
  j["num_hidden_layers"] = c.layers.size();
  // A model of KDA layers alone says its heads too: readers expect the fields, and the sizes are the tensors'.
  j["num_attention_heads"] = full ? full->heads : kda->kda_heads;
  j["num_key_value_heads"] = full ? full->kv_heads : kda->kda_heads;
  j["head_dim"] = full ? full->head_dim : kda->K;
  if (full) j["attention_bias"] = full->qkv_bias;
  j["mlp_bias"] = c.layers[0].mlp_bias;
  j["rms_norm_eps"] = c.norm_eps;
  j["tie_word_embeddings"] = c.tied_head;
  j["dtype"] = dtype_name(c.dtype);
  j["max_position_embeddings"] = c.max_positions;
  if (c.bos) j["bos_token_id"] = *c.bos;
  if (c.eos.size() == 1) j["eos_token_id"] = c.eos[0];
  if (c.eos.size() > 1) j["eos_token_id"] = c.eos;
  if (c.pad) j["pad_token_id"] = *c.pad;
  const bool rope = std::any_of(c.layers.begin(), c.layers.end(),
                                [](const LayerSpec& s) { return s.rope && s.mixer == Mixer::full; });
  if (rope) j["rope_parameters"] = rope_json(c.rope);
  if (kda) {
    if (kda->bounded_gate) j["lower_bound"] = kda->lower_bound;
    if (kda->allow_neg_eigval) j["allow_neg_eigval"] = true;
    Json types = Json::array(), rotary = Json::array();
    for (const LayerSpec& s : c.layers) {
      types.push_back(s.mixer == Mixer::kda ? "linear_attention" : "full_attention");
      rotary.push_back(s.mixer == Mixer::full && s.rope ? 1 : 0);
    }
    j["layer_types"] = types;
    if (full) j["no_rope_layers"] = rotary;
  } else {
    bool every = true;
    Json rotary = Json::array();
    for (const LayerSpec& s : c.layers) {
      rotary.push_back(s.rope ? 1 : 0);
      every = every && s.rope;
    }
    if (!every) j["no_rope_layers"] = rotary;
  }
  return j.dump(2) + "\n";
}

}  // namespace kda
