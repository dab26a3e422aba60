#include "text/tokenizer.h"

#include <simdjson.h>

#include <algorithm>
#include <mutex>
#include <optional>

#include "base/file.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/json.h"
#include "text/normalizer.h"
#include "text/post_processor.h"
#include "text/pre_tokenizer.h"
#include "text/utf8.h"

namespace kda {
namespace {

using namespace text;

constexpr size_t kLargestFile = size_t(512) << 20;

// What one call of encode() or decode() writes to.
struct Scratch {
  RegexScratch regex;
  Bpe::Scratch bpe;
  Pieces pieces;
  std::vector<Section> raw, normalized;
};

// Scratches lie here between calls, so that each call finds the words that an earlier one has looked up, and no two
// threads ever share one.
class ScratchPool {
 public:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    auto s = std::move(free_.back());
    free_.pop_back();
    return s;
  }
  void give(std::unique_ptr<Scratch> s) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < kMost) free_.push_back(std::move(s));
  }

 private:
  static constexpr size_t kMost = 64;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

class Borrowed {
 public:
  explicit Borrowed(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
  ~Borrowed() { pool_.give(std::move(scratch_)); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Scratch& operator*() const { return *scratch_; }
  Scratch* operator->() const { return scratch_.get(); }

 private:
  ScratchPool& pool_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace

struct Tokenizer::Data {
  std::optional<Bpe> bpe;
  Normalizer normalizer;
  PreTokenizers pre_tokenizers;
  AddedTokens added;
  PostProcessor post_processor;
  Decoder decoder;
  std::vector<bool> special;  // by id
  int32_t vocabulary = 0;
  std::vector<std::string> notes;
  mutable ScratchPool pool;

  explicit Data(Json root);
  void encode_section(std::string_view, bool at_start, Scratch&, std::vector<int32_t>& out) const;
  void encode_words(std::string_view, bool at_start, Scratch&, std::vector<int32_t>& out) const;
  std::string_view token(int32_t id) const {
    const AddedToken* t = added.by_id(id);
    return t ? std::string_view(t->content) : bpe->vocabulary().token(id);
  }
  std::string_view decoded(int32_t id) const {
    const AddedToken* t = added.by_id(id);
    return t ? std::string_view(t->decoded) : bpe->vocabulary().token(id);
  }
  bool has(int32_t id) const { return added.by_id(id) || bpe->vocabulary().has(id); }
  bool dropped(int32_t id, bool skip_special) const {
    return !has(id) || (skip_special && special[static_cast<size_t>(id)]);
  }
};

Tokenizer::Data::Data(Json root) {
  const std::string_view where = "the file";
  if (const auto version = find(root, "version", where)) {
    KDA_CHECK(json_string(*version, "version") == "1.0", "tokenizer: version must be \"1.0\", is \"",
              json_string(*version, "version"), '"');
  }
  for (const char* key : {"truncation", "padding"})
    if (find(root, key, where))
      notes.push_back(cat("tokenizer: `", key, "` is not applied: it is a setting of calls on a batch"));
  bpe.emplace(need(root, "model", where));
  if (const auto j = find(root, "normalizer", where)) normalizer = Normalizer(*j);
  if (const auto j = find(root, "pre_tokenizer", where)) pre_tokenizers = parse_pre_tokenizer(*j);
  RegexScratch scratch;
  if (const auto j = find(root, "added_tokens", where)) added = AddedTokens(*j, bpe->vocabulary(), normalizer, scratch);
  vocabulary = bpe->vocabulary().end();
  for (const AddedToken& t : added.all()) vocabulary = std::max(vocabulary, t.id + 1);
  special.resize(static_cast<size_t>(vocabulary));
  for (const AddedToken& t : added.all()) special[static_cast<size_t>(t.id)] = t.special;
  if (const auto j = find(root, "post_processor", where)) {
    std::vector<bool> known(static_cast<size_t>(vocabulary));
    for (int32_t id = 0; id < vocabulary; ++id) known[static_cast<size_t>(id)] = has(id);
    post_processor = PostProcessor(*j, known);
  }
  if (const auto j = find(root, "decoder", where)) decoder = Decoder(*j);
}

// A stretch without the added tokens that are looked for in the text as it came.
void Tokenizer::Data::encode_section(std::string_view s, bool at_start, Scratch& scratch,
                                     std::vector<int32_t>& out) const {
  std::string own;
  if (!normalizer.empty()) {
    own = normalizer.apply(std::string(s), at_start, scratch.regex);
    s = own;
  }
  if (!added.any(true)) return encode_words(s, at_start, scratch, out);
  scratch.normalized.clear();
  added.split(s, true, scratch.normalized);
  for (const Section& n : scratch.normalized) {
    if (n.id >= 0)
      out.push_back(n.id);
    else
      encode_words(s.substr(n.begin, n.end - n.begin), at_start && n.begin == 0, scratch, out);
  }
}

void Tokenizer::Data::encode_words(std::string_view s, bool at_start, Scratch& scratch,
                                   std::vector<int32_t>& out) const {
  if (s.empty()) return;
  Pieces& p = scratch.pieces;
  p.text = s;
  p.ranges.assign(1, {0, s.size()});
  p.original = s.size();
  p.at_start = at_start;
  for (const auto& step : pre_tokenizers.steps) step->apply(p, scratch.regex);
  for (const auto& r : p.ranges)
    bpe->encode(p.text.substr(r.begin, r.end - r.begin), pre_tokenizers.bytes_last, scratch.bpe, out);
}

Tokenizer::Tokenizer(std::shared_ptr<const Data> data) : data_(std::move(data)) {}

Tokenizer Tokenizer::from_json(std::string_view json) {
  KDA_CHECK(json.size() <= kLargestFile, "tokenizer: ", json.size(), " bytes, at most ", kLargestFile);
  simdjson::dom::parser parser;
  Json root;
  const auto error = parser.parse(json.data(), json.size(), true).get(root);
  KDA_CHECK(!error, "tokenizer: not JSON: ", simdjson::error_message(error));
  return Tokenizer(std::make_shared<const Data>(root));
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  std::error_code ignored;
  const auto file = std::filesystem::is_directory(path, ignored) ? path / "tokenizer.json" : path;
  const std::string json = read_file(file, kLargestFile);
  try {
    return from_json(json);
  } catch (const Error& e) {
    throw Error(cat(file.string(), ": ", e.what()));
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  if (const size_t at = utf8_invalid_at(text); at != std::string_view::npos)
    throw Error(cat("text: byte ", at, " of ", text.size(), " is not part of a UTF-8 character"));
  const Data& d = *data_;
  const Borrowed scratch(d.pool);
  std::vector<int32_t> out;
  out.reserve(text.size() / 4 + 16);
  scratch->raw.clear();
  d.added.split(text, false, scratch->raw);
  for (const Section& s : scratch->raw) {
    if (s.id >= 0)
      out.push_back(s.id);
    else
      d.encode_section(text.substr(s.begin, s.end - s.begin), s.begin == 0, *scratch, out);
  }
  return add_special ? d.post_processor.apply(std::move(out)) : out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  const Data& d = *data_;
  std::vector<std::string_view> tokens;
  tokens.reserve(ids.size());
  for (int32_t id : ids)
    if (!d.dropped(id, skip_special)) tokens.push_back(d.decoded(id));
  const Borrowed scratch(d.pool);
  return d.decoder.decode(tokens, scratch->regex);
}

int32_t Tokenizer::vocabulary() const { return data_->vocabulary; }
bool Tokenizer::has_token(int32_t id) const { return data_->has(id); }
std::string_view Tokenizer::id_to_token(int32_t id) const { return data_->token(id); }
int32_t Tokenizer::token_to_id(std::string_view token) const {
  const AddedToken* t = data_->added.by_content(token);
  return t ? t->id : data_->bpe->vocabulary().find(token);
}
bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < data_->vocabulary && data_->special[static_cast<size_t>(id)];
}
const std::vector<std::string>& Tokenizer::notes() const { return data_->notes; }

struct StreamDecoder::State {
  std::shared_ptr<const Tokenizer::Data> data;
  bool skip_special;
  Decoder::Stream stream;
  State(std::shared_ptr<const Tokenizer::Data> d, bool skip)
      : data(std::move(d)), skip_special(skip), stream(data->decoder) {}
};

StreamDecoder::StreamDecoder(const Tokenizer& t, bool skip_special)
    : state_(std::make_unique<State>(t.data_, skip_special)) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(int32_t id) {
  State& s = *state_;
  return s.data->dropped(id, s.skip_special) ? std::string() : s.stream.push(s.data->decoded(id));
}

std::string StreamDecoder::finish() { return state_->stream.finish(); }

}  // namespace kda
