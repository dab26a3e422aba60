#include "checkpoint/random.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <span>

#include "base/file.h"
#include "base/rng.h"
#include "checkpoint/layer_pattern.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/tensor_table.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

struct Named {
  const char* name;
  const char* what;
  int64_t layers, width, mlp, heads, kv_heads, head_dim, vocabulary, positions;
  bool afm;         // YaRN and the ids of AFM's vocabulary
  const char* kda;  // which layers are KDA
  bool rope;        // of the full-attention layers
};
constexpr Named kNamed[] = {
    {"afm-4.5b-base", "AFM-4.5B-Base: 36 layers of full attention", 36, 2560, 18432, 20, 4, 128, 128004, 65536, true,
     "none", true},
    {"afm-4.5b-kda-only", "AFM-4.5B-Base-KDA-Only: 36 KDA layers", 36, 2560, 18432, 20, 4, 128, 128004, 65536, true,
     "all", true},
    {"afm-4.5b-kda-nope", "AFM-4.5B-Base-KDA-NoPE: 3 KDA to 1 full attention without positions", 36, 2560, 18432, 20, 4,
     128, 128004, 65536, true, "hybrid:3:1", false},
    {"nano", "8 layers of full attention, 7.9 M parameters, vocabulary 4096", 8, 256, 1024, 4, 2, 64, 4096, 2048, false,
     "none", true},
    {"nano-kda", "the same with 8 KDA layers", 8, 256, 1024, 4, 2, 64, 4096, 2048, false, "all", true},
    {"nano-hybrid", "the same with 3 KDA to 1 full attention", 8, 256, 1024, 4, 2, 64, 4096, 2048, false, "hybrid:3:1",
     true},
    {"tiny", "4 layers of full attention, 64 wide", 4, 64, 160, 4, 2, 16, 260, 2048, false, "none", true},
    {"tiny-kda", "4 KDA layers, 64 wide", 4, 64, 160, 2, 1, 32, 260, 2048, false, "all", true},
    {"tiny-hybrid", "3 KDA layers and 1 of full attention, 64 wide", 4, 64, 160, 2, 1, 32, 260, 2048, false,
     "hybrid:3:1", false},
};

// Quantile of the standard normal (Wichura's AS 241 has tables; bisection needs none and runs 32,768 times).
double normal_quantile(double p) {
  double lo = -9, hi = 9;
  for (int i = 0; i < 60; ++i) {
    const double mid = (lo + hi) / 2;
    (0.5 * std::erfc(-mid * std::numbers::sqrt2 / 2) < p ? lo : hi) = mid;
  }
  return (lo + hi) / 2;
}

// The normal distribution by its 65,536 quantiles: 16 random bits are a number, and 8 numbers come from one Philox
// block.
std::vector<float> quantiles() {
  constexpr size_t kHalf = 32768;
  std::vector<float> out(2 * kHalf);
  for (size_t i = 0; i < kHalf; ++i) {
    const double q = normal_quantile((double(i) + 0.5) / (2 * kHalf));
    out[i] = float(q);
    out[2 * kHalf - 1 - i] = float(-q);
  }
  return out;
}

uint64_t hash_of(std::string_view name) {  // FNV-1a
  uint64_t h = 14695981039346656037u;
  for (char c : name) h = (h ^ uint8_t(c)) * 1099511628211u;
  return h;
}

std::array<uint32_t, 4> words(uint64_t seed, uint64_t tensor, uint64_t block) {
  return Philox::block(seed, {uint32_t(block), uint32_t(block >> 32), uint32_t(tensor), uint32_t(tensor >> 32)});
}

// Elements [from, from + n) of a normal tensor; from is a multiple of 8.
template <class T>
void fill_normal(T* out, int64_t from, int64_t n, uint64_t seed, uint64_t tensor, const std::vector<T>& table) {
  for (int64_t i = 0; i < n; i += 8) {
    const auto w = words(seed, tensor, uint64_t(from + i) / 8);
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j)
      out[i + j] = table[(w[size_t(j / 2)] >> (j % 2 * 16)) & 0xffffu];
  }
}

// One element of a small tensor.
float small_value(const TensorSpec& t, bool bounded, uint64_t seed, uint64_t tensor, int64_t i) {
  const auto w = words(seed, tensor, uint64_t(i));
  const double u = uniform53(w[0], w[1]);
  switch (t.init) {
    case Init::ones: return 1;
    case Init::conv: return float(u - 0.5);
    case Init::a_log: return bounded ? 0 : float(std::log(1 + 15 * u));
    case Init::dt_bias: {
      const double step = std::exp(std::log(0.001) + u * (std::log(0.1) - std::log(0.001)));
      return float(step + std::log(-std::expm1(-step)));
    }
    default: return 0;
  }
}

template <class T>
std::vector<T> scaled(const std::vector<float>& table, double size) {
  std::vector<T> out;
  for (float x : table) out.push_back(T(float(x * size)));
  return out;
}

struct Filler {
  const std::map<std::string, const TensorSpec*>& specs;
  const ModelConfig& config;
  const RandomCheckpoint& options;
  ThreadPool& pool;
  std::vector<float> unit = quantiles();
  std::string of = {};  // the tensor the tables below are scaled for
  std::vector<bf16> table16 = {};
  std::vector<float> table32 = {};

