// Stands in for NVIDIA's driver library (libcuda.so.1) where a test asks what a program says to an old one: answers its
// version, which FAKE_DRIVER_VERSION gives (12040 for CUDA 12.4), and nothing else.
#include <cstdlib>

extern "C" {
int cuDriverGetVersion(int* version) {
  const char* said = std::getenv("FAKE_DRIVER_VERSION");
  *version = said ? std::atoi(said) : 0;
  return 0;
}
int cuInit(unsigned) { return 0; }
}
