#include "train/yaml.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"

namespace kda {

namespace {
constexpr size_t kDeepest = 32;
constexpr size_t kLargestText = size_t(1) << 20;

// Builds the tree from the parser's events.
class Builder : public YAML::EventHandler {
 public:
  Builder(std::string name, bool lines) : name_(std::move(name)), lines_(lines) {}
  Yaml take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override { add(make(Yaml::Kind::null, mark)); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override { refuse(mark, "aliases (*name)"); }
  void OnAnchor(const YAML::Mark& mark, const std::string&) override { refuse(mark, "anchors (&name)"); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check_tag(mark, tag, anchor);
    if (want_key()) return key(mark, value);
    const bool quoted = tag == "!";
    Yaml y = make(!quoted && (value.empty() || value == "~" || value == "null") ? Yaml::Kind::null : Yaml::Kind::scalar,
                  mark);
    y.text = value;
    y.quoted = quoted;
    add(std::move(y));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Yaml::Kind::list);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Yaml::Kind::map);
  }
  void OnMapEnd() override { close(); }

 private:
  std::string where(const YAML::Mark& mark) const {
    return mark.is_null() || !lines_ ? name_ : cat(name_, ":", mark.line + 1);
  }
  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& what) const {
    throw Error(cat(where(mark), ": ", what, " are not read in a run file; write the value out"));
  }
  void check_tag(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) const {
    if (anchor) refuse(mark, "anchors (&name)");
    if (!tag.empty() && tag != "?" && tag != "!") refuse(mark, "tags (" + tag + ")");
  }
  Yaml make(Yaml::Kind kind, const YAML::Mark& mark) const {
    Yaml y;
    y.kind = kind;
    y.where = where(mark);
    return y;
  }
  bool want_key() const { return !open_.empty() && open_.back()->kind == Yaml::Kind::map && !has_key_; }
  void key(const YAML::Mark& mark, const std::string& text) {
    Yaml& map = *open_.back();
    KDA_CHECK(!map.find(text), where(mark), ": key '", text, "' is given twice");
    KDA_CHECK(text != "<<", where(mark), ": merge keys (<<) are not read in a run file; write the keys out");
    map.fields.push_back({text, Yaml{}});
    map.field_where.push_back(where(mark));
    has_key_ = true;
  }
  Yaml& add(Yaml y) {
    if (open_.empty()) return root_ = std::move(y);
    KDA_CHECK(!want_key(), y.where, ": a key must be a word");
    Yaml& parent = *open_.back();
    has_key_ = false;
    if (parent.kind == Yaml::Kind::list) return parent.items.emplace_back(std::move(y));
    return parent.fields.back().second = std::move(y);
  }
  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, Yaml::Kind kind) {
    check_tag(mark, tag, anchor);
    KDA_CHECK(open_.size() < kDeepest, where(mark), ": nested deeper than ", kDeepest, " levels");
    open_.push_back(&add(make(kind, mark)));  // stays put: its parent grows no more until it is closed
  }
  void close() {
    open_.pop_back();
    has_key_ = false;
  }

  std::string name_;
  bool lines_;  // of the text count
  Yaml root_;
  std::vector<Yaml*> open_;
  bool has_key_ = false;
};

Yaml parse(std::string_view text, const std::string& name, bool lines) {
  KDA_CHECK(text.size() <= kLargestText, name, ": larger than the ", kLargestText, " bytes of a run file");
  KDA_CHECK(text.find('\0') == text.npos, name, ": holds a zero byte, so it is no text");
  Builder builder(name, lines);
  try {
    std::istringstream in{std::string(text)};
    YAML::Parser parser(in);
    if (!parser.HandleNextDocument(builder)) return {};
    Builder second(name, lines);
    KDA_CHECK(!parser.HandleNextDocument(second), name, ": more than one document (---)");
  } catch (const YAML::Exception& e) {
    throw Error(lines && !e.mark.is_null() ? cat(name, ":", e.mark.line + 1, ": not valid YAML: ", e.msg)
                                           : cat(name, ": not valid YAML: ", e.msg));
  }
  return builder.take();
}

void set_where(Yaml& y, const std::string& where) {
  y.where = where;
  for (auto& i : y.items) set_where(i, where);
  for (auto& f : y.fields) set_where(f.second, where);
  for (auto& w : y.field_where) w = where;
}
}  // namespace

const Yaml* Yaml::find(std::string_view key) const {
  for (const auto& [name, value] : fields)
    if (name == key) return &value;
  return nullptr;
}

Yaml parse_yaml(std::string_view text, const std::string& name) {
  Yaml y = parse(text, name, true);
  if (y.where.empty()) y.where = name;
  return y;
}

void set_yaml(Yaml& root, std::string_view setting) {
  const std::string where = cat("--set ", setting);
  const size_t equals = setting.find('=');
  KDA_CHECK(equals != setting.npos && equals > 0, where, ": needed KEY=VALUE");
  Yaml value = parse(setting.substr(equals + 1), where, false);
  set_where(value, where);
  Yaml* at = &root;
  for (size_t from = 0; from <= equals;) {
    const size_t to = std::min(setting.find('.', from), equals);
    const std::string key(setting.substr(from, to - from));
    KDA_CHECK(!key.empty(), where, ": an empty key");
    if (at->kind == Yaml::Kind::list) {
      size_t i = 0;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), i);
      KDA_CHECK(error == std::errc() && end == key.data() + key.size() && i < at->items.size(), where, ": '", key,
                "' is no place in a list of ", at->items.size(), " (they count from 0)");
      at = &at->items[i];
    } else {
      KDA_CHECK(at->kind == Yaml::Kind::map || at->kind == Yaml::Kind::null, where, ": '", key, "' lies below '",
                at->text, "' (", at->where, "), which is a single value");
      at->kind = Yaml::Kind::map;
      auto it = std::find_if(at->fields.begin(), at->fields.end(), [&](const auto& f) { return f.first == key; });
      if (it == at->fields.end()) {
        at->fields.push_back({key, Yaml{}});
        at->fields.back().second.where = where;
        at->field_where.push_back(where);
        it = at->fields.end() - 1;
      }
      at->field_where[size_t(it - at->fields.begin())] = where;
      at = &it->second;
    }
    from = to + 1;
  }
  *at = std::move(value);
}

namespace {
nlohmann::ordered_json json_of(const Yaml& y) {
  using Json = nlohmann::ordered_json;
  switch (y.kind) {
    case Yaml::Kind::null: return nullptr;
    case Yaml::Kind::list: {
      Json list = Json::array();
      for (const Yaml& item : y.items) list.push_back(json_of(item));
      return list;
    }
    case Yaml::Kind::map: {
      Json map = Json::object();
      for (const auto& [key, value] : y.fields) map[key] = json_of(value);
      return map;
    }
    case Yaml::Kind::scalar: break;
  }
  if (y.quoted) return y.text;
  if (y.text == "true" || y.text == "True") return true;
  if (y.text == "false" || y.text == "False") return false;
  const Json number = Json::parse(y.text, nullptr, false);
  return number.is_number() ? number : Json(y.text);
}
}  // namespace

std::string to_json(const Yaml& y) {
  return json_of(y).dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
}

std::string quote_yaml(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    static constexpr char kHex[] = "0123456789abcdef";
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += '\\', out += c;
    else if (u < 0x20 || u == 0x7f)
      out += "\\x", out += kHex[u >> 4], out += kHex[u & 15];
    else
      out += c;
  }
  return out + '"';
}

}  // namespace kda
