// eval/report.h — one HTML page about training runs, from their metrics.jsonl (docs/TRAINING.md).
#pragma once
#include <string>
#include <vector>

namespace kda {

struct ReportRun {
  std::string name;      // as the page calls it
  std::string metrics;   // the text of metrics.jsonl
  std::string where;     // how errors name it
  std::string run_file;  // shown as it is; may be empty
};

// A page that needs nothing besides itself: curves of losses by term and layer, rates, gradient norms, throughput and
// evaluations over steps, tokens or time, events, summaries, run files. Several runs share each picture. Long runs are
// thinned to means over equal stretches, at most about 2,000 points a curve. Throws Error naming file and line for what
// is no metrics line; a last line without a line end is left out when it is unfinished (the run is still going), and so
// are lines of unknown kinds, both of which the page says. Of a step that was done twice the later line counts.
std::string report_page(const std::vector<ReportRun>& runs, const std::string& title);

}  // namespace kda
