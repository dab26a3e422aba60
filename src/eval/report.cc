#include "eval/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/progress.h"
#include "eval/metrics.h"
#include "eval/report_page.h"

namespace kda {

using nlohmann::ordered_json;

namespace {

constexpr size_t kMostPoints = 2000;

std::string escaped(std::string_view s) {
  std::string out;
  for (const char c : s) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += c;
    }
  }
  return out;
}

// JSON inside a <script>: nothing in it may look like markup.
std::string script_json(const ordered_json& j) {
  std::string out;
  for (const char c : j.dump(-1, ' ', true, ordered_json::error_handler_t::replace)) {
    if (c == '<')
      out += "\\u003c";
    else if (c == '>')
      out += "\\u003e";
    else if (c == '&')
      out += "\\u0026";
    else
      out += c;
  }
  return out;
}

// Six significant digits are more than a picture shows.
ordered_json list(const std::vector<double>& column) {
  ordered_json out = ordered_json::array();
  for (const double v : column) {
    if (!std::isfinite(v)) {
      out.push_back(nullptr);
      continue;
    }
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.6g", v);
    out.push_back(ordered_json::parse(digits));
  }
  return out;
}

// Counts stay whole numbers.
ordered_json whole(const std::vector<double>& column) {
  ordered_json out = ordered_json::array();
  for (const double v : column) out.push_back(int64_t(v));
  return out;
}

ordered_json columns(const MetricColumns& all) {
  const MetricColumns c = thinned(all, kMostPoints);
  ordered_json j{
      {"step", whole(c.step)}, {"tokens", whole(c.tokens)}, {"seconds", list(c.seconds)}, {"stage", c.stage}};
  ordered_json& series = j["series"] = ordered_json::object();
  for (const auto& [name, column] : c.values) series[name] = list(column);
  for (const auto& [name, column] : c.terms) series["terms." + name] = list(column);
  for (const auto& [name, column] : c.probes) series["probes." + name] = list(column);
  ordered_json& layers = j["layers"] = ordered_json::object();
  for (const auto& [name, by_layer] : c.layers) {
    layers[name] = ordered_json::array();
    for (const auto& [layer, column] : by_layer) layers[name].push_back(list(column));
  }
  return j;
}

std::string shown(double v) {
  if (!std::isfinite(v)) return "";
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.4g", v);
  return digits;
}

double last_of(const std::map<std::string, std::vector<double>>& group, const std::string& name) {
  const auto it = group.find(name);
  if (it == group.end()) return std::nan("");
  for (auto v = it->second.rbegin(); v != it->second.rend(); ++v)
    if (!std::isnan(*v)) return *v;
  return std::nan("");
}

double median(std::vector<double> v) {
  std::erase_if(v, [](double x) { return std::isnan(x); });
  if (v.empty()) return std::nan("");
  std::nth_element(v.begin(), v.begin() + int64_t(v.size() / 2), v.end());
  return v[v.size() / 2];
}

std::string cell(const std::string& s, bool number = true) {
  return cat(number ? "<td class=n>" : "<td>", escaped(s), "</td>");
}

