// checkpoint/safetensors.h — the safetensors format: 8 bytes of header length (little-endian), a JSON header, the data.
// Reading is by mapping. The rules are those of the reference implementation: no hole, no overlap, nothing behind the
// last tensor, every range as long as its shape and dtype say.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/file.h"
#include "base/tensor.h"

namespace kda {

struct SafetensorsEntry {
  std::string dtype_name;      // as written: F32, BF16, ..
  std::optional<Dtype> dtype;  // empty: a dtype this program cannot read; only using such a tensor is an error
  std::vector<int64_t> shape;  // any rank
  size_t begin = 0, end = 0;   // bytes, from the start of the file
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;  // __metadata__
};

// The header of a whole file in memory. Throws Error beginning with `where` for whatever breaks a rule of the format.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& where);

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path&);

  const std::filesystem::path& path() const { return file_->path(); }
  const std::map<std::string, SafetensorsEntry>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  bool has(const std::string& name) const { return header_.tensors.count(name) > 0; }

  // Where it lies in the mapping, read-only; copied only when its bytes are not aligned for its dtype. Throws Error
  // naming the tensor when it is absent, of a dtype this program cannot read, or (without `as`) of more than 4
  // dimensions.
  Tensor tensor(const std::string& name) const;
  Tensor tensor(const std::string& name, const Shape& as) const;  // same number of elements, another shape

 private:
  std::shared_ptr<const MappedFile> file_;
  SafetensorsHeader header_;
};

struct SafetensorsItem {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<int64_t> shape;

  size_t bytes() const;
};

using Metadata = std::map<std::string, std::string>;

// One file, streamed: the bytes of items() in that order, in pieces of any size, then commit(). Without commit()
// nothing appears at `path`. The order is the reference's: widest dtype first, then by name.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& path, std::vector<SafetensorsItem> items,
                    const Metadata& metadata = {});

  const std::vector<SafetensorsItem>& items() const { return items_; }
  void write(const void* data, size_t bytes);
  void commit();  // throws Error when less was written than the header says

 private:
  std::vector<SafetensorsItem> items_;
  size_t left_bytes_ = 0;
  std::filesystem::path path_;
  AtomicFile file_;
};

void save_safetensors(const std::filesystem::path&, const std::map<std::string, ConstView>&, const Metadata& = {});

// Writes bytes [offset, offset + out.size()) of an item.
using FillItem = std::function<void(const SafetensorsItem&, size_t offset, std::span<std::byte> out)>;

// model.safetensors in `folder`, or shards of at most max_shard_bytes (one tensor may be larger) with
// model.safetensors.index.json. Items are filled piece by piece, in file order, in rising offsets; shards follow the
// order of `items`. Nothing appears in the folder unless everything was written. Throws Error when the folder already
// holds a model in the other layout. `progress` is told the bytes just written.
void save_model_tensors(const std::filesystem::path& folder, const std::vector<SafetensorsItem>& items,
                        const FillItem& fill, size_t max_shard_bytes = size_t(5) << 30, const Metadata& metadata = {},
                        const std::function<void(size_t bytes)>& progress = {});

}  // namespace kda
