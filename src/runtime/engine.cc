#include "runtime/engine.h"

#include <algorithm>

#include "base/file.h"
#include "runtime/weight_cache.h"

namespace kda {

namespace {
// Logits of this many rows at a time when scoring: enough to pay for packing the head, 262 MB at a vocabulary of
// 128,004.
constexpr int64_t kLogitRows = 512;
}  // namespace

Engine::Engine(EngineOptions options) : options_(std::move(options)), pool_(options_.threads) {
  KDA_CHECK(options_.block_tokens >= 1, "block_tokens must be at least 1, got ", options_.block_tokens);
  ctx_.backend = &cpu_backend();
  ctx_.pool = &pool_;
  ctx_.precision = options_.precision;
}

Engine::Engine(const std::filesystem::path& folder, EngineOptions options) : Engine(std::move(options)) {
  folder_ = folder;
  Checkpoint checkpoint = load_checkpoint(folder);
  generation_ = checkpoint.generation;
  warnings_ = checkpoint.warnings;
  fingerprint_ = checkpoint.fingerprint;
  if (path_exists(folder / "tokenizer.json"))
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(folder / "tokenizer.json"));
  Weights weights = arrange_weights(checkpoint);
  if (options_.weights == WeightKind::int8)
    make_int8(ctx_, weights, fingerprint_, options_.weight_cache, options_.report);
  model_ = std::make_unique<Transformer>(std::move(weights));
}

Engine::Engine(Weights weights, const Tokenizer* tokenizer, GenerationDefaults generation, EngineOptions options)
    : Engine(std::move(options)) {
  // make_int8 hands the pages it has read back to the kernel: right for a mapped file, not for memory of others.
  KDA_CHECK(options_.weights == WeightKind::stored && options_.weight_cache.empty(),
            "int8 weights are made when a model folder is loaded; this model is in memory");
  generation_ = std::move(generation);
  if (tokenizer) tokenizer_ = std::make_unique<Tokenizer>(*tokenizer);
  model_ = std::make_unique<Transformer>(std::move(weights));
}

Engine::~Engine() = default;

void Engine::reserve_sessions(int64_t count) {
  if (!states_) states_ = std::make_unique<StatePool>(ctx_, config(), 0);
  const int64_t had = states_->slots();
  states_->reserve(ctx_, count, 0);
  for (int64_t s = states_->slots(); s-- > had;) free_slots_.push_back(int32_t(s));
}

