#include "checkpoint/layer_pattern.h"

#include <cctype>

#include "base/error.h"

namespace kda {

std::vector<bool> kda_layers(const std::string& pattern, int64_t layers) {
  const std::string needed = "needed all, none, hybrid:KDA:FULL or a list such as 0,1,5-9";
  std::vector<bool> out(size_t(layers), pattern == "all");
  if (pattern == "all" || pattern == "none") return out;
  size_t at = 0;
  const auto number = [&] {
    const size_t from = at;
    while (at < pattern.size() && std::isdigit(static_cast<unsigned char>(pattern[at]))) ++at;
    KDA_CHECK(at > from && at - from < 9, "KDA layers '", pattern, "': ", needed);
    return int64_t(std::stol(pattern.substr(from, at - from)));
  };
  const auto take = [&](char c) { return at < pattern.size() && pattern[at] == c ? ++at : 0; };
  if (pattern.starts_with("hybrid:")) {
    at = 7;
    const int64_t kda = number();
    KDA_CHECK(take(':'), "KDA layers '", pattern, "': ", needed);
    const int64_t full = number();
    KDA_CHECK(at == pattern.size() && kda + full > 0, "KDA layers '", pattern, "': ", needed);
    for (int64_t l = 0; l < layers; ++l) out[size_t(l)] = l % (kda + full) < kda;
    return out;
  }
  do {
    const int64_t first = number(), last = take('-') ? number() : first;
    KDA_CHECK(first <= last && last < layers, "KDA layers '", pattern, "': ", first, "-", last, " is not within the ",
              layers, " layers 0-", layers - 1);
    for (int64_t l = first; l <= last; ++l) out[size_t(l)] = true;
  } while (take(','));
  KDA_CHECK(at == pattern.size(), "KDA layers '", pattern, "': ", needed);
  return out;
}

}  // namespace kda
