#include "text/decoder.h"

#include <utility>

#include "text/byte_level.h"
#include "text/json.h"
#include "text/limits.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

// The bytes that a token in the byte alphabet stands for; the token itself when it holds another character.
void append_bytes(std::string_view token, std::string& out) {
  const size_t from = out.size();
  for (size_t i = 0; i < token.size();) {
    const uint32_t c = utf8_next(token, i);
    const int b = c < kByteLevel.byte.size() ? kByteLevel.byte[c] : -1;
    if (b < 0) {
      out.resize(from);
      out += token;
      return;
    }
    out.push_back(static_cast<char>(b));
  }
}

// <0xHH>, or -1. A sign for the first digit is read as the reference's number parser does.
int byte_of(std::string_view t) {
  if (t.size() != 6 || !t.starts_with("<0x") || t[5] != '>') return -1;
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    const char l = static_cast<char>(c | 0x20);
    return l >= 'a' && l <= 'f' ? l - 'a' + 10 : -1;
  };
  const int low = digit(t[4]), high = t[3] == '+' ? 0 : digit(t[3]);
  return low < 0 || high < 0 ? -1 : high * 16 + low;
}

// A finished run of <0xHH> tokens: its characters, or U+FFFD for every byte when it is not UTF-8 as a whole.
std::string byte_run(const std::string& bytes) {
  if (utf8_invalid_at(bytes) == std::string_view::npos) return bytes;
  std::string out;
  for (size_t i = 0; i < bytes.size(); ++i) out += kReplacementCharacter;
  return out;
}

}  // namespace

Decoder::Decoder(Json j) {
  add(j, 0);
  fused_ = steps_.size();
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Kind k = steps_[i].kind;
    if (fused_ == steps_.size()) {
      if (k == Kind::byte_level || k == Kind::fuse) fused_ = i;
    } else if (k != Kind::fuse && k != Kind::strip) {
      streams_ = false;
    }
  }
}

void Decoder::add(Json j, int depth) {
  const std::string_view where = "decoder";
  KDA_CHECK(depth < kMaxNesting, "tokenizer: decoders nested more than ", kMaxNesting, " deep");
  const auto type = type_of(j, where);
  Step s{};
  if (type == "Sequence") {
    for (Json e : json_array(need(j, "decoders", where), "decoder.decoders")) add(e, depth + 1);
    return;
  }
  if (type == "ByteLevel") {
    s.kind = Kind::byte_level;
  } else if (type == "ByteFallback") {
    s.kind = Kind::byte_fallback;
  } else if (type == "Fuse") {
    s.kind = Kind::fuse;
  } else if (type == "Metaspace") {
    s.kind = Kind::metaspace;
    s.content = json_character(need(j, "replacement", where), "decoder.replacement");
    const bool old = find_bool(j, "add_prefix_space", where, true);
    const auto scheme = find(j, "prepend_scheme", where);
    s.drop_first = scheme ? json_string(*scheme, "decoder.prepend_scheme") != "never" : old;
  } else if (type == "Replace") {
    s.kind = Kind::replace;
    s.content = need_string(j, "content", where);
    const Json pattern = need(j, "pattern", where);
    if (const auto literal = find(pattern, "String", "decoder.pattern")) {
      s.literal = json_string(*literal, "decoder.pattern.String");
      KDA_CHECK(!s.literal.empty(), "tokenizer: decoder.pattern.String is empty");
    } else {
      s.regex.emplace(need_string(pattern, "Regex", "decoder.pattern"));
    }
  } else if (type == "Strip") {
    s.kind = Kind::strip;
    s.content = json_character(need(j, "content", where), "decoder.content");
    s.start = static_cast<size_t>(json_integer(need(j, "start", where), "decoder.start", 0, 1 << 20));
    s.stop = static_cast<size_t>(json_integer(need(j, "stop", where), "decoder.stop", 0, 1 << 20));
  } else {
    throw Error(cat("tokenizer: decoder of type \"", type,
                    "\" is not supported (ByteLevel, Metaspace, ByteFallback, Fuse, Replace, Strip and Sequence are)"));
  }
  steps_.push_back(std::move(s));
  KDA_CHECK(steps_.size() <= kMostSteps, "tokenizer: more than ", kMostSteps, " decoders");
}

std::string Decoder::Step::one(std::string_view token, bool first, RegexScratch& scratch) const {
  std::string out;
  switch (kind) {
    case Kind::metaspace:
      for (size_t i = 0; i < token.size();) {
        const size_t n = utf8_length(token[i]);
        const auto c = token.substr(i, n);
        if (c != content)
          out += c;
        else if (!first || !drop_first)
          out += ' ';
        i += n;
      }
      return out;
    case Kind::replace: {
      size_t from = 0;
      const auto put = [&](size_t begin, size_t end) {
        out += token.substr(from, begin - from);
        out += content;
        from = end;
        check_growth(out.size(), token.size(), "the decoder");
      };
      if (regex) {
        regex->for_each(token, scratch, put);
      } else {
        for (size_t at = 0; (at = token.find(literal, at)) != std::string_view::npos; at += literal.size())
          put(at, at + literal.size());
      }
      return out += token.substr(from);
    }
    case Kind::strip:
      for (size_t n = 0; n < start && token.starts_with(content); ++n) token.remove_prefix(content.size());
      for (size_t n = 0; n < stop && token.ends_with(content); ++n) token.remove_suffix(content.size());
      return std::string(token);
    default: return std::string(token);
  }
}

