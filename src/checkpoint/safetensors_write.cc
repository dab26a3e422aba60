#include <algorithm>
#include <cstring>

#include "checkpoint/json.h"
#include "checkpoint/safetensors.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

const char* file_name_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return "F32";
    case Dtype::bf16: return "BF16";
    case Dtype::f16: return "F16";
    case Dtype::f64: return "F64";
    case Dtype::i8: return "I8";
    case Dtype::u8: return "U8";
    case Dtype::i16: return "I16";
    case Dtype::i32: return "I32";
    case Dtype::i64: return "I64";
    case Dtype::boolean: return "BOOL";
    case Dtype::f8_e4m3: return "F8_E4M3";
  }
  throw Error("safetensors: dtype without a name");
}

std::string make_header(const std::vector<SafetensorsItem>& items, const Metadata& metadata, const std::string& where) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t at = 0;
  for (const auto& i : items) {
    KDA_CHECK(i.name != "__metadata__" && !header.contains(i.name), where, ": tensor name '", i.name,
              "' is given twice or reserved");
    header[i.name] = {{"dtype", file_name_of(i.dtype)}, {"shape", i.shape}, {"data_offsets", {at, at + i.bytes()}}};
    at += i.bytes();
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& e) {
    throw Error(cat(where, ": names and metadata must be UTF-8: ", e.what()));
  }
  // Data begins at a multiple of a cache line, so that vector loads from the mapped file do not straddle two.
  text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');
  std::string out;
  for (uint64_t n = text.size(), i = 0; i < 8; ++i) out += char(n >> (8 * i) & 0xff);
  return out + text;
}

SafetensorsItem item_of(const std::string& name, const ConstView& v) {
  const auto* d = v.shape.dim.data();
  return {name, v.dtype, std::vector<int64_t>(d, d + v.shape.rank)};
}
}  // namespace

size_t SafetensorsItem::bytes() const {
  size_t n = size_of(dtype);
  for (int64_t d : shape)
    KDA_CHECK(d >= 0 && !__builtin_mul_overflow(n, size_t(d), &n) && n <= size_t(INT64_MAX), "tensor '", name,
              "': its size does not fit into 64 bits");
  return n;
}

SafetensorsWriter::SafetensorsWriter(const fs::path& path, std::vector<SafetensorsItem> items, const Metadata& metadata)
    : items_(std::move(items)), path_(path), file_(path) {
  std::stable_sort(items_.begin(), items_.end(), [](const auto& a, const auto& b) {
    const size_t wa = size_of(a.dtype), wb = size_of(b.dtype);
    return wa != wb ? wa > wb : a.name < b.name;
  });
  file_.write(make_header(items_, metadata, path.string()));
  for (const auto& i : items_) left_bytes_ += i.bytes();
}

void SafetensorsWriter::write(const void* data, size_t bytes) {
  KDA_CHECK(bytes <= left_bytes_, path_.string(), ": ", bytes, " bytes more to write, the header leaves ", left_bytes_);
  file_.write(data, bytes);
  left_bytes_ -= bytes;
}

void SafetensorsWriter::commit() {
  KDA_CHECK(left_bytes_ == 0, path_.string(), ": ", left_bytes_, " bytes of tensors were not written");
  file_.commit();
}

void save_safetensors(const fs::path& path, const std::map<std::string, ConstView>& tensors, const Metadata& metadata) {
  std::vector<SafetensorsItem> items;
  for (const auto& [name, v] : tensors) items.push_back(item_of(name, v));
  SafetensorsWriter w(path, std::move(items), metadata);
  for (const auto& i : w.items()) w.write(tensors.at(i.name).data, i.bytes());
  w.commit();
}

void save_model_tensors(const fs::path& folder, const std::vector<SafetensorsItem>& items, const FillItem& fill,
                        size_t max_shard_bytes, const Metadata& metadata, const std::function<void(size_t)>& progress) {
  KDA_CHECK(max_shard_bytes > 0, "save_model_tensors: max_shard_bytes must be above 0");
  std::vector<std::vector<SafetensorsItem>> shards(1);
  size_t in_shard = 0, total = 0;
  for (const auto& i : items) {
    if (!shards.back().empty() && (i.bytes() > max_shard_bytes || in_shard > max_shard_bytes - i.bytes())) {
      shards.emplace_back();
      in_shard = 0;
    }
    in_shard += i.bytes();
    total += i.bytes();
    shards.back().push_back(i);
  }
  const bool single = shards.size() == 1;
  const fs::path other = folder / (single ? "model.safetensors.index.json" : "model.safetensors");
  KDA_CHECK(!path_exists(other), other.string(), ": already here; writing a model of ", shards.size(),
            " files beside it would leave two models in one folder");

  // All files stay under temporary names until the last byte of the last one is down.
  nlohmann::ordered_json map = nlohmann::ordered_json::object();
  std::vector<std::unique_ptr<SafetensorsWriter>> writers;
  std::vector<std::byte> piece;
  constexpr size_t kPiece = size_t(32) << 20;
  for (size_t s = 0; s < shards.size(); ++s) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", s + 1, shards.size());
    if (single) std::snprintf(name, sizeof name, "model.safetensors");
    for (const auto& i : shards[s]) {
      KDA_CHECK(!map.contains(i.name), folder.string(), ": tensor name '", i.name, "' is given twice");
      map[i.name] = name;
    }
    auto& w = writers.emplace_back(std::make_unique<SafetensorsWriter>(folder / name, shards[s], metadata));
    for (const auto& i : w->items()) {
      const size_t bytes = i.bytes();
      for (size_t at = 0; at < bytes;) {
        piece.resize(std::min(kPiece, bytes - at));
        fill(i, at, piece);
        w->write(piece.data(), piece.size());
        at += piece.size();
        if (progress) progress(piece.size());
      }
    }
  }
  std::unique_ptr<AtomicFile> index;
  if (!single) {
    index = std::make_unique<AtomicFile>(folder / "model.safetensors.index.json");
    const nlohmann::ordered_json root = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    index->write(root.dump(2) + "\n");
  }
  for (auto& w : writers) w->commit();
  if (index) index->commit();
}

}  // namespace kda
