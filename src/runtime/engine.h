// runtime/engine.h — a loaded model and the forward passes of its sessions, alone or many at a time. What a session
// gets does not depend on which others run beside it.
//
// Not thread-safe: one caller at a time.
#pragma once
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "checkpoint/checkpoint.h"
#include "model/transformer.h"
#include "runtime/sampler.h"
#include "runtime/session.h"
#include "text/tokenizer.h"

namespace kda {

// stored: as in the files (on a GPU bf16, into which f32 and f16 are rounded); the others: made at load, one scale a row.
enum class WeightKind { stored, int8, fp8 };

// automatic: a GPU if this program has code for it, it answers and can do what is asked (precision exact is the CPU's
// alone, fp8 weights the GPU's); else the CPU.
enum class DeviceKind { automatic, cpu, cuda };

struct EngineOptions {
  DeviceKind device = DeviceKind::automatic;
  Precision precision = Precision::fast;
  int threads = 0;  // 0: one per core
  WeightKind weights = WeightKind::stored;
  std::filesystem::path weight_cache;  // int8 on the CPU: read from here when it fits the checkpoint, else written here
  int64_t block_tokens = 0;  // prompt tokens in one pass, bounds memory, changes results by rounding only; 0: 2048 (CPU), 8192
  // Decode batches are padded to this many sequences, so that a token's bits do not depend on how many run beside it
  // (on the CPU they never do). 0: to the next of a few sizes.
  int64_t fixed_batch = 0;
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
  // folder() and fingerprint() are empty, so its sessions cannot be saved. Runs on the CPU. Throws Error for int8 weights.
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
  const Backend& backend() const { return *ctx_.backend; }
  Context& context() { return ctx_; }

  // Makes room for this many sessions at once; without it room is made as they come, moving those that are there.
  void reserve_sessions(int64_t count);

  // Runs prompt tokens, packed together in blocks; leaves each session's next-token logits.
  // progress(done, total) is called after each block.
  void prefill(std::span<const Prompt>, const std::function<void(int64_t, int64_t)>& progress = {});
  // Runs each session's pending token, all in one pass; leaves the logits that choose the next.
  void decode(std::span<Session* const>);
  // Runs each session's pending token and draws the next one, which is then pending: where the logits are, if the
  // backend can do what `params` asks, else on the host. Like decode(), then sample() and push(), without the logits.
  // sequence: the sampler's number of each.
  struct Draw {
    Session* session;
    const SamplingParams* params;
    uint32_t sequence;
  };
  std::vector<Sampled> step(std::span<const Draw>);

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
  void ready(int64_t rows, int64_t sequences, int64_t tokens);
  Step pending_step(std::span<Session* const>, int64_t batch);
  void step_on_device(std::span<const Draw>, std::span<Sampled>);
  void fetch_logits(ConstView row, Session&);
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
  SamplerScratch scratch_;

  // The arrays of a decode step, kept because a Step only points at them.
  struct StepArrays {
    std::vector<int32_t> ids, start, slots, past;
  } arrays_;
  // What a step on a device keeps: logits, wishes and choices of its sequences, and the recorded passes by batch size.
  struct DeviceStep {
    int64_t sequences = 0;
    Tensor logits;  // f32 [sequences,vocabulary]
    Tensor rows;    // u8 [sequences * sizeof(SampleRow)]
    Tensor ids;     // i32 [sequences]
    Tensor workspace;
    struct Pass {
      bool warm = false;  // ran once: everything it loads on first use is there
      std::unique_ptr<Recorded> recorded;
    };
    std::map<int64_t, Pass> passes;
  } device_;
};

}  // namespace kda
