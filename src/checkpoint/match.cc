#include <cstring>

#include "checkpoint/files.h"

namespace kda {

namespace {
// Equal but for dimensions of 1: [C,1,4] is [C,4], [1,1,H,1] is [H].
bool same_but_ones(const std::vector<int64_t>& file, const Shape& table) {
  std::vector<int64_t> a, b;
  for (int64_t d : file)
    if (d != 1) a.push_back(d);
  for (int i = 0; i < table.rank; ++i)
    if (table[i] != 1) b.push_back(table[i]);
  return a == b;
}

bool same_bytes(const ModelFiles& files, const std::string& x, const std::string& y) {
  const auto &a = files.entry(x), &b = files.entry(y);
  if (a.dtype_name != b.dtype_name || a.shape != b.shape || !a.dtype) return false;
  const Shape all{int64_t(a.end - a.begin) / int64_t(size_of(*a.dtype))};
  const Tensor s = files.tensor(x, all), t = files.tensor(y, all);
  return std::memcmp(s.v.data, t.v.data, s.v.bytes()) == 0;
}

std::string problem_of(const SafetensorsEntry& e, const TensorSpec& t) {
  std::string out;
  if (e.dtype != Dtype::f32 && e.dtype != Dtype::bf16 && e.dtype != Dtype::f16)
    out = cat("dtype ", e.dtype_name, ", needed F32, BF16 or F16");
  if (!same_but_ones(e.shape, t.shape)) {
    std::string there;
    for (int64_t d : e.shape) there += cat(there.empty() ? "" : ",", d);
    out += cat(out.empty() ? "" : "; ", "shape [", there, "], needed ", t.shape);
  }
  return out;
}
}  // namespace

std::vector<TensorMatch> match_tensors(const ModelConfig& config, const ModelFiles& files) {
  using Status = TensorMatch::Status;
  std::vector<TensorMatch> out, besides;
  std::map<std::string, std::string> found;  // canonical -> in the file
  for (const auto& name : files.names()) {
    std::string canonical = canonical_name(name);
    if (is_computed_buffer(name)) {
      besides.push_back({Status::computed, "", name, {}, ""});
    } else if (canonical.empty()) {
      besides.push_back({Status::left_over, "", name, {}, ""});
    } else {
      const auto [it, fresh] = found.emplace(canonical, name);
      if (!fresh) besides.push_back({Status::wrong, canonical, name, {}, "the same weight as " + it->second});
    }
  }
  for (TensorSpec& t : tensor_table(config)) {
    TensorMatch m{Status::missing, t.name, "", std::move(t), ""};
    if (const auto it = found.find(m.name); it != found.end()) {
      m.file_name = it->second;
      m.problem = problem_of(files.entry(m.file_name), *m.spec);
      m.status = m.problem.empty() ? Status::ok : Status::wrong;
      found.erase(it);
    }
    out.push_back(std::move(m));
  }
  for (const auto& [canonical, name] : found) {
    TensorMatch m{Status::left_over, canonical, name, {}, ""};
    const TensorMatch& embedding = out.front();
    if (canonical == "lm_head.weight" && config.tied_head && embedding.status == Status::ok) {
      // Tied all the same when it is a copy; when it is not, one of file and config is wrong, and we cannot know which.
      const bool copy = same_bytes(files, name, embedding.file_name);
      m.status = copy ? Status::computed : Status::wrong;
      if (!copy) m.problem = cat("config.json says tie_word_embeddings, but this differs from ", embedding.file_name);
    }
    besides.push_back(std::move(m));
  }
  out.insert(out.end(), besides.begin(), besides.end());
  return out;
}

}  // namespace kda
