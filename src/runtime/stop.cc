#include "runtime/stop.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace kda {

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& s : stops_) KDA_CHECK(!s.empty(), "stop: a stop text must not be empty");
}

std::string StopMatcher::push(std::string_view piece) {
  if (stopped()) return {};
  const size_t before = held_.size();
  held_ += piece;
  const std::string_view text = held_;
  for (size_t end = before + 1; end <= text.size(); ++end) {
    for (size_t i = 0; i < stops_.size(); ++i)
      if (text.substr(0, end).ends_with(stops_[i]) && (hit_ < 0 || stops_[i].size() > stops_[size_t(hit_)].size()))
        hit_ = int(i);
    if (hit_ < 0) continue;
    std::string out = held_.substr(0, end - stops_[size_t(hit_)].size());
    held_.clear();
    return out;
  }
  size_t hold = 0;
  for (const std::string& s : stops_) {
    size_t n = std::min(s.size() - 1, text.size());
    while (n > hold && !text.ends_with(std::string_view(s).substr(0, n))) --n;
    hold = std::max(hold, n);
  }
  std::string out = held_.substr(0, held_.size() - hold);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::finish() { return std::exchange(held_, {}); }

}  // namespace kda
