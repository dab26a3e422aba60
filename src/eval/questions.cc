#include "eval/questions.h"

#include <algorithm>
#include <array>
#include <set>

#include "base/rng.h"
#include "checkpoint/json.h"

namespace kda {

using nlohmann::json;

namespace {

// Characters (not bytes) of a UTF-8 text.
int64_t characters(std::string_view s) {
  return std::count_if(s.begin(), s.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

bool passes(const Question& q, const QuestionFilter& f) {
  if (f.keys > 0 && q.keys != f.keys) return false;
  return f.max_chars <= 0 || (q.chars > 0 ? q.chars : characters(q.prompt)) <= f.max_chars;
}

}  // namespace

std::vector<Question> parse_questions(std::string_view jsonl, const std::string& where, const QuestionFilter& filter) {
  std::vector<Question> all;
  int64_t line_number = 0, seen = 0;
  for (size_t at = 0; at < jsonl.size();) {
    const size_t end = std::min(jsonl.find('\n', at), jsonl.size());
    const std::string_view line = jsonl.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = cat(where, " line ", line_number);
    const json object = parse_json_object(line, place);
    const Fields f(object, place);
    const auto prompt = f.string("prompt"), answer = f.string("answer");
    KDA_CHECK(prompt && answer, place, ": needed an object with strings `prompt` and `answer`");
    KDA_CHECK(answer->find_first_not_of(" \t\r\n") != std::string::npos, place, ": `answer` is empty");
    Question q{*prompt, *answer, f.string("haystack").value_or(""), f.integer("keys", 0, INT32_MAX).value_or(0),
               f.integer("chars", 0, INT64_MAX).value_or(0)};
    ++seen;
    if (passes(q, filter)) all.push_back(std::move(q));
  }
  KDA_CHECK(!all.empty(), where, ": none of ", seen, " questions is asked",
            filter.keys > 0 ? cat("; keys must be ", filter.keys) : "",
            filter.max_chars > 0 ? cat("; at most ", filter.max_chars, " characters") : "");
  if (filter.limit > 0 && filter.limit < int64_t(all.size())) {
    const int64_t n = int64_t(all.size());
    std::vector<Question> some;
    for (int64_t i = 0; i < filter.limit; ++i) some.push_back(std::move(all[size_t(i * n / filter.limit)]));
    return some;
  }
  return all;
}

std::string question_line(const Question& q) {
  nlohmann::ordered_json j;
  if (!q.haystack.empty()) j["haystack"] = q.haystack;
  if (q.keys > 0) j["keys"] = q.keys;
  if (q.chars > 0) j["chars"] = q.chars;
  j["prompt"] = q.prompt;
  j["answer"] = q.answer;
  return j.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

const char* name_of(Haystack h) { return h == Haystack::noise ? "noise" : h == Haystack::essay ? "essay" : "needles"; }

std::vector<std::string> sentences_of(std::string_view text) {
  const auto space = [](char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f' || c == '\v'; };
  std::vector<std::string> out;
  std::string s;
  const auto take = [&] {
    while (!s.empty() && s.back() == ' ') s.pop_back();
    if (s.size() >= 20 && s.size() <= 400) out.push_back(s);
    s.clear();
  };
  int64_t newlines = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (space(c)) {
      newlines = c == '\n' ? newlines + 1 : newlines;
      if (newlines >= 2)
        take();
      else if (!s.empty() && std::string_view(".!?").find(s.back()) != std::string_view::npos)
        take();
      else if (!s.empty() && s.back() != ' ')
        s += ' ';
      continue;
    }
    newlines = 0;
    s += c;
  }
  take();
  return out;
}

namespace {

constexpr std::array kAdjectives{
    "amber", "ancient", "bitter", "brave",  "bright", "calm",   "careful", "clever", "cold",   "curious",
    "damp",  "dark",    "deep",   "eager",  "early",  "faint",  "fancy",   "fierce", "frosty", "gentle",
    "giant", "golden",  "heavy",  "hidden", "hollow", "honest", "humble",  "icy",    "jolly",  "keen",
    "large", "lively",  "lonely", "loud",   "lucky",  "mellow", "misty",   "modest", "narrow", "noble",
    "old",   "patient", "plain",  "proud",  "quick",  "quiet",  "rapid",   "round",  "rusty",  "sharp",
    "shiny", "silent",  "silver", "simple", "sleepy", "small",  "smooth",  "sour",   "steady", "strong",
    "tall",  "thick",   "tiny",   "warm",   "weary",  "wild",   "wise",    "young"};
constexpr std::array kNouns{
    "anchor",  "apple",  "arrow",   "barn",    "basin",   "basket", "bell",   "bird",    "boat",     "book",
    "bridge",  "brick",  "candle",  "castle",  "cloud",   "coin",   "corner", "cottage", "desk",     "dish",
    "door",    "drum",   "eagle",   "engine",  "feather", "field",  "fish",   "flower",  "forest",   "garden",
    "gate",    "glove",  "hammer",  "harbor",  "hill",    "horse",  "island", "jewel",   "kettle",   "key",
    "kitchen", "ladder", "lamp",    "lantern", "leaf",    "marble", "meadow", "mirror",  "mountain", "needle",
    "ocean",   "onion",  "orchard", "paper",   "pencil",  "pillow", "planet", "ribbon",  "ring",     "river",
    "road",    "rocket", "shadow",  "shell",   "stone",   "table",  "tower",  "village", "violin",   "window"};

// Numbers of one question, one after the other.
class Draw {
 public:
  Draw(uint64_t seed, uint64_t index) : seed_(seed), index_(index) {}
  uint64_t below(uint64_t n) {  // the bias of a 64-bit remainder is below 1e-12 for every n used here
    const auto b = Philox::block(seed_, {uint32_t(index_), uint32_t(index_ >> 32), next_++, 0x6E656564u});
    return (uint64_t(b[0]) << 32 | b[1]) % n;
  }

 private:
  uint64_t seed_, index_;
  uint32_t next_ = 0;
};

std::string draw_value(NeedleValue kind, Draw& draw) {
  if (kind == NeedleValue::number) return std::to_string(1000000 + draw.below(9000000));
  std::string s;  // uuid, version 4
  for (int i = 0; i < 32; ++i) {
    if (i == 8 || i == 12 || i == 16 || i == 20) s += '-';
    const uint64_t digit = i == 12 ? 4 : i == 16 ? 8 + draw.below(4) : draw.below(16);
    s += "0123456789abcdef"[digit];
  }
  return s;
}

}  // namespace

Question make_needle(const NeedleSpec& spec, const std::vector<std::string>& sentences, uint64_t seed, uint64_t index) {
  KDA_CHECK(spec.keys >= 1, "needle: keys must be at least 1, is ", spec.keys);
  KDA_CHECK(spec.chars >= 1, "needle: chars must be at least 1, is ", spec.chars);
  KDA_CHECK(spec.haystack != Haystack::essay || !sentences.empty(),
            "needle: a haystack of text needs sentences, and there are none");
  const int64_t most = int64_t(kAdjectives.size() * kNouns.size());
  KDA_CHECK(spec.keys <= most, "needle: at most ", most, " different keys, asked for ", spec.keys);
  const char* type = spec.value == NeedleValue::number ? "number" : "uuid";
  Draw draw(seed, index);
  std::set<std::string> used;
  const auto needle = [&](std::string& key, std::string& value) {
    do {
      key = cat(kAdjectives[draw.below(kAdjectives.size())], "-", kNouns[draw.below(kNouns.size())]);
    } while (!used.insert(key).second);
    value = draw_value(spec.value, draw);
    return cat("One of the special magic ", type, "s for ", key, " is: ", value, ".");
  };
  std::string key, value;
  std::vector<std::string> lines;
  std::vector<std::pair<std::string, std::string>> hidden;  // key, value
  int64_t keys = spec.keys;
  if (spec.haystack == Haystack::needles) {
    for (int64_t length = 0;
         int64_t(lines.size()) < std::min(keys, most) || (length < spec.chars && int64_t(lines.size()) < most);) {
      lines.push_back(needle(key, value));
      hidden.emplace_back(key, value);
      length += int64_t(lines.back().size()) + 1;
    }
    keys = int64_t(hidden.size());
  } else {
    size_t at = spec.haystack == Haystack::essay ? draw.below(sentences.size()) : 0;
    for (int64_t length = 0; length < spec.chars; length += characters(lines.back()) + 1)
      lines.push_back(
          spec.haystack == Haystack::essay
              ? sentences[at++ % sentences.size()]
              : "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.");
    for (int64_t k = 0; k < keys; ++k) {
      const size_t place = draw.below(lines.size() + 1);
      const std::string line = needle(key, value);
      lines.insert(lines.begin() + int64_t(place), line);
      hidden.emplace_back(key, value);
    }
  }
  const auto& [asked, right] = hidden[draw.below(hidden.size())];
  Question q;
  q.prompt = cat("A special magic ", type,
                 " is hidden within the following text. Make sure to memorize it. I will quiz you about the ", type,
                 " afterwards.\n");
  const char* between = spec.haystack == Haystack::essay ? " " : "\n";
  for (size_t i = 0; i < lines.size(); ++i) q.prompt += (i ? between : "") + lines[i];
  q.prompt +=
      cat("\nWhat is the special magic ", type, " for ", asked, " mentioned in the provided text? The special magic ",
          type, " for ", asked, " mentioned in the provided text is");
  q.answer = " " + right;
  q.haystack = name_of(spec.haystack);
  q.keys = keys;
  q.chars = spec.chars;
  return q;
}

}  // namespace kda
