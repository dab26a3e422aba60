#include "text/pre_tokenizer.h"

#include <algorithm>

#include "text/byte_level.h"
#include "text/json.h"
#include "text/limits.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

enum class Behaviour { isolated, removed, merged_with_previous, merged_with_next, contiguous };

struct Cut {
  size_t begin, end;
  bool match;
};

// What becomes of the matches (`cuts` covers a piece without gaps).
void settle(const std::vector<Cut>& cuts, Behaviour behaviour, std::vector<Pieces::Range>& out) {
  const size_t first = out.size();
  const auto push = [&](const Cut& c) { out.push_back({c.begin, c.end}); };
  bool previous = false;
  switch (behaviour) {
    case Behaviour::isolated:
      for (const Cut& c : cuts) push(c);
      break;
    case Behaviour::removed:
      for (const Cut& c : cuts)
        if (!c.match) push(c);
      break;
    case Behaviour::contiguous:
      for (const Cut& c : cuts) {
        if (c.match == previous && out.size() > first)
          out.back().end = c.end;
        else
          push(c);
        previous = c.match;
      }
      break;
    case Behaviour::merged_with_previous:
      for (const Cut& c : cuts) {
        if (c.match && !previous && out.size() > first)
          out.back().end = c.end;
        else
          push(c);
        previous = c.match;
      }
      break;
    case Behaviour::merged_with_next: {
      for (auto c = cuts.rbegin(); c != cuts.rend(); ++c) {
        if (c->match && !previous && out.size() > first)
          out.back().begin = c->begin;
        else
          push(*c);
        previous = c->match;
      }
      std::reverse(out.begin() + static_cast<std::ptrdiff_t>(first), out.end());
      break;
    }
  }
}

// A step that cuts each piece at matches. Search calls f(begin, end) for each match in a piece, places within the
// piece.
template <class Search>
void split(Pieces& p, Behaviour behaviour, bool invert, Search search) {
  p.next.clear();
  std::vector<Cut> cuts;
  for (const auto& r : p.ranges) {
    cuts.clear();
    size_t from = r.begin;
    search(p.text.substr(r.begin, r.end - r.begin), [&](size_t begin, size_t end) {
      begin += r.begin, end += r.begin;
      if (from != begin) cuts.push_back({from, begin, invert});
      cuts.push_back({begin, end, !invert});
      from = end;
    });
    if (from != r.end) cuts.push_back({from, r.end, invert});
    settle(cuts, behaviour, p.next);
  }
  std::erase_if(p.next, [](const auto& r) { return r.begin == r.end; });
  p.ranges.swap(p.next);
}

// Matches of single characters.
template <class Test>
auto each_character(Test test) {
  return [test](std::string_view s, auto found) {
    for (size_t i = 0; i < s.size();) {
      const size_t from = i;
      if (test(utf8_next(s, i))) found(from, i);
    }
  };
}

// A step that writes a new text: write(piece, is the first character of the whole input, out).
template <class Write>
void rewrite(Pieces& p, Write write) {
  p.next_own.clear();
  if (!p.ranges.empty() && p.ranges[0].begin > 0) p.at_start = false;
  bool first = p.at_start;
  for (auto& r : p.ranges) {
    const size_t begin = p.next_own.size();
    write(p.text.substr(r.begin, r.end - r.begin), first, p.next_own);
    r = {begin, p.next_own.size()};
    first = false;
    check_growth(p.next_own.size(), p.original, "the pre_tokenizer");
  }
  p.own.swap(p.next_own);
  p.text = p.own;
}

class RegexSplit : public PreTokenizer {
 public:
  RegexSplit(Regex regex, Behaviour b, bool invert) : regex_(std::move(regex)), behaviour_(b), invert_(invert) {}
  void apply(Pieces& p, RegexScratch& scratch) const override {
    if (behaviour_ == Behaviour::isolated) return isolate(p, scratch);
    split(p, behaviour_, invert_, [&](std::string_view s, auto found) { regex_.for_each(s, scratch, found); });
  }

 private:
  // By far the most frequent case, without the list of cuts.
  void isolate(Pieces& p, RegexScratch& scratch) const {
    p.next.clear();
    for (const auto& r : p.ranges) {
      size_t from = r.begin;
      regex_.for_each(p.text.substr(r.begin, r.end - r.begin), scratch, [&](size_t begin, size_t end) {
        begin += r.begin, end += r.begin;
        if (from != begin) p.next.push_back({from, begin});
        if (begin != end) p.next.push_back({begin, end});
        from = end;
      });
      if (from != r.end) p.next.push_back({from, r.end});
    }
    p.ranges.swap(p.next);
  }

