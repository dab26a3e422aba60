// bench/kernels/device.h — what begins every line of results: where it was measured, and with what.
#pragma once
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#ifndef KDA_COMMIT
#define KDA_COMMIT "unknown"
#endif

namespace kda::bench {

inline std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

inline nlohmann::ordered_json head(int threads) {
  return {{"op", ""}, {"device", cpu_name()}, {"threads", threads}, {"commit", KDA_COMMIT}};
}

}  // namespace kda::bench
