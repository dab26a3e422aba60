// train/run_keys.h — the table of a run file's keys: reading, writing, errors and docs/RUN_FILE.md derive from it.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "train/run_file.h"
#include "train/yaml.h"

namespace kda::run_keys {

using Notes = std::vector<std::string>;

template <class T>
struct Key {
  std::string name;                 // ours
  std::vector<std::string> others;  // further spellings, as DistillKit or transformers have them
  std::string what;                 // for the docs; a condition, default and unit where they matter
  std::function<void(T&, const Yaml&, Notes&)> read;
  std::function<Yaml(const T&)> show;  // null kind: not written; empty: a key without effect

  bool is(const std::string& word) const {
    if (word == name) return true;
    for (const auto& o : others)
      if (word == o) return true;
    return false;
  }
};
template <class T>
using Keys = std::vector<Key<T>>;

// A run file while it is read.
struct Draft {
  RunFile run;
  StageSpec base;                            // keys of a stage given outside of `stages`
  std::vector<Yaml> stages;                  // read last, over the base
  std::map<std::string, std::string> given;  // key of a stage or of the run -> where it was set
};

const Keys<Draft>& top_keys();
const Keys<Draft>& dataset_keys();
const Keys<Draft>& training_args_keys();
const Keys<DatasetSpec>& one_dataset_keys();
const Keys<TeacherSpec>& teacher_keys();
const Keys<StageSpec>& stage_keys();
const Keys<LossSpec>& loss_keys();
const Keys<RateSpec>& rate_keys();
const Keys<RunFile>& eval_keys();
const Keys<ProbeSpec>& probe_keys();
const Keys<RunFile>& checkpoint_keys();

// ---- values. Each throws Error beginning with the value's place, and saying what is needed.
std::string show(const Yaml&);  // as a message quotes it
double number(const Yaml&, const std::string& key, double lowest, double highest);
int64_t whole(const Yaml&, const std::string& key, int64_t lowest, int64_t highest);
bool flag(const Yaml&, const std::string& key);
std::string word(const Yaml&, const std::string& key);
std::vector<std::string> words(const Yaml&, const std::string& key);  // one or a list
Yaml scalar(const std::string& plain);
Yaml quoted(const std::string& text);
Yaml number_scalar(double);

// The known word nearest to this one, or empty when none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& known);
[[noreturn]] void unknown_key(const std::string& where, const std::string& key, const std::string& section,
                              const std::vector<std::string>& known);

// Reads a map by its table.
template <class T>
void read_map(T& to, const Yaml& map, const Keys<T>& keys, const std::string& section, Notes& notes) {
  if (map.kind == Yaml::Kind::null) return;
  if (map.kind != Yaml::Kind::map)
    throw Error(cat(map.where, ": ", section, " must be keys and values, is ", show(map)));
  std::map<const Key<T>*, size_t> seen;
  for (size_t i = 0; i < map.fields.size(); ++i) {
    const auto& [word, value] = map.fields[i];
    const Key<T>* found = nullptr;
    for (const auto& k : keys)
      if (k.is(word)) found = &k;
    if (!found) {
      std::vector<std::string> known;
      for (const auto& k : keys) {
        known.push_back(k.name);
        known.insert(known.end(), k.others.begin(), k.others.end());
      }
      unknown_key(map.field_where[i], word, section, known);
    }
    const auto [before, fresh] = seen.emplace(found, i);
    KDA_CHECK(fresh, map.field_where[i], ": '", word, "' is the same as '", map.fields[before->second].first, "' (",
              map.field_where[before->second], "); give one");
    found->read(to, value, notes);
  }
}

template <class T>
Yaml show_map(const T& from, const Keys<T>& keys) {
  Yaml y;
  y.kind = Yaml::Kind::map;
  for (const auto& k : keys) {
    if (!k.show) continue;
    Yaml v = k.show(from);
    if (v.kind != Yaml::Kind::null) y.fields.push_back({k.name, std::move(v)});
  }
  return y;
}

}  // namespace kda::run_keys
