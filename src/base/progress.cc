#include "base/progress.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace kda {

ProgressStyle progress_style(std::FILE* f) { return isatty(fileno(f)) ? ProgressStyle::bar : ProgressStyle::lines; }

std::string with_prefix(double value, const std::string& unit) {
  static constexpr const char* kPrefix[] = {"", "k", "M", "G", "T", "P"};
  size_t i = 0;
  while (std::abs(value) >= 999.5 && i + 1 < std::size(kPrefix)) value /= 1000, ++i;
  char text[64];
  const int decimals = value == std::floor(value) && i == 0 ? 0
                       : std::abs(value) < 9.995            ? 2
                       : std::abs(value) < 99.95            ? 1
                                                            : 0;
  std::snprintf(text, sizeof text, "%.*f %s", decimals, value, kPrefix[i]);
  return text + unit;
}

std::string clock_time(double seconds) {
  const int64_t s = int64_t(std::llround(std::clamp(seconds, 0.0, 1e9)));
  char text[64];
  if (s >= 3600)
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", s / 3600LL, s / 60 % 60LL, s % 60LL);
  else
    std::snprintf(text, sizeof text, "%lld:%02lld", s / 60LL, s % 60LL);
  return text;
}

Progress::Progress(std::ostream& out, ProgressStyle style, std::string label, int64_t total, std::string unit,
                   Seconds now)
    : out_(out), style_(style), label_(std::move(label)), unit_(std::move(unit)), total_(total), now_(std::move(now)) {
  if (!now_)
    now_ = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  start_ = now_();
  last_ = start_ - (style_ == ProgressStyle::bar ? 1 : 0);  // the bar shows at once, a first line only after a while
}

Progress::~Progress() {
  if (drawn_) out_ << '\r' << std::string(drawn_, ' ') << '\r' << std::flush;
}

std::string Progress::state(double elapsed) const {
  const double rate = elapsed > 0 ? double(done_) / elapsed : 0;
  std::string s = label_ + " ";
  if (total_ > 0) {
    const double part = std::clamp(double(done_) / double(total_), 0.0, 1.0);
    if (style_ == ProgressStyle::bar) {
      constexpr int kWidth = 30;
      const int full = int(part * kWidth);
      s.append("[").append(size_t(full), '#').append(size_t(kWidth - full), '.').append("] ");
    }
    s += std::to_string(int(part * 100)) + "%  " + with_prefix(double(done_), unit_) + " of " +
         with_prefix(double(total_), unit_);
  } else {
    s += with_prefix(double(done_), unit_);
  }
  if (rate > 0) {
    s += "  " + with_prefix(rate, unit_ + "/s");
    if (total_ > done_) s += "  " + clock_time(double(total_ - done_) / rate) + " left";
  }
  return s;
}

void Progress::set(int64_t units) {
  done_ = units;
  if (style_ == ProgressStyle::silent || finished_) return;
  const double t = now_();
  const bool bar = style_ == ProgressStyle::bar;
  if (t - last_ < (bar ? 0.1 : 10.0)) return;
  last_ = t;
  const std::string s = state(t - start_);
  if (bar)
    out_ << '\r' << s << std::string(drawn_ > s.size() ? drawn_ - s.size() : 0, ' ') << std::flush;
  else
    out_ << s << std::endl;
  drawn_ = bar ? std::max(drawn_, s.size()) : 0;
}

void Progress::finish() {
  if (style_ == ProgressStyle::silent || finished_) return;
  finished_ = true;
  const double elapsed = now_() - start_;
  std::string s = label_ + " " + with_prefix(double(done_), unit_) + " in " + clock_time(elapsed);
  if (elapsed > 0) s += "  " + with_prefix(double(done_) / elapsed, unit_ + "/s");
  if (drawn_) out_ << '\r';
  out_ << s << std::string(drawn_ > s.size() ? drawn_ - s.size() : 0, ' ') << std::endl;
  drawn_ = 0;
}

}  // namespace kda
