// base/memory.h — how much memory this process has resident, as the kernel counts it (mapped files included).
#pragma once
#include <cstdint>

namespace kda {

int64_t resident_bytes();       // now
int64_t peak_resident_bytes();  // most so far

}  // namespace kda
