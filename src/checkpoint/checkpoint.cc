#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/file.h"
#include "base/sha256.h"
#include "checkpoint/files.h"
#include "checkpoint/tensor_table.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

// Equal but for dimensions of 1: [C,1,4] is [C,4], [1,1,H,1] is [H].
bool same_but_ones(const std::vector<int64_t>& file, const Shape& table) {
  std::vector<int64_t> a, b;
  for (int64_t d : file)
    if (d != 1) a.push_back(d);
  for (int i = 0; i < table.rank; ++i)
    if (table[i] != 1) b.push_back(table[i]);
  return a == b;
}

// Every float of a tensor in f32; exact, since the others are narrower.
Tensor to_f32(const Tensor& t) {
  if (t.dtype() == Dtype::f32) return t;
  Tensor out = host_tensor(Dtype::f32, t.shape());
  float* to = out.v.as<float>();
  for (int64_t i = 0; i < t.v.size(); ++i)
    to[i] = t.dtype() == Dtype::bf16 ? float(t.v.as<bf16>()[i]) : float(t.v.as<f16>()[i]);
  return out;
}

std::string fingerprint_of(const Checkpoint& c) {
  constexpr size_t kEnds = 4096;
  Sha256 h;
  h.add(cat("config ", c.config.text.size(), "\n")).add(c.config.text);
  for (const auto& [name, t] : c.tensors) {
    const auto* p = static_cast<const char*>(t.v.data);
    const size_t bytes = t.v.bytes(), n = std::min(bytes, kEnds);
    h.add(cat("\n", name, " ", name_of(t.dtype()), " ", t.shape(), "\n")).add(p, n).add(p + (bytes - n), n);
  }
  return h.hex();
}

std::string list(const std::vector<std::string>& names) {
  constexpr size_t kShown = 40;
  std::string out;
  for (size_t i = 0; i < std::min(names.size(), kShown); ++i) out += "\n    " + names[i];
  if (names.size() > kShown) out += cat("\n    .. and ", names.size() - kShown, " more");
  return out;
}

void check_head_equals_embedding(const ModelFiles& files, const std::string& head, const std::string& embedding) {
  const auto &a = files.entry(head), &b = files.entry(embedding);
  bool same = a.dtype_name == b.dtype_name && a.shape == b.shape;
  if (same && a.dtype) {
    const Tensor x = files.tensor(head, {int64_t(a.end - a.begin) / int64_t(size_of(*a.dtype))}),
                 y = files.tensor(embedding, x.shape());
    same = std::memcmp(x.v.data, y.v.data, x.v.bytes()) == 0;
  }
  KDA_CHECK(same, files.where(), ": config.json says tie_word_embeddings, but ", head, " is there and differs from ",
            embedding);
}

template <class T>
int64_t first_not_finite(const ConstView& v) {
  const T* p = v.as<T>();
  for (int64_t i = 0; i < v.size(); ++i)
    if (!std::isfinite(float(p[i]))) return i;
  return -1;
}

// bf16 and f16 by their exponent bits: a check of a whole model should run at the speed of memory.
int64_t first_full_exponent(const uint16_t* p, int64_t n, uint16_t mask) {
  constexpr int64_t kBlock = 4096;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t to = std::min(n, from + kBlock);
    unsigned found = 0;
    for (int64_t i = from; i < to; ++i) found |= unsigned((p[i] & mask) == mask);
    if (!found) continue;
    for (int64_t i = from; i < to; ++i)
      if ((p[i] & mask) == mask) return i;
  }
  return -1;
}
}  // namespace

void check_finite(const std::string& name, const ConstView& v) {
  int64_t at = -1;
  switch (v.dtype) {
    case Dtype::f32: at = first_not_finite<float>(v); break;
    case Dtype::f64: at = first_not_finite<double>(v); break;
    case Dtype::bf16: at = first_full_exponent(static_cast<const uint16_t*>(v.data), v.size(), 0x7f80); break;
    case Dtype::f16: at = first_full_exponent(static_cast<const uint16_t*>(v.data), v.size(), 0x7c00); break;
    default: break;  // whole numbers are finite
  }
  KDA_CHECK(at < 0, name, ": value ", at, " of ", v.shape, " is not finite");
}

