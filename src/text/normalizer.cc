#include "text/normalizer.h"

#include "text/byte_level.h"
#include "text/json.h"
#include "text/limits.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

void strip(std::string& s, bool left, bool right, bool& at_start) {
  size_t begin = 0, end = s.size();
  if (left) {
    while (begin < end) {
      size_t next = begin;
      if (!is_whitespace(utf8_next(s, next))) break;
      begin = next;
    }
  }
  if (right) {
    while (begin < end) {
      const size_t previous = utf8_previous(s, end);
      size_t i = previous;
      if (!is_whitespace(utf8_next(s, i))) break;
      end = previous;
    }
  }
  if (begin > 0) at_start = false;
  s = s.substr(begin, end - begin);
}

void strip_accents(std::string& s, bool& at_start) {
  std::string out;
  out.reserve(s.size());
  for (size_t i = 0; i < s.size();) {
    const size_t from = i;
    if (is_mark(utf8_next(s, i))) {
      if (from == 0) at_start = false;
    } else {
      out.append(s, from, i - from);
    }
  }
  s = std::move(out);
}

}  // namespace

Normalizer::Normalizer(Json j) { add(j, 0); }

void Normalizer::add(Json j, int depth) {
  const std::string_view where = "normalizer";
  KDA_CHECK(depth < kMaxNesting, "tokenizer: normalizers nested more than ", kMaxNesting, " deep");
  const auto type = type_of(j, where);
  Step s{};
  if (type == "Sequence") {
    for (Json e : json_array(need(j, "normalizers", where), "normalizer.normalizers")) add(e, depth + 1);
    return;
  }
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    s.kind = Kind::normal_form;
    s.form = type == "NFC"    ? NormalForm::nfc
             : type == "NFD"  ? NormalForm::nfd
             : type == "NFKC" ? NormalForm::nfkc
                              : NormalForm::nfkd;
  } else if (type == "Lowercase") {
    s.kind = Kind::lowercase;
  } else if (type == "Prepend") {
    s.kind = Kind::prepend;
    s.content = need_string(j, "prepend", where);
  } else if (type == "Replace") {
    s.kind = Kind::replace;
    s.content = need_string(j, "content", where);
    const Json pattern = need(j, "pattern", where);
    if (const auto literal = find(pattern, "String", "normalizer.pattern")) {
      s.literal = json_string(*literal, "normalizer.pattern.String");
      KDA_CHECK(!s.literal.empty(), "tokenizer: normalizer.pattern.String is empty");
    } else {
      s.regex.emplace(need_string(pattern, "Regex", "normalizer.pattern"));
    }
  } else if (type == "Strip") {
    s.kind = Kind::strip;
    s.left = json_bool(need(j, "strip_left", where), "normalizer.strip_left");
    s.right = json_bool(need(j, "strip_right", where), "normalizer.strip_right");
  } else if (type == "StripAccents") {
    s.kind = Kind::strip_accents;
  } else if (type == "ByteLevel") {
    s.kind = Kind::byte_level;
  } else {
    throw Error(cat(
        "tokenizer: normalizer of type \"", type,
        "\" is not supported (NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, StripAccents, ByteLevel and "
        "Sequence are)"));
  }
  steps_.push_back(std::move(s));
  KDA_CHECK(steps_.size() <= kMostSteps, "tokenizer: more than ", kMostSteps, " normalizers");
}

std::string Normalizer::apply(std::string text, bool& at_start, RegexScratch& scratch) const {
  const size_t original = text.size();
  for (const Step& s : steps_) {
    check_growth(text.size(), original, "the normalizer");
    switch (s.kind) {
      case Kind::normal_form: text = normal_form(text, s.form); break;
      case Kind::lowercase: text = lowercase(text); break;
      case Kind::prepend:
        if (!text.empty()) text.insert(0, s.content);
        break;
      case Kind::strip: strip(text, s.left, s.right, at_start); break;
      case Kind::strip_accents: strip_accents(text, at_start); break;
      case Kind::byte_level: {
        std::string out;
        kByteLevel.append(out, text);
        text = std::move(out);
        break;
      }
      case Kind::replace: {
        std::string out;
        size_t from = 0;
        const auto put = [&](size_t begin, size_t end) {
          if (begin == 0 && end > 0 && s.content.empty()) at_start = false;
          out.append(text, from, begin - from);
          out += s.content;
          check_growth(out.size(), original, "the normalizer");
          from = end;
        };
        if (s.regex) {
          s.regex->for_each(text, scratch, put);
        } else {
          for (size_t at = 0; (at = text.find(s.literal, at)) != std::string::npos; at += s.literal.size())
            put(at, at + s.literal.size());
        }
        if (from == 0 && out.empty()) break;
        out.append(text, from);
        text = std::move(out);
        break;
      }
    }
  }
  check_growth(text.size(), original, "the normalizer");
  return text;
}

}  // namespace kda::text
