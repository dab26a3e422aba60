// Weights from a mapped file to the device, beside reading the file and copying pinned memory, each alone. JSON lines.
//   cuda_upload_bench [FILE] [GiB=3]     a FILE that is not there is written first, and removed in the end
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "bench/kernels/cuda_device.h"
#include "kernels/probe.h"

using namespace kda;
using namespace kda::bench;

namespace {

constexpr int64_t kPiece = int64_t(8) << 20;

double seconds_of(const std::function<void()>& f) {
  const auto from = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
}

void write_file(const std::filesystem::path& path, int64_t bytes) {
  AtomicFile file(path);
  std::vector<uint32_t> piece(size_t(kPiece) / 4);
  for (int64_t at = 0; at < bytes; at += kPiece) {
    for (size_t i = 0; i < piece.size(); ++i) piece[i] = uint32_t(i + size_t(at)) * 2654435761u;
    file.write(piece.data(), size_t(kPiece));
  }
  file.commit();
}

// Asks the kernel to forget the file; it may keep what is mapped or not yet written.
void forget(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY);
  if (fd < 0) return;
  fsync(fd);
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
}

// All threads read pieces into memory of their own.
void read_all(ThreadPool& pool, const std::filesystem::path& path, int64_t bytes) {
  std::vector<std::vector<char>> buffer(size_t(pool.threads()), std::vector<char>(size_t(kPiece)));
  const int fd = ::open(path.c_str(), O_RDONLY);
  pool.run(bytes / kPiece, [&](int64_t i, int worker) {
    KDA_CHECK(pread(fd, buffer[size_t(worker)].data(), size_t(kPiece), i * kPiece) == kPiece, path.string(),
              ": cannot be read");
  });
  close(fd);
}

}  // namespace

int main(int argc, char** argv) try {
  if (const std::string why = no_cuda(); !why.empty()) {
    std::cerr << "nothing measured: " << why << "\n";
    return 0;
  }
  const std::filesystem::path path = argc > 1 ? argv[1] : std::filesystem::temp_directory_path() / "kda-upload-bench";
  const int64_t bytes = int64_t((argc > 2 ? std::atof(argv[2]) : 3) * 128) * kPiece;
  const bool ours = !path_exists(path);
  if (ours) write_file(path, bytes);
  CudaContext ctx(1);
  const double pinned = probe_pinned_copy_bytes_per_s(ctx);
  const Tensor there = ctx.backend->alloc(Dtype::u8, {bytes});
  const auto upload = [&] {
    const auto file = MappedFile::open(path);
    const int64_t matrix = int64_t(90) << 20;  // as a model has them, one after the other
    std::vector<Transfer> all;
    for (int64_t at = 0; at < bytes; at += matrix)
      all.push_back({static_cast<char*>(there.v.data) + at,
                     {file->data() + at, size_t(std::min(matrix, bytes - at)), file->descriptor(), at}});
    ctx.backend->upload(ctx, all);
    ctx.wait();
  };
  for (const bool cold : {true, false, false}) {
    if (cold) forget(path);
    const double read = double(bytes) / seconds_of([&] { read_all(*ctx.pool, path, bytes); });
    if (cold) forget(path);
    const double sent = double(bytes) / seconds_of(upload);
    std::cout << nlohmann::ordered_json{{"op", "upload"},
                                        {"page_cache", cold ? "cold" : "warm"},
                                        {"threads", ctx.pool->threads()},
                                        {"GiB", double(bytes) / (1 << 30)},
                                        {"bytes_per_s", sent},
                                        {"file_read", read},
                                        {"pinned_copy", pinned},
                                        {"share", sent / std::min(read, pinned)}}
              << std::endl;
  }
  std::vector<char> back(kPiece);
  const auto file = MappedFile::open(path);
  for (const int64_t at : {int64_t{0}, bytes - kPiece}) {
    ctx.backend->copy(ctx, back.data(), static_cast<char*>(there.v.data) + at, size_t(kPiece));
    KDA_CHECK(std::memcmp(back.data(), file->data() + at, size_t(kPiece)) == 0, "the device holds something else");
  }
  if (ours) std::filesystem::remove(path);
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