const Tensor& Checkpoint::at(const std::string& name) const {
  const auto it = tensors.find(name);
  KDA_CHECK(it != tensors.end(), folder.string(), ": no tensor '", name, "'");
  return it->second;
}

Checkpoint load_checkpoint(const fs::path& folder) {
  KDA_CHECK(is_folder(folder), folder.string(), ": is not a folder");
  Checkpoint c;
  c.folder = folder;
  const fs::path config = folder / "config.json", generation = folder / "generation_config.json";
  KDA_CHECK(path_exists(config), config.string(), ": missing; a model folder needs config.json and safetensors");
  const ModelFiles files(folder);
  c.config = parse_config(read_file(config, size_t(16) << 20), files.shapes(), config.string());
  c.warnings = c.config.warnings;
  if (path_exists(generation))
    c.generation = parse_generation_config(read_file(generation, size_t(16) << 20), c.warnings, generation.string());

  // Which tensor of the table each file's tensor is.
  std::vector<std::string> missing, wrong, left;
  std::map<std::string, std::string> found;  // canonical -> in the file
  for (const auto& name : files.names()) {
    if (is_computed_buffer(name)) continue;
    std::string canonical = canonical_name(name);
    if (canonical.empty()) {
      left.push_back(name);
      continue;
    }
    const auto [it, fresh] = found.emplace(std::move(canonical), name);
    if (!fresh) wrong.push_back(cat(name, ": the same weight as ", it->second));
  }
  const auto table = tensor_table(c.config);
  for (const TensorSpec& t : table) {
    const auto it = found.find(t.name);
    if (it == found.end()) {
      missing.push_back(cat(t.name, " ", t.shape));
      continue;
    }
    const SafetensorsEntry& e = files.entry(it->second);
    const bool usable = e.dtype == Dtype::f32 || e.dtype == Dtype::bf16 || e.dtype == Dtype::f16;
    if (!usable) wrong.push_back(cat(it->second, ": dtype ", e.dtype_name, ", needed F32, BF16 or F16"));
    if (!same_but_ones(e.shape, t.shape)) {
      std::string there;
      for (int64_t d : e.shape) there += cat(there.empty() ? "" : ",", d);
      wrong.push_back(cat(it->second, ": shape [", there, "], needed ", t.shape));
    } else if (usable) {
      const Tensor weight = files.tensor(it->second, t.shape);
      if (t.shape.rank == 1 || t.init == Init::conv) check_finite(cat(folder.string(), ": ", it->second), weight);
      c.tensors.emplace(t.name, t.fp32 ? to_f32(weight) : weight);
      c.spelling.emplace(t.name, it->second);
    }
    found.erase(it);
  }
  // What the table did not ask for. A head beside tied embeddings is theirs if it is the same.
  for (const auto& [canonical, name] : found) {
    if (canonical == "lm_head.weight" && c.config.tied_head && c.spelling.count("model.embed_tokens.weight"))
      check_head_equals_embedding(files, name, c.spelling.at("model.embed_tokens.weight"));
    else
      left.push_back(name);
  }
  std::string problems;
  if (!missing.empty()) problems += cat("\n  ", missing.size(), " tensors are missing:", list(missing));
  if (!left.empty()) problems += cat("\n  ", left.size(), " tensors are left over:", list(left));
  if (!wrong.empty()) problems += cat("\n  ", wrong.size(), " tensors are not as needed:", list(wrong));
  KDA_CHECK(problems.empty(), files.where(), ": the weights do not fit model_type ", c.config.model_type,
            " of config.json:", problems);
  c.fingerprint = fingerprint_of(c);
  return c;
}

}  // namespace kda