std::string Decoder::decode(const std::vector<std::string_view>& tokens, RegexScratch& scratch) const {
  std::string all;
  if (steps_.empty()) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i > 0) all += ' ';
      all += tokens[i];
    }
    return all;
  }
  if (steps_.size() == 1 && steps_[0].kind == Kind::byte_level) {
    std::string bytes;
    for (const auto t : tokens) append_bytes(t, bytes);
    if (utf8_lossy(bytes, all) > 0) all += kReplacementCharacter;
    return all;
  }
  size_t original = 0;
  for (const auto t : tokens) original += t.size();
  std::vector<std::string> now(tokens.begin(), tokens.end()), next;
  for (const Step& s : steps_) {
    next.clear();
    std::string bytes;
    const auto end_run = [&] {
      if (!bytes.empty()) next.push_back(byte_run(bytes));
      bytes.clear();
    };
    switch (s.kind) {
      case Kind::byte_level:
        for (const auto& t : now) append_bytes(t, bytes);
        next.emplace_back();
        if (utf8_lossy(bytes, next[0]) > 0) next[0] += kReplacementCharacter;
        break;
      case Kind::fuse:
        next.emplace_back();
        for (const auto& t : now) next[0] += t;
        break;
      case Kind::byte_fallback:
        for (auto& t : now) {
          if (const int b = byte_of(t); b >= 0) {
            bytes.push_back(static_cast<char>(b));
          } else {
            end_run();
            next.push_back(std::move(t));
          }
        }
        end_run();
        break;
      default:
        for (size_t i = 0; i < now.size(); ++i) next.push_back(s.one(now[i], i == 0, scratch));
    }
    now.swap(next);
    size_t size = 0;
    for (const auto& t : now) size += t.size();
    check_growth(size, original, "the decoder");
  }
  for (const auto& t : now) all += t;
  return all;
}

Decoder::Stream::Stream(const Decoder& d) : decoder_(d), states_(d.steps_.size() + 1) {}

std::string Decoder::Stream::push(std::string_view token) {
  std::string out;
  if (decoder_.streams_)
    feed(0, token, out);
  else
    kept_.emplace_back(token);
  return out;
}

std::string Decoder::Stream::finish() {
  std::string out;
  if (decoder_.streams_) {
    end(0, out);
  } else {
    out = decoder_.decode({kept_.begin(), kept_.end()}, scratch_);
    kept_.clear();
  }
  states_.assign(states_.size(), {});
  return out;
}

// One token (or, behind the fusing step, some more of the one string) arrives at a step.
void Decoder::Stream::feed(size_t step, std::string_view token, std::string& out) {
  State& state = states_[step];
  const bool first = !std::exchange(state.any, true);
  if (step == decoder_.steps_.size()) {
    if (step == 0 && !first) out += ' ';
    out += token;
    return;
  }
  const Step& s = decoder_.steps_[step];
  switch (s.kind) {
    case Kind::fuse: return feed(step + 1, token, out);
    case Kind::byte_level: {
      append_bytes(token, state.bytes);
      std::string text;
      state.bytes.erase(0, state.bytes.size() - utf8_lossy(state.bytes, text));
      if (!text.empty()) feed(step + 1, text, out);
      return;
    }
    case Kind::byte_fallback:
      if (const int b = byte_of(token); b >= 0) {
        state.bytes.push_back(static_cast<char>(b));
        return;
      }
      if (!state.bytes.empty()) feed(step + 1, byte_run(std::exchange(state.bytes, {})), out);
      return feed(step + 1, token, out);
    case Kind::strip:
      if (step > decoder_.fused_) {
        while (!state.started && state.stripped < s.start && token.starts_with(s.content)) {
          token.remove_prefix(s.content.size());
          ++state.stripped;
        }
        if (token.empty()) return;
        state.started = true;
        // The last s.stop of the characters may have to go.
        state.tail += token;
        size_t keep = state.tail.size();
        for (size_t n = 0; n < s.stop && std::string_view(state.tail).substr(0, keep).ends_with(s.content); ++n)
          keep -= s.content.size();
        const std::string settled = state.tail.substr(0, keep);
        state.tail.erase(0, keep);
        if (!settled.empty()) feed(step + 1, settled, out);
        return;
      }
      [[fallthrough]];
    default: return feed(step + 1, s.one(token, first, scratch_), out);
  }
}

// No more tokens will arrive at a step: it lets go what it holds, then the next one ends.
void Decoder::Stream::end(size_t step, std::string& out) {
  if (step == decoder_.steps_.size()) return;
  State& state = states_[step];
  const Kind kind = decoder_.steps_[step].kind;
  if (kind == Kind::byte_level && !state.bytes.empty()) feed(step + 1, kReplacementCharacter, out);
  if (kind == Kind::byte_fallback && !state.bytes.empty()) feed(step + 1, byte_run(state.bytes), out);
  end(step + 1, out);  // a Strip's tail is what the end strips
}

}  // namespace kda::text
