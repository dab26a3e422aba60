// A stored teacher is foreign bytes: whatever they are, reading them either works or throws Error. The input is
// capture.json, index.bin and rows.bin, each after 4 bytes of its length.
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/error.h"
#include "train/stored_teacher.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::filesystem::path folder = [] {
    const std::filesystem::path root = std::filesystem::exists("/dev/shm") ? "/dev/shm" : "/tmp";
    const auto p = root / ("kda-stored-fuzz-" + std::to_string(getpid()));
    std::filesystem::create_directories(p);
    return p;
  }();
  for (const char* name : {"capture.json", "index.bin", "rows.bin"}) {
    uint32_t n = 0;
    if (size >= 4) {
      std::memcpy(&n, data, 4);
      data += 4, size -= 4;
    }
    const size_t take = std::min<size_t>(n, size);
    std::ofstream(folder / name, std::ios::binary).write(reinterpret_cast<const char*>(data), std::streamsize(take));
    data += take, size -= take;
  }
  try {
    const auto s = kda::open_stored_logprobs(folder);
    for (int64_t row = 0; row < std::min<int64_t>(s->count(), 16); ++row) {
      const auto n = size_t(std::min<int64_t>(s->length(row), 64));
      if (n * size_t(s->k()) > 1 << 20) continue;
      std::vector<int32_t> tokens(n), ids(n * size_t(s->k()));
      std::vector<float> logprobs(ids.size());
      s->read_ids(row, 0, tokens);
      s->read(row, 0, tokens, ids, logprobs);
    }
  } catch (const kda::Error&) {
  }
  return 0;
}
