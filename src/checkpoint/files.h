// checkpoint/files.h — all tensors of a model folder, whether in one safetensors file or in shards with an index.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/tensor_table.h"

namespace kda {

class ModelFiles {
 public:
  // model.safetensors, else the shards of model.safetensors.index.json. Throws Error for a folder with neither, a shard
  // that is missing, and an index that does not say what the shards hold.
  explicit ModelFiles(const std::filesystem::path& folder);

  const std::string& where() const { return where_; }
  std::vector<std::string> names() const;  // sorted
  const SafetensorsEntry& entry(const std::string& name) const;
  Tensor tensor(const std::string& name, const Shape& as) const { return file(name).tensor(name, as); }
  const SafetensorsFile& file(const std::string& name) const;
  TensorShapes shapes() const;
  const std::vector<std::shared_ptr<const SafetensorsFile>>& files() const { return files_; }

 private:
  std::string where_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, size_t> file_of_;
};

// One line of the comparison of a folder's tensors with the table.
struct TensorMatch {
  enum class Status { ok, missing, left_over, wrong, computed };
  Status status = Status::ok;
  std::string name;       // canonical; empty for a name no table holds
  std::string file_name;  // as spelled in the file; empty when missing
  std::optional<TensorSpec> spec;
  std::string problem;  // of a wrong one: what is there and what is needed
};

// Every tensor of the table, in its order, then what the files hold besides: computed buffers and left-overs.
std::vector<TensorMatch> match_tensors(const ModelConfig&, const ModelFiles&);

}  // namespace kda
