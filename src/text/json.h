// text/json.h — reading fields of a parsed tokenizer.json, with messages that say where. For .cc files of text/ only.
#pragma once
#include <simdjson.h>

#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "text/utf8.h"

namespace kda::text {

using Json = simdjson::dom::element;

inline const char* json_kind(Json j) {
  using T = simdjson::dom::element_type;
  switch (j.type()) {
    case T::ARRAY: return "a list";
    case T::OBJECT: return "an object";
    case T::STRING: return "a string";
    case T::BOOL: return "true/false";
    case T::NULL_VALUE: return "null";
    default: return "a number";
  }
}

inline simdjson::dom::object json_object(Json j, std::string_view where) {
  KDA_CHECK(j.is_object(), "tokenizer: ", where, " must be an object, is ", json_kind(j));
  return j.get_object().value_unsafe();
}

inline simdjson::dom::array json_array(Json j, std::string_view where) {
  KDA_CHECK(j.is_array(), "tokenizer: ", where, " must be a list, is ", json_kind(j));
  return j.get_array().value_unsafe();
}

inline std::string_view json_string(Json j, std::string_view where) {
  KDA_CHECK(j.is_string(), "tokenizer: ", where, " must be a string, is ", json_kind(j));
  return j.get_string().value_unsafe();
}

inline bool json_bool(Json j, std::string_view where) {
  KDA_CHECK(j.is_bool(), "tokenizer: ", where, " must be true or false, is ", json_kind(j));
  return j.get_bool().value_unsafe();
}

inline int64_t json_integer(Json j, std::string_view where, int64_t low, int64_t high) {
  KDA_CHECK(j.is_int64(), "tokenizer: ", where, " must be a whole number, is ", json_kind(j));
  const int64_t v = j.get_int64().value_unsafe();
  KDA_CHECK(v >= low && v <= high, "tokenizer: ", where, " must be in [", low, ", ", high, "], is ", v);
  return v;
}

// One character, as a string.
inline std::string_view json_character(Json j, std::string_view where) {
  const auto s = json_string(j, where);
  KDA_CHECK(!s.empty() && utf8_length(s[0]) == s.size(), "tokenizer: ", where, " must be one character, is \"", s, '"');
  return s;
}

// A field that is there and not null.
inline std::optional<Json> find(Json object, std::string_view key, std::string_view where) {
  simdjson::dom::element value;
  if (json_object(object, where).at_key(key).get(value) || value.is_null()) return std::nullopt;
  return value;
}

inline Json need(Json object, std::string_view key, std::string_view where) {
  const auto v = find(object, key, where);
  KDA_CHECK(v, "tokenizer: ", where, " has no \"", key, '"');
  return *v;
}

inline bool find_bool(Json object, std::string_view key, std::string_view where, bool otherwise) {
  const auto v = find(object, key, where);
  return v ? json_bool(*v, cat(where, ".", key)) : otherwise;
}

inline std::string find_string(Json object, std::string_view key, std::string_view where) {
  const auto v = find(object, key, where);
  return v ? std::string(json_string(*v, cat(where, ".", key))) : std::string();
}

inline std::string_view need_string(Json object, std::string_view key, std::string_view where) {
  return json_string(need(object, key, where), cat(where, ".", key));
}

inline std::string_view type_of(Json object, std::string_view where) { return need_string(object, "type", where); }

// Sequences hold sequences: how deep they may.
inline constexpr int kMaxNesting = 16;

}  // namespace kda::text
