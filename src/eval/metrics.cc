#include "eval/metrics.h"

#include <cmath>
#include <functional>

#include "checkpoint/json.h"

namespace kda {

using nlohmann::json;

namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double number(const json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  KDA_CHECK(it != object.end() && it->is_number(), where, ": needed a number `", key, "`");
  return it->get<double>();
}

// A value that may be null: what JSON makes of a NaN.
double value(const json& v, const std::string& name, const std::string& where) {
  KDA_CHECK(v.is_number() || v.is_null(), where, ": `", name, "` must be a number or null");
  return v.is_null() ? kNone : v.get<double>();
}

std::string text(const json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return "";
  KDA_CHECK(it->is_string(), where, ": `", key, "` must be a string");
  return it->get<std::string>();
}

// What to do with every column of values.
template <class Columns, class F>
void each_column(Columns& c, F&& f) {
  for (auto* group : {&c.values, &c.terms, &c.probes})
    for (auto& [name, column] : *group) f(column);
  for (auto& [name, layers] : c.layers)
    for (auto& [layer, column] : layers) f(column);
}

void drop_last(MetricColumns& c) {
  c.step.pop_back();
  c.tokens.pop_back();
  c.seconds.pop_back();
  c.stage.pop_back();
  each_column(c, [](std::vector<double>& column) { column.pop_back(); });
}

void add_line(MetricColumns& c, const json& line, const std::string& where) {
  const double step = number(line, "step", where);
  while (!c.step.empty() && c.step.back() >= step) drop_last(c);
  c.step.push_back(step);
  c.tokens.push_back(number(line, "tokens", where));
  c.seconds.push_back(number(line, "seconds", where));
  c.stage.push_back(text(line, "stage", where));
  const size_t n = c.size();
  const auto set = [&](std::vector<double>& column, double v) {
    column.resize(n, kNone);
    column.back() = v;
  };
  const auto set_all = [&](const char* key, const std::function<void(const std::string&, const json&)>& one) {
    const auto it = line.find(key);
    if (it == line.end() || it->is_null()) return;
    KDA_CHECK(it->is_object(), where, ": `", key, "` must be an object");
    for (const auto& [name, v] : it->items()) one(name, v);
  };
  for (const char* key : {"loss", "lr", "grad_norm", "tok_per_s", "top1"})
    if (const auto it = line.find(key); it != line.end()) set(c.values[key], value(*it, key, where));
  set_all("terms", [&](const std::string& name, const json& v) {
    // An evaluation's weighted mean stands among its terms: it is the training lines' loss.
    set(name == "loss" ? c.values[name] : c.terms[name], value(v, "terms." + name, where));
  });
  set_all("probes",
          [&](const std::string& name, const json& v) { set(c.probes[name], value(v, "probes." + name, where)); });
  set_all("layers", [&](const std::string& name, const json& list) {
    KDA_CHECK(list.is_array(), where, ": `layers.", name, "` must be a list");
    for (size_t i = 0; i < list.size(); ++i) set(c.layers[name][int64_t(i)], value(list[i], "layers." + name, where));
  });
  each_column(c, [&](std::vector<double>& column) { column.resize(n, kNone); });
}

void add_event(Metrics& m, const json& line, const std::string& where) {
  MetricEvent e{number(line, "step", where), text(line, "stage", where), text(line, "what", where),
                text(line, "why", where), ""};
  if (const auto it = line.find("rows"); it != line.end() && !it->is_null())
    e.rows = it->dump(-1, ' ', false, json::error_handler_t::replace);
  m.events.push_back(std::move(e));
}

}  // namespace

Metrics parse_metrics(std::string_view all, const std::string& where) {
  Metrics m;
  int64_t line_number = 0;
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find('\n', at), all.size());
    const std::string_view line = all.substr(at, end - at);
    const bool ended = end < all.size();
    at = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = cat(where, " line ", line_number);
    json object;
    try {
      object = parse_json_object(line, place);
    } catch (const Error&) {
      if (ended) throw;
      m.unfinished = true;
      break;
    }
    const std::string kind = text(object, "kind", place);
    KDA_CHECK(!kind.empty(), place, ": needed a string `kind`");
    if (kind == "train")
      add_line(m.train, object, place);
    else if (kind == "eval")
      add_line(m.eval, object, place);
    else if (kind == "event")
      add_event(m, object, place);
    else
      ++m.unknown;
  }
  return m;
}

MetricColumns thinned(const MetricColumns& c, size_t most) {
  const size_t each = most ? (c.size() + most - 1) / most : 1;
  if (each <= 1) return c;
  std::vector<std::pair<size_t, size_t>> stretches;  // [from, to)
  for (size_t from = 0; from < c.size();) {
    size_t to = from + 1;
    while (to < c.size() && to - from < each && c.stage[to] == c.stage[from]) ++to;
    stretches.emplace_back(from, to);
    from = to;
  }
  MetricColumns out = c;  // for its names; every column is replaced
  const auto last = [&](auto& column) {
    for (size_t i = 0; i < stretches.size(); ++i) column[i] = column[stretches[i].second - 1];
    column.resize(stretches.size());
  };
  last(out.step);
  last(out.tokens);
  last(out.seconds);
  last(out.stage);
  each_column(out, [&](std::vector<double>& column) {
    for (size_t i = 0; i < stretches.size(); ++i) {
      double sum = 0;
      int64_t n = 0;
      for (size_t j = stretches[i].first; j < stretches[i].second; ++j)
        if (!std::isnan(column[j])) sum += column[j], ++n;
      column[i] = n ? sum / double(n) : kNone;
    }
    column.resize(stretches.size());
  });
  return out;
}

}  // namespace kda
