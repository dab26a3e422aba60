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

  std::vector<std::string> missing, wrong, left;
  for (const TensorMatch& m : match_tensors(c.config, files)) {
    switch (m.status) {
      case TensorMatch::Status::missing: missing.push_back(cat(m.name, " ", m.spec->shape)); break;
      case TensorMatch::Status::left_over: left.push_back(m.file_name); break;
      case TensorMatch::Status::wrong: wrong.push_back(cat(m.file_name, ": ", m.problem)); break;
      case TensorMatch::Status::computed: break;
      case TensorMatch::Status::ok: {
        const Tensor weight = files.tensor(m.file_name, m.spec->shape);
        if (m.spec->shape.rank == 1 || m.spec->init == Init::conv)
          check_finite(cat(folder.string(), ": ", m.file_name), weight);
        c.tensors.emplace(m.name, m.spec->fp32 ? to_f32(weight) : weight);
        c.spelling.emplace(m.name, m.file_name);
      }
    }
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
