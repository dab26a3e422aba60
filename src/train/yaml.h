// train/yaml.h — YAML as a run file needs it: maps, lists and scalars that know their line. Anchors, aliases, tags and
// keys given twice are refused.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace kda {

struct YamlField;

struct Yaml {
  enum class Kind { null, scalar, list, map };
  Kind kind = Kind::null;
  std::string text;                      // scalar
  bool quoted = false;                   // scalar: a string whatever it looks like
  std::string where;                     // "run.yaml:12", or "--set a.b=c"
  std::vector<Yaml> items;               // list
  std::vector<YamlField> fields;         // map, in the file's order
  std::vector<std::string> field_where;  // map: where each key stands

  const Yaml* find(std::string_view key) const;  // map; nullptr when absent
};

struct YamlField {
  std::string first;  // key
  Yaml second;        // value
};

// One document. Throws Error beginning with name:line.
Yaml parse_yaml(std::string_view text, const std::string& name);

// Sets a.b=value (value in YAML) in a tree; `stages.1.tokens` takes the second item of a list, which must be there.
// Maps on the way are made. Throws Error naming the setting.
void set_yaml(Yaml& root, std::string_view setting);

// The same as one line of JSON: words that look like numbers, true or false become such.
std::string to_json(const Yaml&);

// A scalar so written that parse_yaml reads it back as that text.
std::string quote_yaml(std::string_view text);

}  // namespace kda
