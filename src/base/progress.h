// base/progress.h — how far a long job is: a bar with rate and time left on a terminal, a plain line now and then in a
// log. Writes only to the stream it is given. For one thread.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <ostream>
#include <string>

namespace kda {

enum class ProgressStyle { silent, bar, lines };

// bar when the stream is a terminal, else lines.
ProgressStyle progress_style(std::FILE*);

// 1234567 "B" -> "1.23 MB"; powers of 1000.
std::string with_prefix(double value, const std::string& unit);
// 75 -> "1:15", 4000 -> "1:06:40"
std::string clock_time(double seconds);

class Progress {
 public:
  using Seconds = std::function<double()>;  // a clock; tests bring their own

  // `total` in units, 0 when nobody knows. A bar is drawn at most 10 times a second, a line written every 10 s.
  Progress(std::ostream& out, ProgressStyle style, std::string label, int64_t total, std::string unit,
           Seconds now = {});
  ~Progress();  // clears an unfinished bar's line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(int64_t units) { set(done_ + units); }
  void set(int64_t units);
  void finish();  // the last line: total, time, mean rate; later calls do nothing

 private:
  std::string state(double elapsed) const;
  std::ostream& out_;
  ProgressStyle style_;
  std::string label_, unit_;
  int64_t total_, done_ = 0;
  Seconds now_;
  double start_, last_;
  size_t drawn_ = 0;  // characters of the bar's line on the terminal
  bool finished_ = false;
};

}  // namespace kda
