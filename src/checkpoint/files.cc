#include "checkpoint/files.h"

#include <set>

#include "base/file.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/json.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

std::string folder_listing(const fs::path& folder) {
  std::set<std::string> names;
  std::error_code error;
  for (const auto& e : fs::directory_iterator(folder, error)) names.insert(e.path().filename().string());
  std::string out;
  for (const auto& n : names) {
    if (out.size() > 300) return out + ", ..";
    out += (out.empty() ? "" : ", ") + n;
  }
  return out.empty() ? "nothing" : out;
}
}  // namespace

ModelFiles::ModelFiles(const fs::path& folder) {
  const fs::path single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
  if (path_exists(single)) {  // as transformers: the one file wins over an index
    where_ = single.string();
    files_.push_back(std::make_shared<SafetensorsFile>(single));
    for (const auto& t : files_[0]->tensors()) file_of_[t.first] = 0;
    return;
  }
  KDA_CHECK(path_exists(index), folder.string(),
            ": needed model.safetensors or model.safetensors.index.json; there is ", folder_listing(folder));
  where_ = index.string();
  const nlohmann::json json = parse_json_object(read_file(index, size_t(256) << 20), where_, 8);
  const auto map = Fields(json, where_).object("weight_map");
  KDA_CHECK(map, where_, ": weight_map is missing");
  std::map<std::string, size_t> shard;
  for (const auto& [tensor, name] : map->raw().items()) {
    KDA_CHECK(name.is_string(), where_, ": weight_map of '", tensor, "' is not a string");
    const std::string file = name.get<std::string>();
    KDA_CHECK(!file.empty() && file != "." && file != ".." &&
                  file.find_first_of(std::string("/\\\0", 3)) == std::string::npos,
              where_, ": weight_map of '", tensor, "' must be the name of a file in the same folder, found ",
              name.dump());
    const auto [it, fresh] = shard.emplace(file, files_.size());
    if (fresh) {
      KDA_CHECK(path_exists(folder / file), (folder / file).string(), ": this shard is missing; ", where_, " lists it");
      files_.push_back(std::make_shared<SafetensorsFile>(folder / file));
    }
    KDA_CHECK(files_[it->second]->has(tensor), where_, ": lists tensor '", tensor, "' in ", file,
              ", which does not hold it");
    file_of_[tensor] = it->second;
  }
  for (const auto& f : files_)
    for (const auto& t : f->tensors()) {
      const auto it = file_of_.find(t.first);
      KDA_CHECK(it != file_of_.end() && files_[it->second] == f, f->path().string(), ": holds tensor '", t.first,
                "', which ", where_, " does not list there");
    }
}

std::vector<std::string> ModelFiles::names() const {
  std::vector<std::string> out;
  for (const auto& [name, unused] : file_of_) out.push_back(name);
  return out;
}

const SafetensorsFile& ModelFiles::file(const std::string& name) const {
  const auto it = file_of_.find(name);
  KDA_CHECK(it != file_of_.end(), where_, ": no tensor '", name, "'");
  return *files_[it->second];
}

const SafetensorsEntry& ModelFiles::entry(const std::string& name) const { return file(name).tensors().at(name); }

TensorShapes ModelFiles::shapes() const {
  TensorShapes out;
  for (const auto& [name, i] : file_of_) out[name] = files_[i]->tensors().at(name).shape;
  return out;
}

fs::path resolve_model(const std::string& where, const fs::path& cache) {
  if (is_folder(where)) return where;
  KDA_CHECK(!path_exists(where), where, ": is a file; needed the folder of a model or a hub id owner/name");
  const size_t slash = where.find('/');
  const auto plain = [](std::string_view s) {
    if (s.empty() || s.front() == '.' || s.front() == '-') return false;
    for (char c : s)
      if (!(std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.')) return false;
    return true;
  };
  const bool hub_id = slash != std::string::npos && plain(where.substr(0, slash)) && plain(where.substr(slash + 1));
  KDA_CHECK(hub_id, where, ": no such folder, and not a hub id owner/name");
  const fs::path repository = cache / cat("models--", where.substr(0, slash), "--", where.substr(slash + 1));
  const fs::path ref = repository / "refs" / "main";
  if (!cache.empty() && path_exists(ref)) {
    std::string hash = read_file(ref, 4096);
    while (!hash.empty() && std::isspace(static_cast<unsigned char>(hash.back()))) hash.pop_back();
    const fs::path snapshot = repository / "snapshots" / hash;
    if (plain(hash) && is_folder(snapshot)) return snapshot;
  }
  throw Error(cat(where, ": no such folder, and not in the Hugging Face cache",
                  cache.empty() ? "" : " " + cache.string(), "; fetch it with: hf download ", where));
}

}  // namespace kda
