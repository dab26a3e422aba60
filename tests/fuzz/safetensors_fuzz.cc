// A safetensors file of any bytes is a header within the file, or an Error.
#include <cstdlib>
#include <span>

#include "base/error.h"
#include "checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto header = kda::parse_safetensors({reinterpret_cast<const std::byte*>(data), size}, "fuzz");
    size_t covered = 0;
    for (const auto& [name, e] : header.tensors) {
      if (e.begin > e.end || e.end > size) std::abort();
      covered += e.end - e.begin;
      if (!e.dtype) continue;
      size_t bytes = kda::size_of(*e.dtype);
      for (int64_t d : e.shape) bytes *= size_t(d);
      if (bytes != e.end - e.begin) std::abort();
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | data[i];
    if (covered != size - 8 - length) std::abort();
  } catch (const kda::Error&) {
  }
  return 0;
}
