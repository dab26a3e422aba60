// Values of a run file: read from YAML with errors that say what is needed, and shown again.
#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/error.h"
#include "train/run_keys.h"

namespace kda::run_keys {

std::string show(const Yaml& y) {
  switch (y.kind) {
    case Yaml::Kind::null: return "empty";
    case Yaml::Kind::map: return "keys and values";
    case Yaml::Kind::list: return cat("a list of ", y.items.size());
    case Yaml::Kind::scalar: return y.text.size() > 60 ? quote_yaml(y.text.substr(0, 57) + "...") : quote_yaml(y.text);
  }
  return {};
}

double number(const Yaml& y, const std::string& key, double lowest, double highest) {
  double x = 0;
  const char* end = y.text.data() + y.text.size();
  const auto [stop, error] = std::from_chars(y.text.data(), end, x);
  const bool fits = y.kind == Yaml::Kind::scalar && !y.quoted && error == std::errc() && stop == end &&
                    std::isfinite(x) && x >= lowest && x <= highest;
  KDA_CHECK(fits, y.where, ": ", key, " must be a number from ", lowest,
            std::isfinite(highest) ? cat(" to ", highest) : std::string(" up"), ", is ", show(y));
  return x;
}

int64_t whole(const Yaml& y, const std::string& key, int64_t lowest, int64_t highest) {
  std::string digits;  // 1_000_000 is a whole number in YAML
  std::copy_if(y.text.begin(), y.text.end(), std::back_inserter(digits), [](char c) { return c != '_'; });
  int64_t x = 0;
  const char* end = digits.data() + digits.size();
  auto [stop, error] = std::from_chars(digits.data(), end, x);
  if (stop != end) {  // 1e6
    double d = 0;
    const auto [stop2, error2] = std::from_chars(digits.data(), end, d);
    if (error2 == std::errc() && stop2 == end && d == std::floor(d) && std::abs(d) < 9e15)
      x = int64_t(d), stop = stop2, error = error2;
  }
  const bool fits =
      y.kind == Yaml::Kind::scalar && !y.quoted && error == std::errc() && stop == end && x >= lowest && x <= highest;
  KDA_CHECK(fits, y.where, ": ", key, " must be a whole number from ", lowest,
            highest < INT64_MAX ? cat(" to ", highest) : std::string(" up"), ", is ", show(y));
  return x;
}

bool flag(const Yaml& y, const std::string& key) {
  if (y.kind == Yaml::Kind::scalar && !y.quoted) {
    for (const char* yes : {"true", "True", "yes", "on"})
      if (y.text == yes) return true;
    for (const char* no : {"false", "False", "no", "off"})
      if (y.text == no) return false;
  }
  throw Error(cat(y.where, ": ", key, " must be true or false, is ", show(y)));
}

std::string word(const Yaml& y, const std::string& key) {
  KDA_CHECK(y.kind == Yaml::Kind::scalar && !y.text.empty(), y.where, ": ", key, " must be text, is ", show(y));
  return y.text;
}

std::vector<std::string> words(const Yaml& y, const std::string& key) {
  std::vector<std::string> out;
  if (y.kind == Yaml::Kind::null) return out;
  if (y.kind != Yaml::Kind::list) return {word(y, key)};
  for (const Yaml& item : y.items) out.push_back(word(item, key));
  return out;
}

Yaml scalar(const std::string& plain) {
  Yaml y;
  y.kind = Yaml::Kind::scalar;
  y.text = plain;
  return y;
}

Yaml quoted(const std::string& text) {
  if (text.empty()) return {};
  Yaml y = scalar(text);
  y.quoted = true;
  return y;
}

Yaml number_scalar(double x) {
  char text[64];
  const auto [end, error] = std::to_chars(text, text + sizeof text, x);  // the shortest that reads back the same
  return scalar({text, error == std::errc() ? end : text});
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
  size_t least = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& k : known) {
    std::vector<size_t> row(k.size() + 1);  // edit distance, line by line
    for (size_t j = 0; j <= k.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t corner = row[0];
      row[0] = i;
      for (size_t j = 1; j <= k.size(); ++j) {
        const size_t change = corner + (word[i - 1] != k[j - 1]);
        corner = row[j];
        row[j] = std::min({row[j] + 1, row[j - 1] + 1, change});
      }
    }
    if (row.back() < least) least = row.back(), best = k;
  }
  return best;
}

}  // namespace kda::run_keys
