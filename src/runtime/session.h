// runtime/session.h — one conversation: its tokens, and what the model remembers of them. Cheap to fork and to save:
// for KDA layers the state has one size at any length. A session must not outlive its engine.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "base/error.h"

namespace kda {

class Engine;

class Session {
 public:
  explicit Session(Engine&);
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  // Every token so far. The last one may be generated and not yet run through the model (pending()).
  const std::vector<int32_t>& tokens() const { return tokens_; }
  // Tokens before this one were given; penalties over generated tokens start here.
  int64_t prompt_length() const { return prompt_length_; }
  bool pending() const { return int64_t(tokens_.size()) > processed_; }
  // Logits [vocabulary] that choose the next token; empty before the first token and while one is pending.
  std::span<const float> logits() const { return logits_; }

  // Adds a generated token; Engine::decode runs it.
  void push(int32_t id);
  // A second conversation with the same past.
  Session fork() const;

  // A safetensors file: tokens, logits, and per layer S [H,V,K], window [3,2HK+HV] (q|k|v, oldest first) or keys and values
  // [tokens,G,d]; all f32. restore() refuses a file of another model (by the checkpoint's fingerprint) or layout.
  void save(const std::filesystem::path&) const;
  static Session restore(Engine&, const std::filesystem::path&);

  // S [H,V,K] of a KDA layer after all processed tokens, on the host; empty for a full-attention layer.
  std::vector<float> kda_state(int64_t layer) const;

 private:
  friend class Engine;
  Engine* engine_;
  int32_t slot_ = -1;
  std::vector<int32_t> tokens_;
  int64_t processed_ = 0;
  int64_t prompt_length_ = 0;
  std::vector<float> logits_;
};

}  // namespace kda
