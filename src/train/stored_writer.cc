#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/file.h"
#include "train/stored_format.h"

namespace kda {

namespace {
namespace fs = std::filesystem;
using namespace stored;

void write_all(int fd, const fs::path& path, const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes) {
    const ssize_t n = ::write(fd, p, bytes);
    if (n < 0 && errno == EINTR) continue;
    KDA_CHECK(n > 0, path.string(), ": cannot write: ", n < 0 ? std::strerror(errno) : "nothing was taken");
    p += n;
    bytes -= size_t(n);
  }
}

// Where whole rows end; begins[i] is where row i begins.
std::vector<uint64_t> whole_rows(const fs::path& path, const LogprobCodec& codec, int64_t* tokens) {
  const auto file = MappedFile::open(path);
  const auto* p = reinterpret_cast<const uint8_t*>(file->data());
  if (file->size() < kRowsMark.size()) return {};
  KDA_CHECK(std::memcmp(p, kRowsMark.data(), kRowsMark.size()) == 0, path.string(), ": offset 0: does not begin with ",
            kRowsMark);
  std::vector<uint64_t> begins{kRowsMark.size()};
  *tokens = 0;
  try {
    while (begins.back() < file->size()) {
      const uint64_t at = begins.back();
      const int64_t n = check_row(codec, path.string(), p + at, at, file->size() - at, int64_t(begins.size()) - 1);
      *tokens += n;
      begins.push_back(at + uint64_t(row_bytes(codec, n)));
    }
  } catch (const Error&) {
    // What a kill cut off; it is made again.
  }
  return begins;
}
}  // namespace

CaptureWriter::CaptureWriter(fs::path folder, const CaptureHeader& header, bool resume)
    : folder_(std::move(folder)), header_(header), codec_(header.codec) {
  const fs::path rows = folder_ / kRowsName, unfinished = folder_ / kUnfinishedName;
  KDA_CHECK(!path_exists(folder_ / kHeaderName), folder_.string(),
            ": holds a finished capture; give another folder, or remove this one");
  const bool begun = path_exists(unfinished);
  KDA_CHECK(!begun || resume, folder_.string(), ": holds an unfinished capture; go on with --resume, or remove it");
  KDA_CHECK(begun || !path_exists(rows), rows.string(), ": is there already, without ", kUnfinishedName, " beside it");
  if (begun) {
    Counts counts;
    const CaptureHeader before = read_header(read_file(unfinished, 1 << 20), unfinished.string(), &counts);
    KDA_CHECK(before == header, folder_.string(),
              ": was begun with other settings (model, data, sequence length, tokens or codec): ", unfinished.string(),
              " says which; resume with those, or remove the folder");
    if (path_exists(rows)) offsets_ = whole_rows(rows, codec_, &tokens_);
  } else {
    std::error_code error;
    fs::create_directories(folder_, error);
    KDA_CHECK(!error, folder_.string(), ": cannot make this folder: ", error.message());
    AtomicFile file(unfinished);
    file.write(write_header(header, {}));
    file.commit();
  }
  fd_ = ::open(rows.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  KDA_CHECK(fd_ >= 0, rows.string(), ": cannot open for writing: ", std::strerror(errno));
  try {
    const uint64_t end = offsets_.empty() ? 0 : offsets_.back();
    KDA_CHECK(::ftruncate(fd_, off_t(end)) == 0 && ::lseek(fd_, off_t(end), SEEK_SET) >= 0, rows.string(),
              ": cannot cut to ", end, " bytes: ", std::strerror(errno));
    if (offsets_.empty()) {
      write_all(fd_, rows, kRowsMark.data(), kRowsMark.size());
      offsets_ = {kRowsMark.size()};
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

CaptureWriter::~CaptureWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void CaptureWriter::add(std::span<const int32_t> ids, std::span<const uint8_t> values,
                        std::span<const uint8_t> indices) {
  const int64_t n = int64_t(ids.size());
  KDA_CHECK(fd_ >= 0, folder_.string(), ": is finished");
  KDA_CHECK(n > 0 && n < (int64_t(1) << 31) && int64_t(values.size()) == n * codec_.value_bytes() &&
                int64_t(indices.size()) == n * codec_.index_bytes(),
            "capture: a row of ", n, " tokens must have ", n * codec_.value_bytes(), " bytes of values and ",
            n * codec_.index_bytes(), " of indices, got ", values.size(), " and ", indices.size());
  std::string row;
  row.reserve(size_t(row_bytes(codec_, n)));
  const auto append = [&](const void* p, size_t bytes) { row.append(static_cast<const char*>(p), bytes); };
  const auto tokens = uint32_t(n);
  const auto number = uint64_t(rows());
  append(kRowMark.data(), kRowMark.size());
  append(&tokens, sizeof tokens);
  append(&number, sizeof number);
  append(ids.data(), ids.size_bytes());
  append(values.data(), values.size());
  append(indices.data(), indices.size());
  const uint64_t sum = fnv1a(row.data(), row.size());
  append(&sum, sizeof sum);
  write_all(fd_, folder_ / kRowsName, row.data(), row.size());
  offsets_.push_back(offsets_.back() + row.size());
  tokens_ += n;
}

void CaptureWriter::finish() {
  const fs::path rows_file = folder_ / kRowsName;
  KDA_CHECK(::fsync(fd_) == 0, rows_file.string(), ": cannot sync: ", std::strerror(errno));
  ::close(fd_);
  fd_ = -1;
  std::string index(kIndexMark);
  const auto n = uint64_t(rows());
  index.append(reinterpret_cast<const char*>(&n), sizeof n);
  index.append(reinterpret_cast<const char*>(offsets_.data()), offsets_.size() * sizeof(uint64_t));
  const uint64_t sum = fnv1a(index.data(), index.size());
  index.append(reinterpret_cast<const char*>(&sum), sizeof sum);
  AtomicFile index_file(folder_ / kIndexName);
  index_file.write(index);
  index_file.commit();
  AtomicFile header(folder_ / kHeaderName);
  header.write(write_header(header_, {rows(), tokens_}));
  header.commit();
  std::error_code ignored;
  fs::remove(folder_ / kUnfinishedName, ignored);
}

}  // namespace kda
