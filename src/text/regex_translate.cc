// Oniguruma's Ruby syntax, rewritten so that PCRE2 (UTF, UCP, MULTILINE) reads it with the same meaning.
#include <algorithm>
#include <cctype>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/regex.h"
#include "text/utf8.h"

namespace kda::text {
namespace {

// Below U+0100 a table of its own counts superscripts and fractions too.
constexpr std::string_view kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";

class Translator {
 public:
  explicit Translator(std::string_view in) : in_(in) {}

  std::string run() {
    while (i_ < in_.size()) {
      const char c = in_[i_];
      switch (c) {
        case '\\': escape(); break;
        case '[': character_class(); break;
        case '(': open_group(); break;
        case ')': close_group(); break;
        case '|': put_plain("|"); break;
        case '^':
        case '$': put_plain(std::string(1, c)); break;
        case '*':
        case '+':
        case '?': simple_quantifier(); break;
        case '{': braces(); break;
        default: {
          const size_t n = utf8_length(c);
          atom(std::string(in_.substr(i_, n)));
          i_ += n;
        }
      }
    }
    KDA_CHECK(groups_.empty(), what(), "a group is not closed");
    return std::move(out_);
  }

 private:
  std::string what() const { return cat("tokenizer: regular expression \"", in_, "\": "); }
  [[noreturn]] void refuse(std::string_view why) const { throw Error(cat(what(), why, " (byte ", i_, ")")); }

  char peek(size_t k = 0) const { return i_ + k < in_.size() ? in_[i_ + k] : '\0'; }

  void atom(std::string_view s) {
    atom_ = out_.size();
    out_ += s;
    branch_start_ = false;
  }
  void put_plain(std::string_view s) {  // something that cannot be repeated
    out_ += s;
    atom_ = std::string::npos;
    branch_start_ = false;
    ++i_;
  }

  // The body of \p{..}; i_ is at 'p' or 'P'.
  std::string property() {
    bool negative = in_[i_] == 'P';
    ++i_;
    if (peek() != '{') refuse("\\p needs {..}");
    const size_t close = in_.find('}', i_);
    if (close == std::string_view::npos) refuse("\\p{ is not closed");
    std::string name(in_.substr(i_ + 1, close - i_ - 1));
    i_ = close + 1;
    if (!name.empty() && name[0] == '^') {
      negative = !negative;
      name.erase(0, 1);
    }
    for (char ch : name)
      if (!std::isalnum(static_cast<unsigned char>(ch)) && ch != '_' && ch != ' ' && ch != '-')
        refuse("a property name PCRE2 does not know");
    static constexpr std::pair<std::string_view, std::string_view> kLong[] = {
        {"Letter", "L"},
        {"Mark", "M"},
        {"Number", "N"},
        {"Punctuation", "P"},
        {"Symbol", "S"},
        {"Separator", "Z"},
        {"Other", "C"},
        {"Uppercase_Letter", "Lu"},
        {"Lowercase_Letter", "Ll"},
        {"Titlecase_Letter", "Lt"},
        {"Modifier_Letter", "Lm"},
        {"Other_Letter", "Lo"},
        {"Decimal_Number", "Nd"},
        {"Letter_Number", "Nl"},
        {"Other_Number", "No"},
        {"Nonspacing_Mark", "Mn"},
        {"Alpha", "Alphabetic"},
        {"Alphabetic", "Alphabetic"},
        {"Digit", "Nd"},
        {"Space", "White_Space"},
        {"White_Space", "White_Space"},
        {"Emoji", "Emoji"},
        {"Any", "Any"},
        {"Upper", "Uppercase"},
        {"Lower", "Lowercase"},
        {"Uppercase", "Uppercase"},
        {"Lowercase", "Lowercase"},
        {"Extended_Pictographic", "Extended_Pictographic"}};
    std::string translated;
    for (const auto& [from, to] : kLong)
      if (name == from) translated = to;
    // A bare script name means the script itself there; in PCRE2 it would mean its extensions as well.
    if (translated.empty()) translated = name.size() <= 2 ? name : "sc:" + name;
    return cat(negative ? "\\P{" : "\\p{", translated, "}");
  }

