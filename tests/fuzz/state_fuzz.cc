// A saved session is foreign bytes: whatever they are, restoring either works or throws Error.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "runtime/engine.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto engine = [] {
    kda::EngineOptions o;
    o.threads = 1;
    o.precision = kda::Precision::exact;
    const char* folder = std::getenv("KDA_FUZZ_MODEL");
    return std::make_unique<kda::Engine>(folder ? folder : KDA_SOURCE_DIR "/tests/golden/tiny-hybrid", o);
  }();
  const int fd = memfd_create("session", MFD_CLOEXEC);
  if (fd < 0 || write(fd, data, size) != ssize_t(size)) std::abort();
  try {
    kda::Session s = kda::Session::restore(*engine, "/proc/self/fd/" + std::to_string(fd));
    kda::Session* p = &s;
    if (s.pending()) engine->decode({&p, 1});
  } catch (const kda::Error&) {
  }
  close(fd);
  return 0;
}