  void operator()(const SafetensorsItem& item, size_t offset, std::span<std::byte> out) {
    const TensorSpec& t = *specs.at(item.name);
    const uint64_t tensor = hash_of(t.name);
    const size_t width = size_of(item.dtype);
    const int64_t from = int64_t(offset / width), n = int64_t(out.size() / width);
    if (of != t.name && t.init == Init::normal) {
      of = t.name;
      const double size = t.group == "embedding" ? 1 : 1 / std::sqrt(double(t.shape[1]));
      if (item.dtype == Dtype::bf16)
        table16 = scaled<bf16>(unit, size);
      else
        table32 = scaled<float>(unit, size);
    }
    const bool bounded = t.layer >= 0 && config.layers[size_t(t.layer)].bounded_gate;
    constexpr int64_t kTask = 1 << 18;
    pool.run((n + kTask - 1) / kTask, [&](int64_t task, int) {
      const int64_t a = task * kTask, m = std::min(kTask, n - a);
      auto* p16 = reinterpret_cast<bf16*>(out.data()) + a;
      auto* p32 = reinterpret_cast<float*>(out.data()) + a;
      if (t.init == Init::normal) {
        if (item.dtype == Dtype::bf16)
          fill_normal(p16, from + a, m, options.seed, tensor, table16);
        else
          fill_normal(p32, from + a, m, options.seed, tensor, table32);
        return;
      }
      for (int64_t i = 0; i < m; ++i) {
        const float x = small_value(t, bounded, options.seed, tensor, from + a + i);
        if (item.dtype == Dtype::bf16)
          p16[i] = bf16(x);
        else
          p32[i] = x;
      }
    });
  }
};

std::vector<SafetensorsItem> items_of(const std::vector<TensorSpec>& table, Dtype dtype) {
  std::vector<SafetensorsItem> out;
  for (const auto& t : table) out.push_back({t.name, t.fp32 ? Dtype::f32 : dtype, t.file_shape});
  return out;
}
}  // namespace

std::vector<std::pair<std::string, std::string>> named_models() {
  std::vector<std::pair<std::string, std::string>> out;
  for (const auto& n : kNamed) out.emplace_back(n.name, n.what);
  return out;
}

ModelConfig named_model(const std::string& name, std::optional<int64_t> layers, const std::string& kda) {
  const auto n = std::find_if(std::begin(kNamed), std::end(kNamed), [&](const Named& x) { return x.name == name; });
  std::string known;
  for (const auto& x : kNamed) known += cat(known.empty() ? "" : ", ", x.name);
  KDA_CHECK(n != std::end(kNamed), "no model is named '", name, "'; known are ", known);
  const int64_t count = layers.value_or(n->layers);
  KDA_CHECK(count >= 1 && count <= 10'000, "layers: ", count, ", needed 1 to 10000");
  ModelConfig c;
  c.vocabulary = n->vocabulary;
  c.width = n->width;
  c.max_positions = n->positions;
  c.bos = n->afm ? 128000 : 0;
  c.eos = {n->afm ? 128001 : 1};
  bool any_kda = false, any_rope = false;
  for (bool is_kda : kda_layers(kda.empty() ? n->kda : kda, count)) {
    LayerSpec s;
    s.mlp_width = n->mlp;
    if (is_kda) {
      s.mixer = Mixer::kda;
      s.kda_heads = n->heads;
      s.K = s.V = n->head_dim;
      s.rope = false;
      any_kda = true;
    } else {
      s.heads = n->heads;
      s.kv_heads = n->kv_heads;
      s.head_dim = n->head_dim;
      s.rope = n->rope;
      any_rope = any_rope || s.rope;
    }
    c.layers.push_back(s);
  }
  if (n->afm && any_rope) {
    c.rope.kind = RopeKind::yarn;
    c.rope.factor = 20;
    c.rope.original_max_position_embeddings = 4096;
    c.rope.mscale = 1;
  }
  c.model_type = any_kda ? "arcee_kda" : "arcee";
  c.text = write_config(c);
  return c;
}

int64_t weight_bytes(const ModelConfig& c, Dtype dtype) {
  int64_t n = 0;
  for (const auto& i : items_of(tensor_table(c), dtype)) n += int64_t(i.bytes());
  return n;
}

void write_random_checkpoint(const fs::path& folder, const ModelConfig& given, const RandomCheckpoint& options,
                             ThreadPool& pool, const std::function<void(size_t)>& progress) {
  KDA_CHECK(options.dtype == Dtype::bf16 || options.dtype == Dtype::f32, "random checkpoint: dtype ",
            name_of(options.dtype), ", needed bf16 or f32");
  KDA_CHECK(!path_exists(folder / "config.json"), folder.string(), ": holds a model already (config.json)");
  std::error_code error;
  fs::create_directories(folder, error);
  KDA_CHECK(is_folder(folder), folder.string(), ": cannot make this folder: ", error.message());
  ModelConfig c = given;
  c.dtype = options.dtype;
  const auto table = tensor_table(c);
  std::map<std::string, const TensorSpec*> specs;
  for (const auto& t : table) specs[t.name] = &t;
  Filler fill{.specs = specs, .config = c, .options = options, .pool = pool};
  save_model_tensors(folder, items_of(table, options.dtype), std::ref(fill), options.max_shard_bytes,
                     {{"format", "pt"}}, progress);
  AtomicFile config(folder / "config.json");  // last: a folder without it is no model
  config.write(write_config(c));
  config.commit();
}

}  // namespace kda
