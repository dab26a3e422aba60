#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

Descriptor open_readable(const fs::path& path, struct stat& st) {
  Descriptor d{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  KDA_CHECK(d.fd >= 0, path.string(), ": cannot open: ", std::strerror(errno));
  KDA_CHECK(::fstat(d.fd, &st) == 0, path.string(), ": cannot stat: ", std::strerror(errno));
  KDA_CHECK(!S_ISDIR(st.st_mode), path.string(), ": is a folder, needed a file");
  return d;
}
}  // namespace

bool path_exists(const fs::path& path) {
  std::error_code none;
  return fs::exists(path, none);
}

bool is_folder(const fs::path& path) {
  std::error_code none;
  return fs::is_directory(path, none);
}

std::string read_file(const fs::path& path, size_t max_bytes) {
  struct stat st;
  const Descriptor d = open_readable(path, st);
  std::string out;
  out.resize(st.st_size > 0 ? size_t(st.st_size) : 0);  // a pipe says 0 and grows below
  size_t have = 0;
  for (;;) {
    if (have == out.size()) out.resize(out.size() + 65536);
    const ssize_t n = ::read(d.fd, out.data() + have, out.size() - have);
    if (n < 0 && errno == EINTR) continue;
    KDA_CHECK(n >= 0, path.string(), ": cannot read: ", std::strerror(errno));
    if (n == 0) break;
    have += size_t(n);
    KDA_CHECK(have <= max_bytes, path.string(), ": larger than the ", max_bytes, " bytes allowed here");
  }
  out.resize(have);
  return out;
}

std::shared_ptr<const MappedFile> MappedFile::open(const fs::path& path) {
  struct stat st;
  const Descriptor d = open_readable(path, st);
  auto* const file = new MappedFile;
  const std::shared_ptr<MappedFile> m(file, Release{file});
  m->path_ = path;
  m->size_ = size_t(st.st_size);
  if (m->size_) {
    void* p = ::mmap(nullptr, m->size_, PROT_READ, MAP_SHARED, d.fd, 0);
    KDA_CHECK(p != MAP_FAILED, path.string(), ": cannot map ", m->size_, " bytes: ", std::strerror(errno));
    m->data_ = static_cast<const std::byte*>(p);
    m->descriptor_ = ::fcntl(d.fd, F_DUPFD_CLOEXEC, 0);
    KDA_CHECK(m->descriptor_ >= 0, path.string(), ": cannot keep it open: ", std::strerror(errno));
  }
  return m;
}

const MappedFile* MappedFile::behind(const std::shared_ptr<void>& storage) {
  const Release* r = std::get_deleter<Release>(storage);
  return r ? r->file : nullptr;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
  if (descriptor_ >= 0) ::close(descriptor_);
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  static std::atomic<unsigned> serial{0};
  std::error_code error;
  if (fs::is_symlink(path_, error)) path_ = fs::weakly_canonical(path_);
  struct stat st;
  const bool exists = ::stat(path_.c_str(), &st) == 0;
  KDA_CHECK(!exists || !S_ISDIR(st.st_mode), path_.string(), ": is a folder, needed the name of a file to write");
  if (exists && !S_ISREG(st.st_mode)) {
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    KDA_CHECK(fd_ >= 0, path_.string(), ": cannot open for writing: ", std::strerror(errno));
    return;
  }
  temporary_ = path_;
  temporary_ += cat(".tmp-", ::getpid(), "-", serial++);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, exists ? 0600 : 0666);
  KDA_CHECK(fd_ >= 0, path_.string(), ": cannot create ", temporary_.string(), ": ", std::strerror(errno));
  if (exists && ::fchmod(fd_, st.st_mode & 07777) != 0) {
    const int reason = errno;
    ::close(fd_);
    ::unlink(temporary_.c_str());
    KDA_CHECK(false, path_.string(), ": cannot keep its permissions: ", std::strerror(reason));
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes) {
    const ssize_t n = ::write(fd_, p, std::min(bytes, size_t(1) << 30));
    if (n < 0 && errno == EINTR) continue;
    KDA_CHECK(n > 0, path_.string(), ": cannot write: ", std::strerror(errno), "; the file was left as it was");
    p += n;
    bytes -= size_t(n);
  }
}

void AtomicFile::commit() {
  if (temporary_.empty()) {
    ::close(fd_);
    fd_ = -1;
    return;
  }
  KDA_CHECK(::fsync(fd_) == 0, path_.string(), ": cannot write: ", std::strerror(errno), "; the file was left as it was");
  KDA_CHECK(::rename(temporary_.c_str(), path_.c_str()) == 0, path_.string(), ": cannot rename ", temporary_.string(),
            ": ", std::strerror(errno));
  ::close(fd_);
  fd_ = -1;
}

}  // namespace kda
