// runtime/engine.h — a loaded model and the forward passes of its sessions, alone or many at a time. What a session
// gets does not depend on which others run beside it.
//
// Not thread-safe: one caller at a time.
#pragma once
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "checkpoint/checkpoint.h"
#include "model/transformer.h"
#include "runtime/session.h"
#include "text/tokenizer.h"

namespace kda {

enum class WeightKind { stored, int8 };

struct EngineOptions {
  Precision precision = Precision::fast;
  int threads = 0;  // 0: one per core
  WeightKind weights = WeightKind::stored;
  std::filesystem::path weight_cache;  // int8 only: read from here when it fits the checkpoint, else written here
  int64_t block_tokens = 2048;         // prompt tokens in one pass: bounds memory, changes results by rounding only
  std::function<void(const std::string&)> report;  // lines about slow parts of loading
};

struct Prompt {
  Session* session;
  std::span<const int32_t> ids;
};

class Engine {
 public:
  // Loads a checkpoint folder. Throws Error.
  explicit Engine(const std::filesystem::path& folder, EngineOptions = {});
  // A model that is in memory already, such as one in training: its tensors are shared, never copied, and may change
  // between calls, after which only new sessions make sense. tokenizer: copied (its tables are shared), or null.
  // folder() and fingerprint() are empty, so its sessions cannot be saved. Throws Error for int8 weights.
  Engine(Weights, const Tokenizer* tokenizer, GenerationDefaults, EngineOptions = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const std::filesystem::path& folder() const { return folder_; }
  const ModelConfig& config() const { return model_->config(); }
  const Weights& weights() const { return model_->weights(); }
  const GenerationDefaults& generation() const { return generation_; }
  const std::vector<std::string>& warnings() const { return warnings_; }
  const std::string& fingerprint() const { return fingerprint_; }
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }  // null when the folder has no tokenizer.json
  ThreadPool& threads() { return pool_; }
  const EngineOptions& options() const { return options_; }
  int64_t state_bytes() const { return states_ ? states_->bytes() : 0; }

  // Makes room for this many sessions at once; without it room is made as they come, moving those that are there.
  void reserve_sessions(int64_t count);

  // Runs prompt tokens, packed together in blocks; leaves each session's next-token logits.
  // progress(done, total) is called after each block.
  void prefill(std::span<const Prompt>, const std::function<void(int64_t, int64_t)>& progress = {});
  // Runs each session's pending token, all in one pass.
  void decode(std::span<Session* const>);

  // Runs known text and hands out the logits of every position, `rows` at a time: row r is what follows token
  // first + r of `ids`. hidden, if given, receives the residual stream [rows,D] of every layer of a block of tokens:
  // layer 0 is the embedding, layer L follows layer L, before the final norm.
  using OnLogits = std::function<void(int64_t first, ConstView logits)>;
  using OnHidden = std::function<void(int64_t first, int64_t layer, ConstView rows)>;
  void score(Session&, std::span<const int32_t> ids, const OnLogits&, const OnHidden& hidden = {});

 private:
  friend class Session;
  explicit Engine(EngineOptions);  // without a model yet
  int32_t take_slot();
  void free_slot(int32_t);
  void ready(int64_t rows, int64_t tokens);
  void run_pending(std::span<const Prompt>);
  void choose(std::span<const int32_t> rows, std::span<Session* const>);
  void check_ids(std::span<const int32_t>) const;

  std::filesystem::path folder_;
  EngineOptions options_;
  ThreadPool pool_;
  Context ctx_;
  GenerationDefaults generation_;
  std::vector<std::string> warnings_;
  std::string fingerprint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<StatePool> states_;
  std::vector<int32_t> free_slots_;
  Buffers buffers_;
};

}  // namespace kda