// What the page says without its pictures: one row a run, then what happened on the way.
std::string summary(const std::vector<ReportRun>& runs, const std::vector<Metrics>& metrics) {
  std::map<std::string, int> terms, probes;
  for (const Metrics& m : metrics) {
    for (const auto& [name, column] : m.eval.terms) terms[name];
    for (const auto& [name, column] : m.eval.probes) probes[name];
  }
  std::string out = "<table><thead><tr><th>run<th>steps<th>tokens<th>time<th>tok/s, median<th>loss, last";
  for (const auto& [name, unused] : terms) out += "<th>held-out " + escaped(name);
  out += "<th>top-1";
  for (const auto& [name, unused] : probes) out += "<th>" + escaped(name);
  out += "</tr></thead><tbody>";
  for (size_t i = 0; i < runs.size(); ++i) {
    const Metrics& m = metrics[i];
    const MetricColumns& longer =
        !m.eval.step.empty() && (m.train.step.empty() || m.eval.step.back() >= m.train.step.back()) ? m.eval : m.train;
    const bool any = longer.size() > 0;
    const auto speed = m.train.values.find("tok_per_s");
    out += cat("<tr><td><span class=swatch data-run=", i, "></span>", escaped(runs[i].name), "</td>");
    out += cell(any ? std::to_string(int64_t(longer.step.back())) : "");
    out += cell(any ? with_prefix(longer.tokens.back(), "") : "");
    out += cell(any ? clock_time(longer.seconds.back()) : "");
    out += cell(speed == m.train.values.end() ? "" : shown(median(speed->second)));
    out += cell(shown(last_of(m.train.values, "loss")));
    for (const auto& [name, unused] : terms) out += cell(shown(last_of(m.eval.terms, name)));
    out += cell(shown(last_of(m.eval.values, "top1")));
    for (const auto& [name, unused] : probes) out += cell(shown(last_of(m.eval.probes, name)));
    out += "</tr>";
  }
  out += "</tbody></table>";
  for (size_t i = 0; i < runs.size(); ++i) {
    const Metrics& m = metrics[i];
    if (m.unfinished)
      out += "<p class=note>" + escaped(runs[i].name) + ": the last line was being written and was left out.</p>";
    if (m.unknown)
      out += cat("<p class=note>", escaped(runs[i].name), ": ", m.unknown,
                 " lines of a kind this version does not know were left out.</p>");
    if (!m.train.size() && !m.eval.size())
      out += "<p class=note>" + escaped(runs[i].name) + ": no measurement yet.</p>";
  }
  return out;
}

std::string events(const std::vector<ReportRun>& runs, const std::vector<Metrics>& metrics) {
  std::string rows;
  for (size_t i = 0; i < runs.size(); ++i)
    for (const MetricEvent& e : metrics[i].events)
      rows += "<tr>" + cell(runs[i].name, false) + cell(std::to_string(int64_t(e.step))) + cell(e.stage, false) +
              cell(e.what, false) + cell(e.why, false) + cell(e.rows, false) + "</tr>";
  if (rows.empty()) return "<p class=note>none</p>";
  return "<table><thead><tr><th>run<th>step<th>stage<th>what<th>why<th>rows</tr></thead><tbody>" + rows +
         "</tbody></table>";
}

std::string run_files(const std::vector<ReportRun>& runs) {
  std::string out;
  for (const ReportRun& r : runs)
    if (!r.run_file.empty())
      out += cat("<details><summary>run file of ", escaped(r.name), "</summary><pre>", escaped(r.run_file),
                 "</pre></details>");
  return out;
}

}  // namespace

std::string report_page(const std::vector<ReportRun>& runs, const std::string& title) {
  std::vector<Metrics> metrics;
  for (const ReportRun& r : runs) metrics.push_back(parse_metrics(r.metrics, r.where));
  ordered_json data = ordered_json::array();
  for (size_t i = 0; i < runs.size(); ++i) {
    ordered_json events_list = ordered_json::array();
    for (const MetricEvent& e : metrics[i].events) events_list.push_back({{"step", e.step}, {"what", e.what}});
    data.push_back({{"name", runs[i].name},
                    {"train", columns(metrics[i].train)},
                    {"eval", columns(metrics[i].eval)},
                    {"events", events_list}});
  }
  const std::map<std::string, std::string> parts{{"title", escaped(title)},
                                                 {"summary", summary(runs, metrics)},
                                                 {"events", events(runs, metrics)},
                                                 {"run_files", run_files(runs)},
                                                 {"data", script_json(data)}};
  // Each {{name}} of the template once, never inside what was put in.
  std::string out;
  std::string_view page = kReportPage;
  for (size_t open; (open = page.find("{{")) != std::string_view::npos;) {
    const size_t close = page.find("}}", open);
    KDA_CHECK(close != std::string_view::npos, "report page: a {{ without its }}");
    out += page.substr(0, open);
    out += parts.at(std::string(page.substr(open + 2, close - open - 2)));
    page.remove_prefix(close + 2);
  }
  out += page;
  return out;
}

}  // namespace kda