  Regex regex_;
  Behaviour behaviour_;
  bool invert_;
};

class LiteralSplit : public PreTokenizer {
 public:
  LiteralSplit(std::string literal, Behaviour b, bool invert)
      : literal_(std::move(literal)), behaviour_(b), invert_(invert) {}
  void apply(Pieces& p, RegexScratch&) const override {
    split(p, behaviour_, invert_, [&](std::string_view s, auto found) {
      for (size_t at = 0; (at = s.find(literal_, at)) != std::string_view::npos; at += literal_.size())
        found(at, at + literal_.size());
    });
  }

 private:
  std::string literal_;
  Behaviour behaviour_;
  bool invert_;
};

// Digits, Punctuation, WhitespaceSplit
class CharacterSplit : public PreTokenizer {
 public:
  CharacterSplit(bool (*test)(uint32_t), Behaviour b) : test_(test), behaviour_(b) {}
  void apply(Pieces& p, RegexScratch&) const override { split(p, behaviour_, false, each_character(test_)); }

 private:
  bool (*test_)(uint32_t);
  Behaviour behaviour_;
};

// Runs of word characters and runs of what is neither word nor space; spaces go.
class Whitespace : public PreTokenizer {
 public:
  void apply(Pieces& p, RegexScratch&) const override {
    p.next.clear();
    for (const auto& r : p.ranges) {
      int kind = 0;  // of the run so far: 0 space, 1 word, 2 other
      size_t from = r.begin;
      for (size_t i = r.begin; i < r.end;) {
        const size_t at = i;
        const uint32_t c = utf8_next(p.text, i);
        const int now = is_word(c) ? 1 : is_whitespace(c) ? 0 : 2;
        if (now == kind) continue;
        if (kind != 0) p.next.push_back({from, at});
        kind = now;
        from = at;
      }
      if (kind != 0) p.next.push_back({from, r.end});
    }
    p.ranges.swap(p.next);
  }
};

class PrefixSpace : public PreTokenizer {
 public:
  void apply(Pieces& p, RegexScratch&) const override {
    rewrite(p, [](std::string_view s, bool, std::string& out) {
      if (!s.starts_with(' ')) out += ' ';
      out += s;
    });
  }
};

class Bytes : public PreTokenizer {
 public:
  void apply(Pieces& p, RegexScratch&) const override {
    rewrite(p, [](std::string_view s, bool, std::string& out) { kByteLevel.append(out, s); });
  }
};

class Metaspace : public PreTokenizer {
 public:
  enum class Prepend { always, first, never };
  Metaspace(std::string_view mark, Prepend prepend, bool cut) : mark_(mark), prepend_(prepend), cut_(cut) {}
  void apply(Pieces& p, RegexScratch&) const override {
    rewrite(p, [&](std::string_view s, bool first, std::string& out) {
      const bool marked = s.starts_with(' ') || s.starts_with(mark_);
      if (!marked && (prepend_ == Prepend::always || (prepend_ == Prepend::first && first))) out += mark_;
      for (char c : s) {
        if (c == ' ')
          out += mark_;
        else
          out += c;
      }
    });
    if (!cut_) return;
    split(p, Behaviour::merged_with_next, false, [&](std::string_view s, auto found) {
      for (size_t at = 0; (at = s.find(mark_, at)) != std::string_view::npos; at += mark_.size())
        found(at, at + mark_.size());
    });
  }

 private:
  std::string mark_;
  Prepend prepend_;
  bool cut_;
};

constexpr std::string_view kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Behaviour behaviour_of(std::string_view name) {
  if (name == "Isolated") return Behaviour::isolated;
  if (name == "Removed") return Behaviour::removed;
  if (name == "MergedWithPrevious") return Behaviour::merged_with_previous;
  if (name == "MergedWithNext") return Behaviour::merged_with_next;
  if (name == "Contiguous") return Behaviour::contiguous;
  throw Error(
      cat("tokenizer: pre_tokenizer.behavior must be Isolated, Removed, MergedWithPrevious, MergedWithNext or "
          "Contiguous, is \"",
          name, '"'));
}

