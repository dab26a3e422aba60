#include "train/write_model.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "base/file.h"
#include "checkpoint/files.h"

namespace kda {

namespace {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr size_t kMaxText = size_t(1) << 30;

// A folder that becomes `to` when everything in it is done, and vanishes otherwise.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& to) : to_(fs::absolute(to).lexically_normal()) {
    static std::atomic<unsigned> serial{0};
    if (!to_.has_filename()) to_ = to_.parent_path();  // "DIR/"
    check_new_folder(to_);
    std::error_code error;
    fs::create_directories(to_.parent_path(), error);
    path_ = to_;
    path_ += cat(".tmp-", ::getpid(), "-", serial++);
    KDA_CHECK(fs::create_directory(path_, error), to.string(), ": cannot make this folder: ", error.message());
  }
  ~NewFolder() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  const fs::path& path() const { return path_; }
  void commit() {
    sync(path_);
    std::error_code error;
    fs::rename(path_, to_, error);
    KDA_CHECK(!error, to_.string(), ": cannot rename ", path_.string(), ": ", error.message());
    path_.clear();
    sync(to_.parent_path());
  }

 private:
  static void sync(const fs::path& folder) {  // names of files last only when their folder does
    const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    ::fsync(fd);
    ::close(fd);
  }
  fs::path to_, path_;
};

void write_text(const fs::path& path, const std::string& text) {
  AtomicFile f(path);
  f.write(text);
  f.commit();
}

// Files of a model folder that belong to the text side of the model or must travel with it.
bool travels(const std::string& name) {
  static const std::set<std::string> whole = {"generation_config.json", "spiece.model", "sentencepiece.bpe.model",
                                              "preprocessor_config.json"};
  if (whole.count(name)) return true;
  for (const char* start : {"tokenizer", "tokenization", "special_tokens", "added_tokens", "vocab", "merges",
                            "chat_template", "LICENSE", "LICENCE", "NOTICE"})
    if (name.starts_with(start)) return true;
  return false;
}

void copy_companions(const fs::path& from, const fs::path& to, bool card) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(from)) {
    const std::string name = e.path().filename().string();
    std::error_code ignored;  // a link without a target is no file
    if (fs::is_regular_file(e.path(), ignored) && (travels(name) || (card && name == "README.md")))
      files.push_back(e.path());
    if (name == "additional_chat_templates" && fs::is_directory(e.path(), ignored)) {
      fs::create_directory(to / name);
      for (const auto& t : fs::directory_iterator(e.path()))
        if (fs::is_regular_file(t.path(), ignored)) files.push_back(t.path());
    }
  }
  for (const fs::path& f : files) write_text(to / f.lexically_relative(from), read_file(f, kMaxText));
}

template <class To, class From>
void convert_all(std::byte* out, const From* from, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const To y(static_cast<float>(from[i]));
    std::memcpy(out + i * sizeof(To), &y, sizeof y);
  }
}

// Elements [from, from + n) of v as `stored`.
void store(const ConstView& v, Dtype stored, size_t from, size_t n, std::byte* out) {
  if (v.dtype == stored) {
    std::memcpy(out, static_cast<const std::byte*>(v.data) + from * size_of(stored), n * size_of(stored));
    return;
  }
  const auto to = [&](const auto* p) {
    switch (stored) {
      case Dtype::f32: convert_all<float>(out, p + from, n); return;
      case Dtype::bf16: convert_all<bf16>(out, p + from, n); return;
      default: convert_all<f16>(out, p + from, n); return;
    }
  };
  switch (v.dtype) {
    case Dtype::f32: to(v.as<float>()); return;
    case Dtype::bf16: to(v.as<bf16>()); return;
    default: to(v.as<f16>()); return;
  }
}

struct Stored {
  TensorSpec spec;
  Dtype dtype;
};

// File name -> what is written under it. Names, and shapes of equal size, are those of the source where it has them.
std::map<std::string, Stored> plan_items(const ModelConfig& c, Dtype stored, const fs::path& source,
                                         std::vector<SafetensorsItem>& items) {
  std::map<std::string, std::pair<std::string, std::vector<int64_t>>> known;
  if (path_exists(source / "model.safetensors") || path_exists(source / "model.safetensors.index.json")) {
    const ModelFiles files(source);
    for (const std::string& name : files.names())
      known.try_emplace(canonical_name(name), name, files.entry(name).shape);
  }
  std::map<std::string, Stored> out;
  for (TensorSpec& t : tensor_table(c)) {
    std::string name = t.name;
    std::vector<int64_t> shape = t.file_shape;
    if (const auto it = known.find(t.name); it != known.end()) {
      int64_t n = 1;
      for (int64_t d : it->second.second) n *= d;
      name = it->second.first;
      if (n == t.shape.size()) shape = it->second.second;
    }
    const Dtype dtype = t.fp32 ? Dtype::f32 : stored;
    items.push_back({name, dtype, shape});
    out.emplace(name, Stored{std::move(t), dtype});
  }
  return out;
}

void check_source(const Tensor& t, const TensorSpec& spec) {
  const Dtype d = t.dtype();
  KDA_CHECK(t && (d == Dtype::f32 || d == Dtype::bf16 || d == Dtype::f16), "write_model_folder: ", spec.name, " is ",
            t ? name_of(d) : "not there", ", needed f32, bf16 or f16");
  KDA_CHECK(t.shape().size() == spec.shape.size(), "write_model_folder: ", spec.name, " is ", t.shape(), ", needed ",
            spec.shape);
}

