// eval/metrics.h — metrics.jsonl read back, as columns for pictures.
#pragma once
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

// Lines of one kind, in the order of their steps. Every column is as long as `step`; NaN where a line has no value.
struct MetricColumns {
  std::vector<double> step, tokens, seconds;
  std::vector<std::string> stage;
  std::map<std::string, std::vector<double>>
      values;  // loss (terms.loss of an evaluation), lr, grad_norm, tok_per_s, top1
  std::map<std::string, std::vector<double>> terms, probes;              // by name
  std::map<std::string, std::map<int64_t, std::vector<double>>> layers;  // by term, then place in the mapping

  size_t size() const { return step.size(); }
};

struct MetricEvent {
  double step = 0;
  std::string stage, what, why, rows;  // rows: as written in the line, or empty
};

struct Metrics {
  MetricColumns train, eval;
  std::vector<MetricEvent> events;
  int64_t unknown = 0;      // lines of a kind that nobody here knows
  bool unfinished = false;  // the last line was cut short
};

// See report_page() for what is an error and what is left out.
Metrics parse_metrics(std::string_view text, const std::string& where);

// At most about `most` lines: means over equal stretches of lines, none of which crosses a stage; positions are those
// of a stretch's last line.
MetricColumns thinned(const MetricColumns&, size_t most);

}  // namespace kda
