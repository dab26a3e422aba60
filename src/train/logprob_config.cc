#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/json.h"
#include "train/logprob_codec.h"

namespace kda {

namespace {

using nlohmann::json;

CodecDtype dtype_named(const std::string& name, const std::string& where) {
  for (CodecDtype t : {CodecDtype::float16, CodecDtype::bfloat16, CodecDtype::float32, CodecDtype::float64})
    if (name == name_of(t)) return t;
  throw Error(cat(where, ": needed float16, bfloat16, float32 or float64, got ", name));
}

void known(const json& j, const std::set<std::string>& keys, const std::string& where) {
  for (const auto& [key, value] : j.items()) KDA_CHECK(keys.count(key), where, ": unknown key ", key);
}

int64_t needed(const Fields& f, const char* key) {
  const auto v = f.integer(key, 0, INT64_MAX);
  KDA_CHECK(v, f.where(), ": needs ", key);
  return *v;
}

const json* list(const Fields& f, const char* key) {
  const json* v = f.find(key);
  KDA_CHECK(!v || v->is_array(), f.where(), ".", key, ": needed a list");
  return v;
}

}  // namespace

LogprobCodecConfig parse_codec_config(std::string_view text, const std::string& where) {
  const json j = parse_json_object(text, where);
  known(j,
        {"d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins", "delta_encoding",
         "error_diffusion", "normalize_t"},
        where);
  const Fields f(j, where);
  LogprobCodecConfig c;
  c.d = needed(f, "d");
  c.k = needed(f, "k");
  c.exact_k = needed(f, "exact_k");
  if (const auto v = f.string("exact_dtype")) c.exact_dtype = dtype_named(*v, where + ".exact_dtype");
  if (const auto v = f.string("term_dtype")) c.term_dtype = dtype_named(*v, where + ".term_dtype");
  c.delta_encoding = f.boolean("delta_encoding").value_or(true);
  c.error_diffusion = f.boolean("error_diffusion").value_or(false);
  c.normalize_t = f.boolean("normalize_t").value_or(false);
  if (const json* terms = list(f, "polynomial_terms"))
    for (const json& t : *terms) {
      const bool power = t.is_number_integer() && t >= 0 && t <= 64;
      KDA_CHECK(power || t == "sqrt" || t == "exp", where,
                ".polynomial_terms: needed powers 0..64, \"sqrt\" or \"exp\", got ", t.dump());
      c.polynomial_terms.push_back(power         ? CodecTerm{.exponent = t.get<int>()}
                                   : t == "sqrt" ? CodecTerm{.kind = CodecTerm::sqrt}
                                                 : CodecTerm{.kind = CodecTerm::exp});
    }
  if (const json* bins = list(f, "residual_bins"))
    for (const json& b : *bins) {
      const std::string at = where + ".residual_bins";
      KDA_CHECK(b.is_object(), at, ": needed objects");
      known(b, {"scale_dtype", "element_bits", "num_elements"}, at);
      const Fields e(b, at);
      const auto scale = e.string("scale_dtype");
      KDA_CHECK(scale, at, ": needs scale_dtype");
      c.residual_bins.push_back({.scale_dtype = dtype_named(*scale, at + ".scale_dtype"),
                                 .element_bits = needed(e, "element_bits"),
                                 .num_elements = needed(e, "num_elements")});
    }
  return c;
}

std::string to_json(const LogprobCodecConfig& c) {
  json terms = json::array(), bins = json::array();
  for (const CodecTerm& t : c.polynomial_terms)
    if (t.kind == CodecTerm::power)
      terms.push_back(t.exponent);
    else
      terms.push_back(t.kind == CodecTerm::sqrt ? "sqrt" : "exp");
  for (const ResidualBin& b : c.residual_bins)
    bins.push_back(
        {{"scale_dtype", name_of(b.scale_dtype)}, {"element_bits", b.element_bits}, {"num_elements", b.num_elements}});
  return json{{"d", c.d},
              {"k", c.k},
              {"exact_k", c.exact_k},
              {"exact_dtype", name_of(c.exact_dtype)},
              {"polynomial_terms", terms},
              {"term_dtype", name_of(c.term_dtype)},
              {"residual_bins", bins},
              {"delta_encoding", c.delta_encoding},
              {"error_diffusion", c.error_diffusion},
              {"normalize_t", c.normalize_t}}
      .dump();
}

}  // namespace kda
