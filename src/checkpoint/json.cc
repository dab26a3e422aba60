#include "checkpoint/json.h"

#include <cmath>
#include <set>

namespace kda {

using nlohmann::json;

namespace {
// A value as it may stand in a message: short, and valid UTF-8 since the parser saw to that.
std::string show(const json& v) {
  if (v.is_object()) return "an object";
  if (v.is_array()) return cat("a list of ", v.size());
  std::string s = v.dump();
  if (s.size() > 60) s = s.substr(0, 57) + "...";
  return s;
}
}  // namespace

json parse_json_object(std::string_view text, const std::string& where, int max_depth) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const json::parser_callback_t watch = [&](int depth, json::parse_event_t event, json& value) {
    switch (event) {
      case json::parse_event_t::object_start: keys.emplace_back(); [[fallthrough]];
      case json::parse_event_t::array_start:
        KDA_CHECK(depth < max_depth, where, ": JSON is nested deeper than ", max_depth, " levels");
        break;
      case json::parse_event_t::key:
        KDA_CHECK(keys.back().insert(value.get_ref<const std::string&>()).second, where, ": key ", show(value),
                  " is given twice");
        break;
      case json::parse_event_t::object_end: keys.pop_back(); break;
      default: break;
    }
    return true;
  };
  json out;
  try {
    out = json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    throw Error(cat(where, ": not valid JSON: ", e.what()));
  }
  KDA_CHECK(out.is_object(), where, ": needed a JSON object, found ", show(out));
  return out;
}

const json* Fields::find(const std::string& key) const {
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

void Fields::wrong(const std::string& key, const std::string& needed) const {
  throw Error(cat(where_, ": ", key, " is ", show(object_.at(key)), ", needed ", needed));
}

std::optional<int64_t> Fields::integer(const std::string& key, int64_t lowest, int64_t highest) const {
  const json* v = find(key);
  if (!v) return {};
  const std::string needed = cat("a whole number from ", lowest, " to ", highest);
  if (!v->is_number_integer()) wrong(key, needed);
  if (v->is_number_unsigned() && v->get<uint64_t>() > uint64_t(INT64_MAX)) wrong(key, needed);
  const int64_t n = v->get<int64_t>();
  if (n < lowest || n > highest) wrong(key, needed);
  return n;
}

std::optional<double> Fields::number(const std::string& key) const {
  const json* v = find(key);
  if (!v) return {};
  if (!v->is_number() || !std::isfinite(v->get<double>())) wrong(key, "a number");
  return v->get<double>();
}

std::optional<bool> Fields::boolean(const std::string& key) const {
  const json* v = find(key);
  if (!v) return {};
  if (!v->is_boolean()) wrong(key, "true or false");
  return v->get<bool>();
}

std::optional<std::string> Fields::string(const std::string& key) const {
  const json* v = find(key);
  if (!v) return {};
  if (!v->is_string()) wrong(key, "a string");
  return v->get<std::string>();
}

std::optional<Fields> Fields::object(const std::string& key) const {
  const json* v = find(key);
  if (!v) return {};
  if (!v->is_object()) wrong(key, "an object");
  return Fields(*v, cat(where_, ": ", key));
}

std::vector<int64_t> Fields::integers(const std::string& key, int64_t lowest, int64_t highest) const {
  const json* v = find(key);
  if (!v) return {};
  const std::string needed = cat("one whole number or a list of them, each from ", lowest, " to ", highest);
  const auto one = [&](const json& x) {
    if (!x.is_number_integer() || (x.is_number_unsigned() && x.get<uint64_t>() > uint64_t(INT64_MAX)))
      wrong(key, needed);
    const int64_t n = x.get<int64_t>();
    if (n < lowest || n > highest) wrong(key, needed);
    return n;
  };
  std::vector<int64_t> out;
  if (!v->is_array()) return {one(*v)};
  for (const json& x : *v) out.push_back(one(x));
  return out;
}

}  // namespace kda
