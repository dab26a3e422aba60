// train/run_key_makers.h — makers of entries of the table of keys; for run_keys.cc and run_stage_keys.cc alone.
#pragma once
#include <algorithm>
#include <limits>

#include "base/error.h"
#include "train/run_keys.h"

namespace kda::run_keys {

inline constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
using Names = std::vector<std::string>;

// ---- makers of keys

template <class T>
Key<T> real(std::string name, Names others, double T::*at, double lowest, double highest, std::string what) {
  return {name, std::move(others), std::move(what),
          [=](T& t, const Yaml& y, Notes&) { t.*at = number(y, name, lowest, highest); },
          [=](const T& t) { return t.*at < lowest ? Yaml{} : number_scalar(t.*at); }};
}

template <class T, class I>
Key<T> count(std::string name, Names others, I T::*at, int64_t lowest, int64_t highest, std::string what) {
  return {name, std::move(others), std::move(what),
          [=](T& t, const Yaml& y, Notes&) { t.*at = I(whole(y, name, lowest, highest)); },
          [=](const T& t) { return int64_t(t.*at) < lowest ? Yaml{} : scalar(std::to_string(t.*at)); }};
}

template <class T>
Key<T> text(std::string name, Names others, std::string T::*at, std::string what) {
  return {name, std::move(others), std::move(what), [=](T& t, const Yaml& y, Notes&) { t.*at = word(y, name); },
          [=](const T& t) { return quoted(t.*at); }};
}

template <class T>
Key<T> yes_no(std::string name, Names others, bool T::*at, std::string what) {
  return {name, std::move(others), std::move(what), [=](T& t, const Yaml& y, Notes&) { t.*at = flag(y, name); },
          [=](const T& t) { return scalar(t.*at ? "true" : "false"); }};
}

inline Yaml show_words(const std::vector<std::string>& from) {
  Yaml y;
  if (from.empty()) return y;
  y.kind = Yaml::Kind::list;
  for (const auto& w : from) y.items.push_back(quoted(w));
  return y;
}

template <class T>
Key<T> regexes(std::string name, Names others, std::vector<std::string> T::*at, std::string what) {
  return {name, std::move(others), std::move(what), [=](T& t, const Yaml& y, Notes&) { t.*at = words(y, name); },
          [=](const T& t) { return show_words(t.*at); }};
}

// A word of a list that stands for a value. The first word of a value is the one written.
template <class E>
using Choices = std::vector<std::pair<const char*, E>>;
template <class E>
E choose(const Yaml& y, const std::string& name, const Choices<E>& choices) {
  const std::string w = word(y, name);
  std::string all;
  for (const auto& [c, value] : choices) {
    if (w == c) return value;
    all += cat(all.empty() ? "" : ", ", c);
  }
  throw Error(cat(y.where, ": ", name, " is ", show(y), ", known are ", all));
}
template <class T, class E>
Key<T> choice(std::string name, Names others, E T::*at, Choices<E> choices, std::string what) {
  return {name, std::move(others), std::move(what),
          [=](T& t, const Yaml& y, Notes&) { t.*at = choose(y, name, choices); },
          [=](const T& t) {
            for (const auto& [c, value] : choices)
              if (value == t.*at) return scalar(c);
            return Yaml{};
          }};
}

// Keys of a part, as keys of the whole.
template <class Whole, class Part>
Keys<Whole> lift(const Keys<Part>& keys, Part Whole::*at) {
  Keys<Whole> out;
  for (const Key<Part>& k : keys)
    out.push_back(
        {k.name, k.others, k.what, [=](Whole& w, const Yaml& y, Notes& n) { k.read(w.*at, y, n); },
         k.show ? std::function<Yaml(const Whole&)>([=](const Whole& w) { return k.show(w.*at); }) : nullptr});
  return out;
}

// A key that changes nothing here.
template <class T>
Key<T> harmless(std::string name, std::string why) {
  return {
      name,
      {},
      "no effect: " + why,
      [=](T&, const Yaml& y, Notes& notes) { notes.push_back(cat(y.where, ": ", name, " has no effect here: ", why)); },
      nullptr};
}

// A key that would change the result: only empty, false, 0 or one of `fine` may stand there.
template <class T>
Key<T> refused(std::string name, std::string why, Names fine = {}) {
  return {name,
          {},
          "refused: " + why,
          [=](T&, const Yaml& y, Notes&) {
            const bool off = y.kind == Yaml::Kind::null || ((y.kind == Yaml::Kind::list) && y.items.empty()) ||
                             ((y.kind == Yaml::Kind::map) && y.fields.empty()) ||
                             (y.kind == Yaml::Kind::scalar &&
                              (y.text == "false" || y.text == "False" || y.text == "0" || y.text == "0.0" ||
                               std::find(fine.begin(), fine.end(), y.text) != fine.end()));
            KDA_CHECK(off, y.where, ": ", name, " cannot be honoured: ", why);
          },
          nullptr};
}

template <class T>
void append(Keys<T>& to, Keys<T> more) {
  for (auto& k : more) to.push_back(std::move(k));
}

// ---- lists

template <class T>
Yaml show_list(const std::vector<T>& from, const Keys<T>& keys) {
  Yaml y;
  if (from.empty()) return y;
  y.kind = Yaml::Kind::list;
  for (const T& item : from) y.items.push_back(show_map(item, keys));
  return y;
}

template <class T>
std::vector<T> read_list(const Yaml& y, const Keys<T>& keys, const std::string& section, Notes& notes) {
  KDA_CHECK(y.kind == Yaml::Kind::list, y.where, ": ", section, " must be a list, is ", show(y));
  std::vector<T> out;
  for (const Yaml& item : y.items) read_map(out.emplace_back(), item, keys, section, notes);
  return out;
}

}  // namespace kda::run_keys