  // \xHH, \x{H..}, \uHHHH; i_ is at 'x' or 'u'. Code points 0x80..0xff as \xHH are raw bytes there: refused.
  std::string code_point() {
    const bool u = in_[i_] == 'u';
    ++i_;
    std::string digits;
    const bool braced = !u && peek() == '{';
    if (braced) ++i_;
    const size_t most = u ? 4 : braced ? 8 : 2;
    while (digits.size() < most && std::isxdigit(static_cast<unsigned char>(peek()))) digits += in_[i_++];
    if (digits.empty() || (u && digits.size() != 4)) refuse("hexadecimal digits are missing");
    if (braced) {
      if (peek() != '}') refuse("\\x{ is not closed");
      ++i_;
    }
    if (!u && !braced && std::stoul(digits, nullptr, 16) >= 0x80) refuse("\\xHH of a byte that is no character");
    return cat("\\x{", digits, "}");
  }

  void escape() {
    ++i_;
    if (i_ >= in_.size()) refuse("ends in a backslash");
    const char c = in_[i_];
    const auto one = [&](std::string_view s) { atom(s), ++i_; };
    const auto zero_width = [&](std::string_view s) { put_plain(s); };
    switch (c) {
      case 's': return one("\\p{White_Space}");
      case 'S': return one("\\P{White_Space}");
      case 'd': return one("\\p{Nd}");
      case 'D': return one("\\P{Nd}");
      case 'w': return one(cat("[", kWord, "]"));
      case 'W': return one(cat("[^", kWord, "]"));
      case 'h': return one("[0-9a-fA-F]");
      case 'H': return one("[^0-9a-fA-F]");
      case 'v': return one("\\x{0b}");
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'a':
      case 'e':
      case 'R':
      case 'X': return one(cat("\\", c));
      case 'A':
      case 'z':
      case 'Z':
      case 'K':
      case 'G': return zero_width(cat("\\", c));
      case 'b': return zero_width(cat("(?:(?<=[", kWord, "])(?![", kWord, "])|(?<![", kWord, "])(?=[", kWord, "]))"));
      case 'B': return zero_width(cat("(?:(?<=[", kWord, "])(?=[", kWord, "])|(?<![", kWord, "])(?![", kWord, "]))"));
      case 'p':
      case 'P': return atom(property());
      case 'x':
      case 'u': return atom(code_point());
      default: break;
    }
    if (c >= '1' && c <= '9' && !std::isdigit(static_cast<unsigned char>(peek(1)))) return one(cat("\\", c));
    if (std::isalnum(static_cast<unsigned char>(c))) refuse(cat("\\", c, " is not supported"));
    const size_t n = utf8_length(c);
    atom(n == 1 ? cat("\\", c) : std::string(in_.substr(i_, n)));
    i_ += n;
  }

  void character_class() {
    std::string s = "[";
    ++i_;
    if (peek() == '^') s += in_[i_++];
    if (peek() == ']') refuse("an empty class");
    for (;;) {
      if (i_ >= in_.size()) refuse("a class is not closed");
      const char c = in_[i_];
      if (c == ']') break;
      if (c == '[') refuse("a class inside a class is not supported");
      if (c == '&' && peek(1) == '&') refuse("&& in a class is not supported");
      if (c != '\\') {
        const size_t n = utf8_length(c);
        s += in_.substr(i_, n);
        i_ += n;
        continue;
      }
      ++i_;
      const char e = peek();
      if (e == 's' || e == 'S')
        s += e == 's' ? "\\p{White_Space}" : "\\P{White_Space}", ++i_;
      else if (e == 'd' || e == 'D')
        s += e == 'd' ? "\\p{Nd}" : "\\P{Nd}", ++i_;
      else if (e == 'w')
        s += kWord, ++i_;
      else if (e == 'h')
        s += "0-9a-fA-F", ++i_;
      else if (e == 'v')
        s += "\\x{0b}", ++i_;
      else if (e == 'p' || e == 'P')
        s += property();
      else if (e == 'x' || e == 'u')
        s += code_point();
      else if (e == 'n' || e == 'r' || e == 't' || e == 'f' || e == 'a' || e == 'e' || e == 'b')
        s += cat("\\", e), ++i_;
      else if (e == '\0' || std::isalnum(static_cast<unsigned char>(e)))
        refuse(cat("\\", e, " in a class is not supported"));
      else {
        const size_t n = utf8_length(e);
        if (n == 1) s += '\\';
        s += in_.substr(i_, n);
        i_ += n;
      }
    }
    ++i_;
    atom(s + "]");
  }

