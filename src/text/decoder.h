// text/decoder.h — from tokens back to text, whole or as they come.
#pragma once
#include <simdjson.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"

namespace kda::text {

// ByteLevel, Metaspace, ByteFallback, Fuse, Replace, Strip and Sequence; without any, tokens are joined by spaces.
class Decoder {
 public:
  Decoder() = default;
  // Throws Error for other types.
  explicit Decoder(simdjson::dom::element);

  std::string decode(const std::vector<std::string_view>& tokens, RegexScratch&) const;

  // The same text, piece by piece: what push() and finish() return is, put together, what decode() returns of all
  // tokens. Each piece is valid UTF-8. What later tokens may still change is held back: an unfinished character, a run
  // of <0xHH> tokens, blanks that the end would strip. Where a later step needs the whole text (a replacement after
  // Fuse), everything comes from finish().
  class Stream {
   public:
    explicit Stream(const Decoder& d);
    std::string push(std::string_view token);
    std::string finish();

   private:
    struct State {
      bool any = false;      // a token has passed
      std::string bytes;     // ByteFallback, ByteLevel: held back
      size_t stripped = 0;   // Strip on the fused text: characters taken off its start
      bool started = false;  //   a character that stays has passed
      std::string tail;      //   held back: characters that the end may strip
    };
    void feed(size_t step, std::string_view token, std::string& out);
    void end(size_t step, std::string& out);

    const Decoder& decoder_;
    std::vector<State> states_;
    std::vector<std::string> kept_;  // all tokens, where only the whole can be decoded
    RegexScratch scratch_;
  };

 private:
  enum class Kind { byte_level, metaspace, byte_fallback, fuse, replace, strip };
  struct Step {
    Kind kind;
    std::string content;         // metaspace, strip: the character; replace: by what
    std::string literal;         // replace: what
    std::optional<Regex> regex;  // replace, when not a literal
    bool drop_first = false;     // metaspace: the mark of the first token goes
    size_t start = 0, stop = 0;  // strip: at most so many at either end
    // What a token becomes, for the kinds that look at one token at a time.
    std::string one(std::string_view token, bool first, RegexScratch&) const;
  };
  void add(simdjson::dom::element, int depth);

  std::vector<Step> steps_;
  size_t fused_ = 0;     // first step from which on the text is one string; steps_.size() when none
  bool streams_ = true;  // steps behind it can work on a string that is still growing
};

}  // namespace kda::text