TensorShapes shapes_of(const ModelConfig& c) {
  TensorShapes out;
  for (const TensorSpec& t : tensor_table(c)) out[t.name] = t.file_shape;
  return out;
}

bool same_model(const ModelConfig& a, const ModelConfig& b) {
  return a.vocabulary == b.vocabulary && a.width == b.width && a.activation == b.activation &&
         a.norm_eps == b.norm_eps && a.tied_head == b.tied_head && a.dtype == b.dtype && a.layers == b.layers;
}

// The model that a text describes, if it describes one with these tensors.
bool describes(const std::string& text, const ModelConfig& c) {
  try {
    return same_model(parse_config(text, shapes_of(c)), c);
  } catch (const Error&) {
    return false;
  }
}
}  // namespace

void check_new_folder(const fs::path& out) {
  KDA_CHECK(!out.empty(), "the folder to write has no name");
  std::error_code error;
  KDA_CHECK(!path_exists(out) || is_folder(out), out.string(), ": is a file, needed the name of a new folder");
  KDA_CHECK(!path_exists(out) || fs::is_empty(out, error), out.string(),
            ": exists already and is not empty; it was left as it is");
}

std::string updated_config(const ModelConfig& c) {
  if (c.text.empty()) return write_config(c);
  Json j;
  try {
    j = Json::parse(c.text);
  } catch (const Json::exception& e) {
    throw Error(cat("config.json: not valid JSON: ", e.what()));
  }
  const bool kda = std::any_of(c.layers.begin(), c.layers.end(), [](const auto& s) { return s.mixer == Mixer::kda; });
  // Where the text says what the layers are and they stand as they are, only the dtype may be new.
  const bool old_style = j.contains("torch_dtype") && !j.contains("dtype");
  const char* dtype = c.dtype == Dtype::bf16 ? "bfloat16" : c.dtype == Dtype::f16 ? "float16" : "float32";
  j[old_style ? "torch_dtype" : "dtype"] = dtype;
  const bool tells = !kda || j.value("model_type", "") == "arcee_kda" || j.value("model_type", "") == "kda";
  if (tells && describes(j.dump(), c)) return j.dump(2) + "\n";

  const Json ours = Json::parse(write_config(c));
  for (const auto& [key, value] : ours.items()) {
    if (key == "dtype") continue;
    // Rotary settings and ids are the source's: converted layers drop positions, nothing changes them.
    if (key == "rope_parameters" && (j.contains(key) || j.contains("rope_scaling") || j.contains("rope_theta")))
      continue;
    j[key] = value;
  }
  if (kda) {
    Json rotary = Json::array();
    for (const LayerSpec& s : c.layers) rotary.push_back(s.mixer == Mixer::full && s.rope ? 1 : 0);
    j["no_rope_layers"] = rotary;
    if (!ours.contains("lower_bound")) j.erase("lower_bound");
    if (!ours.contains("allow_neg_eigval")) j.erase("allow_neg_eigval");
    j.erase("linear_attn_config");  // says in Kimi's way what layer_types says
  }
  const std::string text = j.dump(2) + "\n";
  KDA_CHECK(same_model(parse_config(text, shapes_of(c)), c),
            "config.json: the changed model cannot be told in the terms of model_type ", c.model_type);
  return text;
}

void write_model_folder(const fs::path& out, const ModelConfig& given, const TensorSource& value,
                        const WriteOptions& options, const fs::path& source, const std::string& card) {
  KDA_CHECK(options.stored == Dtype::f32 || options.stored == Dtype::bf16 || options.stored == Dtype::f16,
            "write_model_folder: weights cannot be stored in ", name_of(options.stored));
  KDA_CHECK(is_folder(source), source.string(), ": is not a folder; the tokenizer files come from there");
  ModelConfig c = given;
  c.dtype = options.stored;
  const std::string config = updated_config(c);
  std::vector<SafetensorsItem> items;
  const auto plan = plan_items(c, options.stored, source, items);

  NewFolder folder(out);
  std::string held;  // one tensor at a time
  Tensor tensor;
  const auto fill = [&](const SafetensorsItem& item, size_t offset, std::span<std::byte> to) {
    const Stored& s = plan.at(item.name);
    if (held != item.name) {
      tensor = {};
      tensor = value(s.spec);
      check_source(tensor, s.spec);
      held = item.name;
    }
    store(tensor, s.dtype, offset / size_of(s.dtype), to.size() / size_of(s.dtype), to.data());
  };
  save_model_tensors(folder.path(), items, fill, options.max_shard_bytes, {{"format", "pt"}}, options.progress);
  copy_companions(source, folder.path(), card.empty());
  if (!card.empty()) write_text(folder.path() / "README.md", card);
  write_text(folder.path() / "config.json", config);
  folder.commit();
}

void write_model_folder(const fs::path& out, const ModelConfig& config, const std::map<std::string, ConstView>& values,
                        Dtype stored, const fs::path& source, const std::string& card) {
  std::string missing;
  for (const TensorSpec& t : tensor_table(config))
    if (!values.count(t.name)) missing += "\n    " + t.name;
  KDA_CHECK(missing.empty(), "write_model_folder: no value for", missing);
  const auto borrow = [&](const TensorSpec& t) {
    const ConstView& v = values.at(t.name);
    return Tensor{nullptr, {const_cast<void*>(v.data), v.dtype, v.shape}};
  };
  write_model_folder(out, config, borrow, {.stored = stored}, source, card);
}

}  // namespace kda
