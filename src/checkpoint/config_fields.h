// checkpoint/config_fields.h — every field of config.json that is not a plain size: the ones that change the result and
// are refused, the ones that cannot change it, and the ones nobody knows (a warning). For .cc files only.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace kda {

// Throws Error for a field that would change the result and cannot be honoured; adds a warning for each unknown one.
void check_config_fields(const nlohmann::json& config, const std::string& where, std::vector<std::string>& warnings);
void check_attn_fields(const nlohmann::json& attn, const std::string& where,
                       std::vector<std::string>& warnings);  // fla

// The same for generation_config.json.
void check_generation_fields(const nlohmann::json&, const std::string& where, std::vector<std::string>& warnings);

}  // namespace kda
