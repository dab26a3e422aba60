// cli/json_input.h — JSON that a user hands in: ids, prompts, texts. Heavy: include it in .cc files only.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace kda::cli {

// Throws Error beginning with `where` when it is no JSON or nested deeper than anything wanted here.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// How an error quotes a value: the first few characters.
std::string quoted(const nlohmann::json&);

// A list of token ids, each in [0, 2^31). Throws Error beginning with `where` and naming the place.
std::vector<int32_t> json_ids(const nlohmann::json& list, const std::string& where);

// One line, or a whole object, for standard output; bytes that are no UTF-8 become U+FFFD.
std::string json_line(const nlohmann::json&);

}  // namespace kda::cli
