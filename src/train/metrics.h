// train/metrics.h — the lines of metrics.jsonl (docs/TRAINING.md).
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "train/objective.h"

namespace kda {

struct MetricsPlace {
  std::string stage;
  int64_t step = 0, tokens = 0;
  double seconds = 0;
};

// `sums` over the tokens since the last line; names as in term_names().
std::string train_line(const MetricsPlace&, const LossSums&, const std::vector<std::string>& names, double lr,
                       double gradient_norm, double tok_per_s);
std::string eval_line(const MetricsPlace&, const std::map<std::string, double>& terms,
                      const std::map<std::string, std::vector<double>>& layers, std::optional<double> top1,
                      const std::map<std::string, double>& probes);
std::string event_line(const MetricsPlace&, const std::string& what, const std::string& why,
                       const std::vector<int64_t>& rows);

}  // namespace kda
