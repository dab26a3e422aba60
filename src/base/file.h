// base/file.h — files: mapped for reading, written so that a reader sees the old file or the whole new one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace kda {

// Whether something, or a folder, is there. What cannot be looked at (no permission, a name too long) is not there.
bool path_exists(const std::filesystem::path&);
bool is_folder(const std::filesystem::path&);

// Throws Error naming the path and the system's reason. Refuses a file larger than max_bytes.
std::string read_file(const std::filesystem::path&, size_t max_bytes = size_t(1) << 32);

// A whole file mapped read-only and shared with the page cache. The mapping lives as long as any owner.
class MappedFile {
 public:
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path&);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }
  int descriptor() const { return descriptor_; }  // open for reading as long as the mapping lives; -1: an empty file

  // The file behind a tensor's storage, or nullptr when that is other memory.
  static const MappedFile* behind(const std::shared_ptr<void>& storage);

 private:
  struct Release {
    const MappedFile* file;
    void operator()(const MappedFile* m) const { delete m; }
  };
  MappedFile() = default;
  int descriptor_ = -1;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  std::filesystem::path path_;
};

// Writes to a neighbour `NAME.tmp-PID-N`, then commit() syncs and renames it over `path`. Without commit() (an error,
// a full disk) the neighbour is removed and `path` is untouched. A link is followed, an old file's permissions are kept;
// a device or pipe is written to directly. Refuses a folder.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view s) { write(s.data(), s.size()); }
  void commit();

 private:
  std::filesystem::path path_, temporary_;  // temporary_ is empty for a device or pipe
  int fd_ = -1;
};

}  // namespace kda
