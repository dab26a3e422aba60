#include "base/memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>

#include "base/error.h"

namespace kda {

int64_t resident_bytes() {
  long long pages = -1, resident = -1;
  if (std::FILE* f = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(f, "%lld %lld", &pages, &resident) != 2) resident = -1;
    std::fclose(f);
  }
  KDA_CHECK(resident >= 0, "/proc/self/statm: cannot read the resident size");
  return resident * int64_t(sysconf(_SC_PAGESIZE));
}

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t(usage.ru_maxrss) * 1024;
}

}  // namespace kda
