#include "train/metrics.h"

#include <cmath>
#include <nlohmann/json.hpp>

namespace kda {

namespace {
using Json = nlohmann::ordered_json;

// JSON has no NaN: such a value is null.
Json number(double x) { return std::isfinite(x) ? Json(x) : Json(); }
// Seconds and rates to a readable length.
double rounded(double x) { return std::round(x * 1000) / 1000; }

Json head(const char* kind, const MetricsPlace& p) {
  return {{"kind", kind}, {"stage", p.stage}, {"step", p.step}, {"tokens", p.tokens}, {"seconds", rounded(p.seconds)}};
}

std::string line(const Json& j) { return j.dump(-1, ' ', false, Json::error_handler_t::replace); }
}  // namespace

std::string train_line(const MetricsPlace& p, const LossSums& sums, const std::vector<std::string>& names, double lr,
                       double gradient_norm, double tok_per_s) {
  const double n = double(sums.tokens);
  Json j = head("train", p);
  j["tok_per_s"] = number(rounded(tok_per_s));
  j["loss"] = number(sums.total / n);
  j["terms"] = Json::object();
  Json layers = Json::object();
  for (size_t i = 0; i < names.size() && i < sums.terms.size(); ++i) {
    j["terms"][names[i]] = number(sums.terms[i] / n);
    if (i >= sums.layers.size() || sums.layers[i].empty()) continue;
    for (const double layer : sums.layers[i]) layers[names[i]].push_back(number(layer / n));
  }
  if (!layers.empty()) j["layers"] = layers;
  j["lr"] = number(lr);
  j["grad_norm"] = number(gradient_norm);
  return line(j);
}

std::string eval_line(const MetricsPlace& p, const std::map<std::string, double>& terms,
                      const std::map<std::string, std::vector<double>>& layers, std::optional<double> top1,
                      const std::map<std::string, double>& probes) {
  Json j = head("eval", p);
  j["terms"] = Json::object();
  for (const auto& [name, value] : terms) j["terms"][name] = number(value);
  for (const auto& [name, values] : layers)
    for (const double v : values) j["layers"][name].push_back(number(v));
  if (top1) j["top1"] = number(*top1);
  for (const auto& [name, value] : probes) j["probes"][name] = number(value);
  return line(j);
}

std::string event_line(const MetricsPlace& p, const std::string& what, const std::string& why,
                       const std::vector<int64_t>& rows) {
  Json j = head("event", p);
  j["what"] = what;
  j["why"] = why;
  j["rows"] = rows;
  return line(j);
}

}  // namespace kda
