#include "cli/json_input.h"

#include "base/error.h"

namespace kda::cli {

using nlohmann::json;

json parse_json(std::string_view text, const std::string& where) {
  constexpr int kDeepest = 16;  // a list in an object in a list is 3
  json j = json::parse(
      text,
      [&](int depth, json::parse_event_t, json&) {
        KDA_CHECK(depth <= kDeepest, where, ": JSON nested deeper than ", kDeepest, " levels");
        return true;
      },
      false);
  KDA_CHECK(!j.is_discarded(), where, ": not JSON");
  return j;
}

std::string quoted(const json& j) {
  std::string s = j.dump(-1, ' ', false, json::error_handler_t::replace);
  if (s.size() > 60) s = s.substr(0, 57) + "...";
  return s;
}

std::vector<int32_t> json_ids(const json& list, const std::string& where) {
  KDA_CHECK(list.is_array(), where, ": needed a list of token ids, got ", quoted(list));
  std::vector<int32_t> ids;
  for (const json& id : list) {
    KDA_CHECK(id.is_number_integer() && id >= 0 && id <= INT32_MAX, where, ": ", quoted(id), " at place ", ids.size(),
              " is no token id");
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

std::string json_line(const json& j) { return j.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"; }

}  // namespace kda::cli
