#include "checkpoint/checkpoint.h"
#include "checkpoint/config_fields.h"
#include "checkpoint/json.h"

namespace kda {

GenerationDefaults parse_generation_config(std::string_view text, std::vector<std::string>& warnings,
                                           const std::string& where) {
  const nlohmann::json json = parse_json_object(text, where);
  const Fields f(json, where);
  check_generation_fields(json, where, warnings);
  GenerationDefaults g;
  const auto within = [&](const char* key, double lowest, double highest) {
    const auto v = f.number(key);
    KDA_CHECK(!v || (*v >= lowest && *v <= highest), where, ": ", key, " is ", v.value_or(0), ", needed from ", lowest,
              " to ", highest);
    return v;
  };
  g.do_sample = f.boolean("do_sample");
  g.temperature = within("temperature", 0, 1e6);
  g.top_p = within("top_p", 0, 1);
  g.min_p = within("min_p", 0, 1);
  g.typical_p = within("typical_p", 0, 1);
  g.repetition_penalty = within("repetition_penalty", 1e-6, 1e6);
  g.top_k = f.integer("top_k", 0, INT32_MAX);
  g.max_new_tokens = f.integer("max_new_tokens", 0, INT64_MAX);
  g.min_new_tokens = f.integer("min_new_tokens", 0, INT64_MAX);
  g.max_length = f.integer("max_length", 0, INT64_MAX);
  g.no_repeat_ngram_size = f.integer("no_repeat_ngram_size", 0, INT32_MAX);
  const auto id = [&](const char* key) -> std::optional<int32_t> {
    const auto v = f.integer(key, -1, INT32_MAX);
    return v && *v >= 0 ? std::optional(int32_t(*v)) : std::nullopt;
  };
  g.bos = id("bos_token_id");
  g.pad = id("pad_token_id");
  for (int64_t v : f.integers("eos_token_id", -1, INT32_MAX))
    if (v >= 0) g.eos.push_back(int32_t(v));
  if (const auto* stop = f.find("stop_strings")) {
    const auto one = [&](const nlohmann::json& s) {
      KDA_CHECK(s.is_string() && !s.get_ref<const std::string&>().empty(), where,
                ": stop_strings must be a string or a list of strings, none of them empty");
      g.stop_strings.push_back(s.get<std::string>());
    };
    if (stop->is_array())
      for (const auto& s : *stop) one(s);
    else
      one(*stop);
  }
  return g;
}

}  // namespace kda
