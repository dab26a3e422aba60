#include "checkpoint/config_fields.h"

#include <algorithm>
#include <span>
#include <string_view>

#include "base/error.h"

namespace kda {

using nlohmann::json;

namespace {
// A field that changes the result unless it is absent, null, false, empty, or has this value.
struct Refused {
  std::string_view name;
  double neutral;
};

constexpr double kNone = -1e300;  // no number is neutral

constexpr Refused kConfigRefused[] = {
    {"sliding_window", kNone},
    {"attn_logit_softcapping", 0},
    {"final_logit_softcapping", 0},
    {"logit_scale", 1},
    {"logits_scaling", 1},
    {"embedding_multiplier", 1},
    {"residual_multiplier", 1},
    {"attention_multiplier", kNone},
    {"query_pre_attn_scalar", kNone},
    {"attention_chunk_size", kNone},
    {"num_experts", 0},
    {"num_local_experts", 0},
    {"n_routed_experts", 0},
    {"quantization_config", kNone},
    {"partial_rotary_factor", 1},
    {"rope_interleaved", 0},
    {"qk_norm", 0},
    {"use_qk_norm", 0},
    {"attnres_block_size", kNone},
    {"conv_bias", 0},
    {"clip_qkv", kNone},
    {"q_lora_rank", kNone},
    {"kv_lora_rank", kNone},
    {"is_encoder_decoder", 0},
    {"add_cross_attention", 0},
    {"num_nextn_predict_layers", 0},
    {"window_size", kNone},
    {"no_rope_layer_interval", kNone},
    {"use_output_gate", 1},
    {"scale_embedding", 0},
    {"mup_enabled", 0},
    {"attention_out_bias", 0},
    {"use_bias", 0},
};
constexpr std::string_view kConfigKnown[] = {
    // read by parse_config
    "model_type",
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "norm_eps",
    "rms_norm_eps",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "num_hidden_layers",
    "intermediate_size",
    "hidden_ratio",
    "attn",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "lower_bound",
    "safe_gate",
    "allow_neg_eigval",
    "no_rope_layers",
    "layer_types",
    "linear_attn_config",
    "use_short_conv",
    "conv_size",
    "num_heads",
    "num_v_heads",
    "expand_v",
    // cannot change the result
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "_attn_implementation",
    "attn_mode",
    "auto_map",
    "chunk_size_feed_forward",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "license",
    "max_window_layers",
    "model_name",
    "name",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
    "use_l2warp",
    "use_sliding_window",
    "vocab_size_padded",
    "finetuning_task",
    "use_return_dict",
};
constexpr Refused kAttnRefused[] = {{"window_size", kNone}, {"qk_norm", 0}};
constexpr std::string_view kAttnKnown[] = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "rope_theta"};

constexpr Refused kGenerationRefused[] = {
    {"num_beams", 1},
    {"num_beam_groups", 1},
    {"penalty_alpha", 0},
    {"dola_layers", kNone},
    {"constraints", kNone},
    {"force_words_ids", kNone},
    {"bad_words_ids", kNone},
    {"sequence_bias", kNone},
    {"forced_bos_token_id", kNone},
    {"forced_eos_token_id", kNone},
    {"suppress_tokens", kNone},
    {"begin_suppress_tokens", kNone},
    {"forced_decoder_ids", kNone},
    {"guidance_scale", 1},
    {"epsilon_cutoff", 0},
    {"eta_cutoff", 0},
    {"top_h", kNone},
    {"encoder_no_repeat_ngram_size", 0},
    {"encoder_repetition_penalty", 1},
    {"exponential_decay_length_penalty", kNone},
    {"watermarking_config", kNone},
    {"min_length", 0},
    {"max_time", kNone},
    {"token_healing", 0},
    {"num_return_sequences", 1},
    {"remove_invalid_values", 0},
    {"custom_generate", kNone},
};
constexpr std::string_view kGenerationKnown[] = {
    // read
    "do_sample",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "top_k",
    "max_new_tokens",
    "min_new_tokens",
    "max_length",
    "no_repeat_ngram_size",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "stop_strings",
    // cannot change the text: bookkeeping, speed, or settings of beam search, which is refused itself
    "_from_model_config",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "cache_implementation",
    "cache_config",
    "low_memory",
    "renormalize_logits",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "decoder_start_token_id",
    "generation_kwargs",
    "_commit_hash",
    "trust_remote_code",
    "chat_format",
    "max_window_size",
    "continuous_batching_config",
    "use_mtp",
};

bool neutral(const json& v, double number) {
  if (v.is_null() || v == false || ((v.is_array() || v.is_object()) && v.empty())) return true;
  if (v.is_boolean()) return number == 1;
  return v.is_number() && v.get<double>() == number;
}

void check(const json& object, std::span<const Refused> refused, std::span<const std::string_view> known,
           const std::string& where, std::vector<std::string>& warnings) {
  for (const auto& item : object.items()) {
    const std::string& key = item.key();
    const json& value = item.value();
    const auto r = std::find_if(refused.begin(), refused.end(), [&](const Refused& x) { return x.name == key; });
    if (r != refused.end()) {
      // Qwen-style configs carry a window they do not use.
      if (key == "sliding_window" && object.contains("use_sliding_window") && object["use_sliding_window"] == false)
        continue;
      KDA_CHECK(neutral(value, r->neutral), where, ": ", key, " = ",
                value.is_structured() ? std::string("{..}") : value.dump().substr(0, 60),
                " would change the result and is not supported");
      continue;
    }
    if (std::find(known.begin(), known.end(), key) == known.end())
      warnings.push_back(cat(where, ": unknown field '", key, "' was ignored"));
  }
}
}  // namespace

void check_config_fields(const json& o, const std::string& where, std::vector<std::string>& warnings) {
  check(o, kConfigRefused, kConfigKnown, where, warnings);
}

void check_attn_fields(const json& o, const std::string& where, std::vector<std::string>& warnings) {
  check(o, kAttnRefused, kAttnKnown, where, warnings);
}

void check_generation_fields(const json& o, const std::string& where, std::vector<std::string>& warnings) {
  check(o, kGenerationRefused, kGenerationKnown, where, warnings);
}

}  // namespace kda