  void open_group() {
    const size_t at = out_.size();
    const bool first = branch_start_;
    if (peek(1) == '*') refuse("(* is not supported");
    if (peek(1) != '?') {
      out_ += '(';
      ++i_;
    } else if (const char k = peek(2); k == ':' || k == '=' || k == '!' || k == '>') {
      out_ += cat("(?", k);
      i_ += 3;
    } else if (k == '#') {
      const size_t close = in_.find(')', i_);
      if (close == std::string_view::npos) refuse("a comment is not closed");
      i_ = close + 1;
      return;
    } else if (k == '<') {
      if (peek(3) == '=' || peek(3) == '!') {
        out_ += cat("(?<", peek(3));
        i_ += 4;
      } else {
        out_ += '(';  // a name is of use only to calls and back references by name, which are refused
        const size_t close = in_.find('>', i_);
        if (close == std::string_view::npos) refuse("a group's name is not closed");
        i_ = close + 1;
      }
    } else {
      std::string options = "(?";
      i_ += 2;
      for (; peek() != ':' && peek() != ')'; ++i_) {
        const char o = peek();
        if (o == 'i' || o == 'x' || o == '-')
          options += o;
        else if (o == 'm')
          options += 's';
        else
          refuse("an option of a group is not supported");
      }
      if (options.find('x') != std::string::npos) refuse("the option x is not supported");
      if (peek() == ')') {
        // Options for the rest: there they hold across the alternatives that follow, in PCRE2 too if they come first.
        if (!first) refuse("options for the rest of a group must stand at its start");
        out_ += options + ")";
        ++i_;
        return;
      }
      out_ += options + ":";
      ++i_;
    }
    groups_.push_back(at);
    KDA_CHECK(groups_.size() <= 200, what(), "groups nested more than 200 deep");
    branch_start_ = true;
    atom_ = std::string::npos;
  }

  void close_group() {
    if (groups_.empty()) refuse("an unopened group is closed");
    out_ += ')';
    ++i_;
    atom_ = groups_.back();
    groups_.pop_back();
    branch_start_ = false;
  }

  void simple_quantifier() {
    if (atom_ == std::string::npos) refuse("nothing to repeat");
    out_ += in_[i_++];
    if (peek() == '?' || peek() == '+') out_ += in_[i_++];
    wrap_if_repeated();
  }

  // A second repetition of the same atom, as in a{2}+ or a?*: its own group.
  void wrap_if_repeated() {
    const char c = peek();
    const bool again =
        c == '*' || c == '+' || c == '?' || (c == '{' && std::isdigit(static_cast<unsigned char>(peek(1))));
    if (!again) {
      atom_ = std::string::npos;
      return;
    }
    out_.insert(atom_, "(?:");
    out_ += ')';
    KDA_CHECK(out_.size() < (size_t(1) << 18), what(), "too long");
  }

  void braces() {
    size_t j = i_ + 1;
    const auto number = [&](int64_t otherwise) {
      if (j >= in_.size() || !std::isdigit(static_cast<unsigned char>(in_[j]))) return otherwise;
      int64_t v = 0;
      for (; j < in_.size() && std::isdigit(static_cast<unsigned char>(in_[j])); ++j)
        v = std::min<int64_t>(v * 10 + (in_[j] - '0'), 1 << 20);
      return v;
    };
    const int64_t low = number(-1);
    int64_t high = low;
    if (j < in_.size() && in_[j] == ',') ++j, high = number(-2);
    const bool quantifier = j < in_.size() && in_[j] == '}' && (low >= 0 || high >= 0);
    if (!quantifier || atom_ == std::string::npos) {
      if (quantifier) refuse("nothing to repeat");
      atom("\\{");
      ++i_;
      return;
    }
    i_ = j + 1;
    if (high >= 0 && low > high) refuse("a repetition whose least is above its most");
    out_ += cat("{", std::max<int64_t>(low, 0));
    if (high == -2)
      out_ += ",";
    else if (high != low)
      out_ += cat(",", high);
    out_ += '}';
    const bool exact = high == low;
    if (peek() == '?' && !exact) out_ += in_[i_++];  // reluctant; {n}? is an optional {n}
    wrap_if_repeated();
  }

  std::string_view in_;
  size_t i_ = 0;
  std::string out_;
  size_t atom_ = std::string::npos;  // where in out_ the thing begins that a quantifier would repeat
  std::vector<size_t> groups_;
  bool branch_start_ = true;
};

}  // namespace

std::string translate_regex(std::string_view onig) { return Translator(onig).run(); }

}  // namespace kda::text