int32_t Engine::take_slot() {
  // Half as many again, so that a state is moved a few times only however many sessions come.
  if (free_slots_.empty())
    reserve_sessions(states_ ? states_->slots() + std::max<int64_t>(1, states_->slots() / 2) : 1);
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

void Engine::free_slot(int32_t slot) {
  if (slot >= 0) free_slots_.push_back(slot);
}

void Engine::ready(int64_t rows, int64_t tokens) {
  states_->reserve(ctx_, 0, tokens);
  if (rows > buffers_.rows || states_->capacity() > buffers_.capacity) {
    rows = std::max(rows, buffers_.rows);
    buffers_ = {};  // before the larger ones, so that both never exist together
    buffers_ = plan_buffers(ctx_, weights(), rows, states_->capacity());
  }
}

void Engine::check_ids(std::span<const int32_t> ids) const {
  for (size_t i = 0; i < ids.size(); ++i)
    KDA_CHECK(ids[i] >= 0 && ids[i] < config().vocabulary, "token ", i, " of the prompt is id ", ids[i],
              ", outside the model's vocabulary of ", config().vocabulary);
}

void Engine::run_pending(std::span<const Prompt> prompts) {
  std::vector<Session*> pending;
  for (const Prompt& p : prompts)
    if (p.session->pending()) pending.push_back(p.session);
  if (!pending.empty()) decode(pending);
}

void Engine::prefill(std::span<const Prompt> prompts, const std::function<void(int64_t, int64_t)>& progress) {
  int64_t total = 0, longest = 0;
  for (const Prompt& p : prompts) {
    check_ids(p.ids);
    KDA_CHECK(!p.ids.empty() || !p.session->tokens().empty(),
              "an empty prompt: the model needs at least one token to start from");
    total += int64_t(p.ids.size());
    longest = std::max(longest, int64_t(p.session->tokens().size() + p.ids.size()));
  }
  run_pending(prompts);
  if (!total) return;
  for (const Prompt& p : prompts)
    if (p.session->slot_ < 0) p.session->slot_ = take_slot();
  ready(std::min(std::max(total, int64_t(prompts.size())), options_.block_tokens), longest);

  std::vector<int64_t> done(prompts.size(), 0);
  int64_t finished = 0;
  for (size_t first = 0; first < prompts.size();) {
    std::vector<int32_t> ids, start{0}, slot_in, slot_out, past, last_row;
    std::vector<size_t> who;
    for (size_t i = first; i < prompts.size() && int64_t(ids.size()) < options_.block_tokens; ++i) {
      const Prompt& p = prompts[i];
      const int64_t take = std::min(int64_t(p.ids.size()) - done[i], options_.block_tokens - int64_t(ids.size()));
      if (take <= 0) continue;
      ids.insert(ids.end(), p.ids.begin() + done[i], p.ids.begin() + done[i] + take);
      start.push_back(int32_t(ids.size()));
      slot_in.push_back(p.session->processed_ ? p.session->slot_ : -1);
      slot_out.push_back(p.session->slot_);
      past.push_back(int32_t(p.session->processed_));
      who.push_back(i);
      done[i] += take;
      if (done[i] == int64_t(p.ids.size()))
        last_row.push_back(int32_t(ids.size()) - 1);
      else
        last_row.push_back(-1);
    }
    if (who.empty()) break;
    model_->prefill(ctx_, buffers_, *states_, {ids, start, slot_in, slot_out, past});
    finished += int64_t(ids.size());
    std::vector<int32_t> rows;
    std::vector<Session*> ended;
    for (size_t j = 0; j < who.size(); ++j) {
      Session& s = *prompts[who[j]].session;
      const auto from = ids.begin() + start[j], to = ids.begin() + start[j + 1];
      s.tokens_.insert(s.tokens_.end(), from, to);
      s.processed_ += to - from;
      s.prompt_length_ = int64_t(s.tokens_.size());
      s.logits_.clear();
      if (last_row[j] >= 0) {
        rows.push_back(last_row[j]);
        ended.push_back(&s);
      }
    }
    choose(rows, ended);
    while (first < prompts.size() && done[first] == int64_t(prompts[first].ids.size())) ++first;
    if (progress) progress(finished, total);
  }
}

void Engine::choose(std::span<const int32_t> rows, std::span<Session* const> sessions) {
  if (rows.empty()) return;
  const int64_t R = int64_t(rows.size()), V = config().vocabulary;
  const Tensor logits = host_tensor(Dtype::f32, {R, V});
  model_->choose_logits(ctx_, buffers_, rows, logits);
  const float* p = logits.v.as<float>();
  for (int64_t r = 0; r < R; ++r) sessions[size_t(r)]->logits_.assign(p + r * V, p + (r + 1) * V);
}

void Engine::decode(std::span<Session* const> sessions) {
  if (sessions.empty()) return;
  const size_t N = sessions.size();
  std::vector<int32_t> ids, start{0}, slots, past, rows;
  int64_t longest = 0;
  for (size_t n = 0; n < N; ++n) {
    const Session& s = *sessions[n];
    KDA_CHECK(s.pending(), "decode: session ", n, " has no pending token");
    KDA_CHECK(s.processed_ > 0, "decode: session ", n, " has no prompt");
    ids.push_back(s.tokens_[size_t(s.processed_)]);
    start.push_back(int32_t(n) + 1);
    slots.push_back(s.slot_);
    past.push_back(int32_t(s.processed_));
    rows.push_back(int32_t(n));
    longest = std::max(longest, int64_t(s.tokens_.size()));
  }
  ready(int64_t(N), longest);
  model_->decode(ctx_, buffers_, *states_, {ids, start, slots, slots, past});
  for (Session* s : sessions) ++s->processed_;
  choose(rows, sessions);
}

void Engine::score(Session& s, std::span<const int32_t> ids, const OnLogits& on_logits, const OnHidden& hidden) {
  check_ids(ids);
  KDA_CHECK(!s.pending(), "score: the session has a pending token");
  if (ids.empty()) return;
  if (s.slot_ < 0) s.slot_ = take_slot();
  const int64_t total = int64_t(ids.size()), V = config().vocabulary, L = int64_t(config().layers.size());
  ready(std::min(total, options_.block_tokens), int64_t(s.tokens_.size()) + total);
  const Tensor logits = on_logits ? host_tensor(Dtype::f32, {std::min(kLogitRows, buffers_.rows), V}) : Tensor{};
  for (int64_t first = 0; first < total;) {
    const int64_t T = std::min(total - first, options_.block_tokens);
    const auto block = ids.subspan(size_t(first), size_t(T));
    const int32_t start[] = {0, int32_t(T)}, in[] = {s.processed_ ? s.slot_ : -1}, out[] = {s.slot_},
                  past[] = {int32_t(s.processed_)};
    std::vector<Tensor> kept;
    std::vector<Tap> taps;
    for (int64_t l = 0; hidden && l <= L; ++l) {
      kept.push_back(host_tensor(Dtype::f32, {T, config().width}));
      taps.push_back({l - 1, TapPoint::layer_out, kept.back()});
    }
    model_->prefill(ctx_, buffers_, *states_, {block, start, in, out, past}, taps);
    for (int64_t l = 0; hidden && l <= L; ++l) hidden(first, l, kept[size_t(l)]);
    for (int64_t r = 0; on_logits && r < T; r += kLogitRows) {
      const View rows = view(logits.v.as<float>(), {std::min(kLogitRows, T - r), V});
      model_->score_logits(ctx_, buffers_, r, rows);
      on_logits(first + r, rows);
    }
    s.tokens_.insert(s.tokens_.end(), block.begin(), block.end());
    s.processed_ += T;
    s.prompt_length_ = int64_t(s.tokens_.size());
    s.logits_.clear();
    first += T;
  }
}

}  // namespace kda
