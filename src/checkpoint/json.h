// checkpoint/json.h — JSON from files that nobody vouches for: depth and keys are bounded, errors say where.
// Heavy: include it in .cc files only.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace kda {

// Throws Error on anything but one JSON object: syntax, invalid UTF-8, a key given twice, nesting deeper than
// max_depth.
nlohmann::json parse_json_object(std::string_view text, const std::string& where, int max_depth = 64);

// Fields of a JSON object. A field that is absent or null is empty; one of another type is an Error.
class Fields {
 public:
  Fields(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  const nlohmann::json* find(const std::string& key) const;  // nullptr when absent or null
  bool has(const std::string& key) const { return find(key) != nullptr; }
  std::optional<int64_t> integer(const std::string& key, int64_t lowest, int64_t highest) const;
  std::optional<double> number(const std::string& key) const;  // finite
  std::optional<bool> boolean(const std::string& key) const;
  std::optional<std::string> string(const std::string& key) const;
  std::optional<Fields> object(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key, int64_t lowest, int64_t highest) const;  // one or a list

  const nlohmann::json& raw() const { return object_; }

 private:
  [[noreturn]] void wrong(const std::string& key, const std::string& needed) const;
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace kda
