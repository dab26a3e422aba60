#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>

#include "base/error.h"
#include "base/progress.h"
#include "cli/inspect.h"

namespace kda::cli {

namespace {
using Json = nlohmann::ordered_json;
using Status = TensorMatch::Status;

const char* name_of(Status s) {
  switch (s) {
    case Status::ok: return "ok";
    case Status::missing: return "missing";
    case Status::left_over: return "left over";
    case Status::wrong: return "wrong";
    case Status::computed: return "not needed";
  }
  return "?";
}

const char* rope_name(RopeKind k) {
  switch (k) {
    case RopeKind::standard: return "default";
    case RopeKind::linear: return "linear";
    case RopeKind::llama3: return "llama3";
    case RopeKind::yarn: return "yarn";
  }
  return "?";
}

std::string bytes(int64_t n) { return with_prefix(double(n), "B"); }

std::string grouped(int64_t n) {  // 5047000000 -> 5,047,000,000
  std::string s = std::to_string(n);
  for (int64_t i = int64_t(s.size()) - 3; i > 0; i -= 3) s.insert(size_t(i), 1, ',');
  return s;
}

std::string describe(const LayerSpec& s) {
  if (s.mixer == Mixer::kda)
    return cat("KDA             ", s.kda_heads, " heads, K ", s.K, ", V ", s.V, ", ",
               s.bounded_gate ? cat("bounded gate (", s.lower_bound, ")") : "softplus gate",
               s.allow_neg_eigval ? ", beta up to 2" : "");
  return cat("full attention  ", s.heads, " query and ", s.kv_heads, " key/value heads of ", s.head_dim,
             s.rope ? ", rotary positions" : ", no positions", s.qkv_bias ? ", biases" : "");
}

// {0,1,2,5} -> "0-2,5"
std::string ranges(const std::vector<int64_t>& v) {
  std::string out;
  for (size_t i = 0; i < v.size();) {
    size_t j = i;
    while (j + 1 < v.size() && v[j + 1] == v[j] + 1) ++j;
    out += cat(out.empty() ? "" : ",", v[i]);
    if (j > i) out += cat("-", v[j]);
    i = j + 1;
  }
  return out;
}

std::string shape_in_file(const SafetensorsEntry& e) {
  std::string s;
  for (int64_t d : e.shape) s += cat(s.empty() ? "" : ",", d);
  return cat("[", s, "]");
}

std::string padded(std::string s, size_t width) {
  s.resize(std::max(s.size(), width), ' ');
  return s;
}

// A name with its layer number replaced, and that number (-1: none).
std::pair<std::string, int64_t> without_layer(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return {name, -1};
  const size_t end = name.find_first_not_of("0123456789", kPrefix.size());
  if (end == std::string::npos || end == kPrefix.size() || end - kPrefix.size() > 9) return {name, -1};
  return {cat(kPrefix, "N", name.substr(end)), std::stol(name.substr(kPrefix.size(), end - kPrefix.size()))};
}

// Tensors that differ by their layer alone share a line.
void print_tensors(std::ostream& out, const Inspection& x) {
  struct Line {
    std::string name, dtype, shape, status;
    std::vector<int64_t> layers;
  };
  std::vector<Line> lines;
  std::map<std::string, size_t> at;
  for (const auto& m : x.tensors) {
    const bool there = !m.file_name.empty();
    const auto [name, layer] = without_layer(there ? m.file_name : m.name);
    std::string status = name_of(m.status);
    if (there && !m.name.empty() && m.name != m.file_name) status += " (for " + without_layer(m.name).first + ")";
    if (!m.problem.empty()) status += ": " + m.problem;
    Line line{name,
              there ? x.files.entry(m.file_name).dtype_name : "",
              there ? shape_in_file(x.files.entry(m.file_name)) : cat(m.spec->shape),
              status,
              {}};
    const auto [it, fresh] =
        at.emplace(line.name + "|" + line.dtype + "|" + line.shape + "|" + line.status, lines.size());
    if (fresh) lines.push_back(line);
    if (layer >= 0) lines[it->second].layers.push_back(layer);
  }
  size_t names = 0, shapes = 0;
  for (const auto& l : lines) names = std::max(names, l.name.size()), shapes = std::max(shapes, l.shape.size());
  for (const auto& l : lines)
    out << "  " << padded(l.name, names) << "  " << padded(l.dtype, 5) << " " << padded(l.shape, shapes) << "  "
        << l.status << (l.layers.empty() ? "" : cat("  layers ", ranges(l.layers))) << "\n";
}

Json layer_json(const LayerSpec& s, size_t i) {
  Json j = {{"layer", i}, {"mixer", s.mixer == Mixer::kda ? "kda" : "full"}, {"mlp_width", s.mlp_width}};
  if (s.mixer == Mixer::kda) {
    j["heads"] = s.kda_heads;
    j["K"] = s.K;
    j["V"] = s.V;
    j["gate"] = s.bounded_gate ? "bounded" : "softplus";
    if (s.bounded_gate) j["lower_bound"] = s.lower_bound;
    j["allow_neg_eigval"] = s.allow_neg_eigval;
  } else {
    j["heads"] = s.heads;
    j["kv_heads"] = s.kv_heads;
    j["head_dim"] = s.head_dim;
    j["rope"] = s.rope;
  }
  return j;
}

int64_t window_bytes(const ModelConfig& c) {
  int64_t n = 0;
  for (const auto& s : c.layers)
    if (s.mixer == Mixer::kda) n += 4 * 3 * s.kda_heads * (2 * s.K + s.V);
  return n;
}

Json generation_json(const GenerationDefaults& g) {
  Json j = Json::object();
  const auto put = [&](const char* key, const auto& v) {
    if (v) j[key] = *v;
  };
  put("do_sample", g.do_sample);
  put("temperature", g.temperature);
  put("top_k", g.top_k);
  put("top_p", g.top_p);
  put("min_p", g.min_p);
  put("typical_p", g.typical_p);
  put("repetition_penalty", g.repetition_penalty);
  put("no_repeat_ngram_size", g.no_repeat_ngram_size);
  put("max_new_tokens", g.max_new_tokens);
  put("min_new_tokens", g.min_new_tokens);
  put("max_length", g.max_length);
  put("bos_token_id", g.bos);
  put("pad_token_id", g.pad);
  if (!g.eos.empty()) j["eos_token_id"] = g.eos;
  if (!g.stop_strings.empty()) j["stop_strings"] = g.stop_strings;
  return j;
}
}  // namespace

void print_text(std::ostream& out, const Inspection& x) {
  const ModelConfig& c = x.config;
  const size_t files = x.files.files().size();
  out << x.folder.string() << "\n  " << c.model_type << ", " << c.layers.size() << " layers, " << c.width
      << " wide, vocabulary " << c.vocabulary << (c.tied_head ? " (head tied to the embeddings)" : "")
      << ", trained on " << (c.max_positions ? grouped(c.max_positions) : "an unknown number of") << " positions\n";
  out << "  " << grouped(c.parameters()) << " parameters, " << bytes(x.weight_bytes) << " of weights in " << files
      << (files == 1 ? " file\n" : " files\n");

  out << "\nLayers\n";
  std::vector<std::pair<std::string, std::vector<int64_t>>> kinds;
  for (size_t l = 0; l < c.layers.size(); ++l) {
    const LayerSpec& s = c.layers[l];
    const std::string what =
        cat(describe(s), "; MLP ", s.mlp_width, c.activation == Activation::relu2 ? " relu2" : " SwiGLU");
    auto it = std::find_if(kinds.begin(), kinds.end(), [&](const auto& k) { return k.first == what; });
    if (it == kinds.end()) it = kinds.insert(it, {what, {}});
    it->second.push_back(int64_t(l));
  }
  for (const auto& [what, layers] : kinds) out << "  " << what << "  layers " << ranges(layers) << "\n";
  if (std::any_of(c.layers.begin(), c.layers.end(),
                  [](const LayerSpec& s) { return s.mixer == Mixer::full && s.rope; }))
    out << "  rotary positions: " << rope_name(c.rope.kind) << ", theta " << c.rope.theta
        << (c.rope.kind == RopeKind::standard ? "" : cat(", factor ", c.rope.factor)) << "\n";

  const int64_t window = window_bytes(c);
  out << "\nMemory\n  weights                  " << bytes(x.weight_bytes) << "\n";
  out << "  KDA state, a sequence    " << bytes(c.state_bytes() - window) << " at any length (fp32) + " << bytes(window)
      << " of convolution window (fp32)\n";
  out << "  keys and values, a token " << bytes(c.kv_bytes_per_token(Dtype::bf16)) << " in bf16, "
      << bytes(c.kv_bytes_per_token(Dtype::f32)) << " in fp32\n";

  if (const Json g = generation_json(x.generation); !g.empty()) {
    out << "\nGeneration defaults\n ";
    for (const auto& [key, value] : g.items()) out << " " << key << "=" << value.dump();
    out << "\n";
  }
  out << "\nTensors\n";
  print_tensors(out, x);
  for (const auto& p : x.not_finite) out << "  not finite: " << p << "\n";
  for (const auto& w : x.warnings) out << "warning: " << w << "\n";
}

void print_json(std::ostream& out, const Inspection& x) {
  const ModelConfig& c = x.config;
  Json j = {{"folder", x.folder.string()},
            {"model_type", c.model_type},
            {"parameters", c.parameters()},
            {"width", c.width},
            {"vocabulary", c.vocabulary},
            {"activation", c.activation == Activation::relu2 ? "relu2" : "swiglu"},
            {"norm_eps", c.norm_eps},
            {"tied_head", c.tied_head},
            {"max_positions", c.max_positions},
            {"rope", {{"type", rope_name(c.rope.kind)}, {"theta", c.rope.theta}, {"factor", c.rope.factor}}},
            {"complete", x.complete()}};
  const int64_t window = window_bytes(c);
  j["memory"] = {{"weight_bytes", x.weight_bytes},
                 {"state_bytes_per_sequence", c.state_bytes() - window},
                 {"conv_window_bytes_per_sequence", window},
                 {"kv_bytes_per_token_bf16", c.kv_bytes_per_token(Dtype::bf16)},
                 {"kv_bytes_per_token_f32", c.kv_bytes_per_token(Dtype::f32)}};
  j["generation"] = generation_json(x.generation);
  j["layers"] = Json::array();
  for (size_t l = 0; l < c.layers.size(); ++l) j["layers"].push_back(layer_json(c.layers[l], l));
  j["tensors"] = Json::array();
  for (const auto& m : x.tensors) {
    Json t = {{"name", m.name.empty() ? Json() : Json(m.name)}, {"status", name_of(m.status)}};
    if (m.spec)
      t["needed_shape"] =
          std::vector<int64_t>(m.spec->shape.dim.begin(), m.spec->shape.dim.begin() + m.spec->shape.rank);
    if (!m.file_name.empty()) {
      const auto& e = x.files.entry(m.file_name);
      t["file_name"] = m.file_name;
      t["file"] = x.files.file(m.file_name).path().filename().string();
      t["dtype"] = e.dtype_name;
      t["shape"] = e.shape;
      t["bytes"] = e.end - e.begin;
    }
    if (!m.problem.empty()) t["problem"] = m.problem;
    j["tensors"].push_back(std::move(t));
  }
  j["not_finite"] = x.not_finite;
  j["warnings"] = x.warnings;
  out << j.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
}

}  // namespace kda::cli
