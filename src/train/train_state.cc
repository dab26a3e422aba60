#include "train/train_state.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "checkpoint/json.h"

namespace kda {

namespace {
using nlohmann::json;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int kVersion = 1;

// The whole numbers and texts of a state, by name: written and read by one list.
template <class S, class Whole, class Text>
void each_field(S& s, Whole whole, Text text) {
  whole("step", s.step);
  whole("tokens", s.tokens);
  whole("stage", s.stage);
  whole("stage_step", s.stage_step);
  whole("optimizer_step", s.optimizer_step);
  whole("usual_count", s.usual_count);
  whole("skipped_in_a_row", s.skipped_in_a_row);
  whole("best_step", s.best_step);
  whole("metrics_bytes", s.metrics_bytes);
  text("data", s.data);
  text("model", s.model);
  text("teacher", s.teacher);
}

template <class C, class F>
void each_number(C& c, F f) {
  f("epoch", c.epoch);
  f("position", c.position);
  f("offset", c.offset);
  f("tokens", c.tokens);
}
}  // namespace

std::string write_state(const TrainState& s) {
  nlohmann::ordered_json j;
  j["version"] = kVersion;
  const auto put = [&](const char* name, const auto& value) { j[name] = value; };
  each_field(s, put, put);
  j["seconds"] = s.seconds;  // doubles are written so that they read back bit by bit
  j["usual_loss"] = s.usual_loss;
  if (s.best) j["best"] = *s.best;
  j["cursor"] = json::array();
  for (const DataCursor& c : s.cursor) {
    nlohmann::ordered_json one;
    each_number(c, [&](const char* name, int64_t value) { one[name] = value; });
    j["cursor"].push_back(one);
  }
  return j.dump(1) + "\n";
}

TrainState read_state(std::string_view text, const std::string& where) {
  const json j = parse_json_object(text, where, 8);
  const Fields f(j, where);
  const auto version = f.integer("version", 0, kMost);
  KDA_CHECK(version && *version == kVersion, where, ": written by another version of kda (", version.value_or(-1),
            ", this one reads ", kVersion, "); resume it with that one");
  TrainState s;
  const auto need = [&](const char* name, auto value) {
    KDA_CHECK(value, where, ": ", name, " is missing");
    return *value;
  };
  each_field(
      s, [&](const char* name, int64_t& to) { to = need(name, f.integer(name, 0, kMost)); },
      [&](const char* name, std::string& to) { to = need(name, f.string(name)); });
  s.seconds = need("seconds", f.number("seconds"));
  s.usual_loss = need("usual_loss", f.number("usual_loss"));
  s.best = f.number("best");
  const json* cursors = f.find("cursor");
  KDA_CHECK(cursors && cursors->is_array(), where, ": cursor must be a list");
  for (const json& one : *cursors) {
    KDA_CHECK(one.is_object(), where, ": cursor must be a list of objects");
    const Fields g(one, where + ": cursor");
    each_number(s.cursor.emplace_back(), [&](const char* name, int64_t& to) {
      const auto value = g.integer(name, 0, kMost);
      KDA_CHECK(value, where, ": cursor: ", name, " is missing");
      to = *value;
    });
  }
  return s;
}

}  // namespace kda