std::unique_ptr<PreTokenizer> parse_split(Json j) {
  const std::string_view where = "pre_tokenizer";
  const auto behaviour = behaviour_of(need_string(j, "behavior", where));
  const bool invert = json_bool(need(j, "invert", where), "pre_tokenizer.invert");
  const Json pattern = need(j, "pattern", where);
  if (const auto literal = find(pattern, "String", "pre_tokenizer.pattern")) {
    const std::string s(json_string(*literal, "pre_tokenizer.pattern.String"));
    KDA_CHECK(!s.empty(), "tokenizer: pre_tokenizer.pattern.String is empty");
    return std::make_unique<LiteralSplit>(s, behaviour, invert);
  }
  return std::make_unique<RegexSplit>(Regex(need_string(pattern, "Regex", "pre_tokenizer.pattern")), behaviour, invert);
}

std::unique_ptr<PreTokenizer> parse_metaspace(Json j) {
  const std::string_view where = "pre_tokenizer";
  const auto mark = json_character(need(j, "replacement", where), "pre_tokenizer.replacement");
  auto prepend = Metaspace::Prepend::always;
  const bool old = find_bool(j, "add_prefix_space", where, true);
  if (const auto scheme = find(j, "prepend_scheme", where)) {
    const auto name = json_string(*scheme, "pre_tokenizer.prepend_scheme");
    KDA_CHECK(name == "always" || name == "first" || name == "never",
              "tokenizer: pre_tokenizer.prepend_scheme must be always, first or never, is \"", name, '"');
    prepend = name == "always"  ? Metaspace::Prepend::always
              : name == "first" ? Metaspace::Prepend::first
                                : Metaspace::Prepend::never;
    KDA_CHECK(old || prepend == Metaspace::Prepend::never,
              "tokenizer: pre_tokenizer.add_prefix_space is false but prepend_scheme is \"", name, '"');
  } else if (!old) {
    prepend = Metaspace::Prepend::never;
  }
  return std::make_unique<Metaspace>(mark, prepend, find_bool(j, "split", where, true));
}

void add(PreTokenizers& out, Json j, int depth) {
  const std::string_view where = "pre_tokenizer";
  KDA_CHECK(depth < kMaxNesting, "tokenizer: pre_tokenizers nested more than ", kMaxNesting, " deep");
  const auto type = type_of(j, where);
  auto& steps = out.steps;
  if (type == "Sequence") {
    for (Json e : json_array(need(j, "pretokenizers", where), "pre_tokenizer.pretokenizers")) add(out, e, depth + 1);
    return;
  }
  // What was to be the last step is not: it takes its place.
  if (out.bytes_last) steps.push_back(std::make_unique<Bytes>());
  out.bytes_last = false;
  if (type == "ByteLevel") {
    if (find_bool(j, "add_prefix_space", where, true)) steps.push_back(std::make_unique<PrefixSpace>());
    if (find_bool(j, "use_regex", where, true))
      steps.push_back(std::make_unique<RegexSplit>(Regex(kGpt2), Behaviour::isolated, false));
    out.bytes_last = true;
  } else if (type == "Split") {
    steps.push_back(parse_split(j));
  } else if (type == "Metaspace") {
    steps.push_back(parse_metaspace(j));
  } else if (type == "Digits") {
    const bool each = find_bool(j, "individual_digits", where, false);
    steps.push_back(std::make_unique<CharacterSplit>(is_numeric, each ? Behaviour::isolated : Behaviour::contiguous));
  } else if (type == "Punctuation") {
    const auto b = find(j, "behavior", where);
    steps.push_back(std::make_unique<CharacterSplit>(
        is_punctuation, b ? behaviour_of(json_string(*b, "pre_tokenizer.behavior")) : Behaviour::isolated));
  } else if (type == "Whitespace") {
    steps.push_back(std::make_unique<Whitespace>());
  } else if (type == "WhitespaceSplit") {
    steps.push_back(std::make_unique<CharacterSplit>(is_whitespace, Behaviour::removed));
  } else {
    throw Error(cat("tokenizer: pre_tokenizer of type \"", type,
                    "\" is not supported (ByteLevel, Split, Metaspace, Digits, Punctuation, Whitespace, "
                    "WhitespaceSplit and Sequence are)"));
  }
  KDA_CHECK(steps.size() <= kMostSteps, "tokenizer: more than ", kMostSteps, " pre_tokenizers");
}

}  // namespace

PreTokenizers parse_pre_tokenizer(Json j) {
  PreTokenizers out;
  add(out, j, 0);
  return out;
}

}  // namespace kda::text
