// text/tokenizer.h — from text to token ids and back, as a Hugging Face tokenizer.json says.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

// BPE models with their normalizers, pre-tokenizers, added tokens, templates and decoders, with the meaning that
// Hugging Face `tokenizers` gives them. What is not supported is refused when the file is read, never ignored; the
// settings `padding` and `truncation`, which belong to a call on a batch and not to the text, are listed by notes()
// instead. Copies share one set of tables. All members may be called from any number of threads.
class Tokenizer {
 public:
  // A tokenizer.json, or a folder that holds one. Throws Error naming the file and the field.
  static Tokenizer load(const std::filesystem::path&);
  static Tokenizer from_json(std::string_view);

  // add_special: the template's tokens (such as <|begin_of_text|>) are put around the text. Added tokens that stand in
  // the text are recognised either way. Throws Error naming the first byte that is not UTF-8.
  std::vector<int32_t> encode(std::string_view text, bool add_special = true) const;

  // Valid UTF-8: bytes that make no character become U+FFFD. Ids without a token (a model's vocabulary may be padded)
  // give nothing, as in the reference. skip_special leaves special tokens out.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;

  int32_t vocabulary() const;  // one above the largest id that has a token
  // The view lives as long as any copy of the tokenizer.
  bool has_token(int32_t id) const;
  std::string_view id_to_token(int32_t id) const;     // empty for an id without a token
  int32_t token_to_id(std::string_view token) const;  // -1: none
  bool is_special(int32_t id) const;

  // Settings of the file that have no effect here, each with the reason.
  const std::vector<std::string>& notes() const;

 private:
  friend class StreamDecoder;
  struct Data;
  explicit Tokenizer(std::shared_ptr<const Data>);
  std::shared_ptr<const Data> data_;
};

// decode(), token by token: what push() and finish() return is, put together, decode() of all ids. Each piece is whole
// characters; what may still change is held back (an unfinished character, a run of <0xHH> tokens).
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer&, bool skip_special = false);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  std::string push(int32_t id);
  std::string finish();  // then ready for another text

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kda
