#include "train/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/normal.h"
#include "checkpoint/layer_pattern.h"

namespace kda {

namespace {
uint64_t hash_of(std::string_view name) {  // FNV-1a
  uint64_t h = 14695981039346656037u;
  for (char c : name) h = (h ^ uint8_t(c)) * 1099511628211u;
  return h;
}

// Random numbers of a tensor: they depend on seed, name and index alone.
class Draw {
 public:
  Draw(uint64_t seed, const std::string& name) : seed_(seed), name_(hash_of(name)) {}
  double uniform(int64_t i) const {
    const auto w = words(i);
    return uniform53(w[0], w[1]);
  }
  double normal(int64_t i) const { return normals(words(i))[0]; }

 private:
  std::array<uint32_t, 4> words(int64_t i) const {
    const uint64_t block = uint64_t(i);
    return Philox::block(seed_, {uint32_t(block), uint32_t(block >> 32), uint32_t(name_), uint32_t(name_ >> 32)});
  }
  uint64_t seed_, name_;
};

template <class F>
Tensor filled(const Shape& shape, const F& value) {
  const Tensor t = host_tensor(Dtype::f32, shape);
  float* p = t.v.as<float>();
  for (int64_t i = 0; i < shape.size(); ++i) p[i] = float(value(i));
  return t;
}

Tensor copied(const Shape& shape, const std::vector<float>& from) {
  KDA_CHECK(shape.size() == int64_t(from.size()), "convert: ", from.size(), " values for a tensor ", shape);
  return filled(shape, [&](int64_t i) { return from[size_t(i)]; });
}

// Rows of G heads, each repeated H / G times; query head h reads head h / (H / G).
Tensor repeated_heads(const Tensor& w, int64_t H, int64_t G) {
  const int64_t rows = w.shape()[0] / G, columns = w.shape()[1];
  const size_t head_bytes = size_t(rows * columns) * size_of(w.dtype());
  const Tensor out = host_tensor(w.dtype(), {H * rows, columns});
  for (int64_t h = 0; h < H; ++h)
    std::memcpy(static_cast<std::byte*>(out.v.data) + size_t(h) * head_bytes,
                static_cast<const std::byte*>(w.v.data) + size_t(h / (H / G)) * head_bytes, head_bytes);
  return out;
}

// As a layer of fla's starts when it is built: linear maps U(+-1/sqrt(columns)), convolutions U(+-1/2), A_log and
// dt_bias as in fla/layers/kda.py @ bc3b101d.
Tensor fla_value(const TensorSpec& t, bool bounded, uint64_t seed) {
  const Draw draw(seed, t.name);
  switch (t.init) {
    case Init::ones: return filled(t.shape, [](int64_t) { return 1; });
    case Init::zeros: return filled(t.shape, [](int64_t) { return 0; });
    case Init::conv: return filled(t.shape, [&](int64_t i) { return draw.uniform(i) - 0.5; });
    case Init::a_log:
      return filled(t.shape, [&](int64_t i) { return bounded ? 0 : std::log(1 + 15 * draw.uniform(i)); });
    case Init::dt_bias:
      return filled(t.shape, [&](int64_t i) {
        const double step = std::exp(std::log(0.001) + draw.uniform(i) * (std::log(0.1) - std::log(0.001)));
        return step + std::log(-std::expm1(-step));
      });
    case Init::normal: break;
  }
  const double size = 1 / std::sqrt(double(t.shape[1]));
  return filled(t.shape, [&](int64_t i) { return size * (2 * draw.uniform(i) - 1); });
}

// The low-rank maps of decay and output gate start small behind a first map of unit size: both learn from the first
// step on.
constexpr double kSmall = 0.01;

Tensor calibrated_value(const TensorSpec& t, const std::string& part, uint64_t seed, const LayerCalibration& c) {
  const Draw draw(seed, t.name);
  if (part == "A_log") return filled(t.shape, [](int64_t) { return 0; });
  if (part == "dt_bias") return copied(t.shape, c.dt_bias);
  if (part == "b_proj.weight") return copied(t.shape, c.b_proj);
  if (part == "g_proj.1.bias") return copied(t.shape, c.g_bias);
  if (part == "o_norm.weight") return copied(t.shape, c.o_norm);
  if (t.init == Init::conv) return filled(t.shape, [](int64_t i) { return i % 4 == 3 ? kIdentityTap : 0; });
  const bool second = part == "f_proj.1.weight" || part == "g_proj.1.weight";
  KDA_CHECK(second || part == "f_proj.0.weight" || part == "g_proj.0.weight", "convert: nothing is known of ", t.name);
  const double size = second ? kSmall : 1 / std::sqrt(double(t.shape[1]));
  return filled(t.shape, [&](int64_t i) { return size * draw.normal(i); });
}

// "model.layers.3.self_attn.q_proj.weight" -> "q_proj.weight"; empty for what is not the mixer's.
std::string mixer_part(const std::string& name) {
  constexpr std::string_view kMixer = ".self_attn.";
  const size_t at = name.find(kMixer);
  return at == std::string::npos ? "" : name.substr(at + kMixer.size());
}

std::string layer_list(const std::vector<LayerSpec>& layers, Mixer kind) {
  std::string out;
  for (size_t l = 0; l < layers.size(); ++l)
    if (layers[l].mixer == kind) out += cat(out.empty() ? "" : ", ", l);
  return out;
}
}  // namespace

ModelConfig student_config(const ModelConfig& teacher, const ConvertOptions& o) {
  KDA_CHECK(teacher.model_type != "kda", "convert: a model of type kda (fla's own) names its layers in a way that has ",
            "no word for converted ones; needed arcee, llama or arcee_kda");
  KDA_CHECK(!o.bounded_gate || (o.lower_bound >= -5 && o.lower_bound < 0), "convert: lower bound ", o.lower_bound,
            ", needed in [-5,0)");
  const std::vector<bool> become = kda_layers(o.kda, int64_t(teacher.layers.size()));
  KDA_CHECK(std::count(become.begin(), become.end(), true) > 0, "convert: --kda ", o.kda, " names no layer");
  const bool keep = o.keep_positions.value_or(!o.kda.starts_with("hybrid:"));
  ModelConfig c = teacher;
  for (size_t l = 0; l < c.layers.size(); ++l) {
    LayerSpec& s = c.layers[l];
    if (s.mixer == Mixer::kda) {
      KDA_CHECK(!become[l], "convert: layer ", l,
                " is KDA already; name the layers that are full attention: ", layer_list(teacher.layers, Mixer::full));
      KDA_CHECK(s.bounded_gate == o.bounded_gate && (!s.bounded_gate || s.lower_bound == o.lower_bound),
                "convert: layer ", l, " is KDA with a ", s.bounded_gate ? "bounded" : "softplus",
                " gate, and a model has one kind of gate: needed the same for new layers");
      KDA_CHECK(!s.allow_neg_eigval, "convert: layer ", l,
                " is KDA with doubled beta, which new layers would not have");
      continue;
    }
    if (!become[l]) {
      s.rope = s.rope && keep;
      continue;
    }
    KDA_CHECK(!s.qkv_bias && !s.o_bias, "convert: layer ", l,
              " has attention biases, and a KDA layer has no place for them");
    s.mixer = Mixer::kda;
    s.kda_heads = s.heads;
    s.K = s.V = s.head_dim;
    s.heads = s.kv_heads = s.head_dim = 0;
    s.rope = false;
    s.bounded_gate = o.bounded_gate;
    s.lower_bound = o.bounded_gate ? o.lower_bound : LayerSpec{}.lower_bound;
  }
  c.model_type = "arcee_kda";
  return c;
}

TensorSource student_weights(const Checkpoint& teacher, const ModelConfig& student, const ConvertOptions& o,
                             const std::map<int64_t, LayerCalibration>& calibration) {
  const std::vector<LayerSpec> layers = student.layers;
  return [&teacher, layers, o, &calibration](const TensorSpec& t) -> Tensor {
    const std::string part = mixer_part(t.name);
    const bool fresh = t.layer >= 0 && !part.empty() && layers[size_t(t.layer)].mixer == Mixer::kda &&
                       teacher.config.layers[size_t(t.layer)].mixer == Mixer::full;
    if (!fresh || part == "q_proj.weight" || part == "o_proj.weight") return teacher.at(t.name);
    const LayerSpec& was = teacher.config.layers[size_t(t.layer)];
    if (part == "k_proj.weight" || part == "v_proj.weight")
      return repeated_heads(teacher.at(t.name), was.heads, was.kv_heads);
    if (o.init == StudentInit::fla) return fla_value(t, o.bounded_gate, o.seed);
    const auto found = calibration.find(t.layer);
    KDA_CHECK(found != calibration.end(), "convert: layer ", t.layer, " was not measured");
    return calibrated_value(t, part, o.seed, found->second);
  };
}

std::string student_card(const Checkpoint& teacher, const ModelConfig& student, const ConvertOptions& o,
                         int64_t sample_tokens) {
  const std::string name = teacher.folder.filename().string();
  std::string positions;
  std::vector<LayerSpec> full;
  for (const LayerSpec& s : student.layers)
    if (s.mixer == Mixer::full) full.push_back(s);
  if (!full.empty())
    positions = std::any_of(full.begin(), full.end(), [](const LayerSpec& s) { return s.rope; }) ? "kept" : "removed";
  const LayerSpec& kda = *std::find_if(student.layers.begin(), student.layers.end(),
                                       [](const LayerSpec& s) { return s.mixer == Mixer::kda; });
  std::string card = cat("---\nlibrary_name: kda.cpp\ntags:\n- kda\n- linear-attention\n- distillation\n---\n# ", name,
                         ", converted to Kimi Delta Attention\n\n");
  card += cat("Made by `kda convert` from ", name, " (model type ", teacher.config.model_type, ", fingerprint ",
              teacher.fingerprint, "). It has not been trained: this is where a distillation starts.\n\n");
  card += "| | |\n|---|---|\n";
  const auto row = [&](const char* what, const std::string& value) { card += cat("| ", what, " | ", value, " |\n"); };
  row("KDA layers", layer_list(student.layers, Mixer::kda));
  row("full-attention layers", full.empty() ? "none" : layer_list(student.layers, Mixer::full));
  if (!full.empty()) row("their positions", positions);
  row("KDA heads", cat(kda.kda_heads, " of K = ", kda.K, ", V = ", kda.V));
  row("gate", o.bounded_gate ? cat("bounded, lower bound ", o.lower_bound) : "softplus");
  row("new parts", o.init == StudentInit::fla
                       ? cat("as fla starts them, seed ", o.seed)
                       : cat("calibrated on ", sample_tokens, " tokens of sample text, seed ", o.seed));
  row("parameters", cat(student.parameters()));
  card +=
      "\nCopied bit for bit where the dtype is the teacher's: embeddings, head, norms, MLPs, q and o projections; "
      "k and v projections with their heads repeated. New: convolutions, decay, beta, output gate and its norm.\n";
  return card;
}

}  // namespace kda
