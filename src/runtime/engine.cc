#include "runtime/engine.h"

#include <algorithm>

#include "base/file.h"
#include "kernels/sample.h"
#include "model/upload.h"
#include "runtime/weight_cache.h"

namespace kda {

namespace {
// Logits of this many rows at a time when scoring: enough to pay for packing the head, 262 MB at a vocabulary of
// 128,004.
constexpr int64_t kLogitRows = 512;
// Logits that choose next tokens are computed for this many sequences at a time.
constexpr int64_t kChooseRows = 64;

const Backend& backend_for(const EngineOptions& o) {
  if (o.device == DeviceKind::cpu) return cpu_backend();
  const Backend* const gpu = cuda_backend();
  const bool fits = o.precision == Precision::fast;
  if (o.device == DeviceKind::automatic) return gpu && fits && gpu->unavailable().empty() ? *gpu : cpu_backend();
  KDA_CHECK(gpu, "device cuda: this program was built without CUDA (configure with KDA_CUDA=ON, preset `cuda`)");
  KDA_CHECK(fits, "device cuda: precision exact (fp32 products) is the CPU's alone; the GPU has fast (bf16)");
  const std::string why = gpu->unavailable();
  KDA_CHECK(why.empty(), "device cuda: ", why);
  return *gpu;
}

bool is_cpu(const Context& ctx) { return ctx.backend == &cpu_backend(); }

// Batches that decode passes are made for: a sequence more or less then rarely needs a new one.
int64_t batch_size(int64_t n) {
  for (const int64_t b : {1, 2, 4, 8, 16, 24, 32, 48, 64})
    if (n <= b) return b;
  return (n + 63) / 64 * 64;
}

// Whether the backend's sampler can do all that is asked.
bool device_draws(const SamplingParams& p) {
  return p.logprobs < 0 && p.typical_p == 1 && p.repetition_penalty == 1 && p.presence_penalty == 0 &&
         p.frequency_penalty == 0 && p.no_repeat_ngram_size == 0 && p.min_new_tokens == 0 && p.logit_bias.empty();
}
}  // namespace

Engine::Engine(EngineOptions options) : options_(std::move(options)), pool_(options_.threads) {
  KDA_CHECK(options_.block_tokens >= 0, "block_tokens must be at least 1, got ", options_.block_tokens);
  ctx_.backend = &backend_for(options_);
  ctx_.pool = &pool_;
  ctx_.precision = options_.precision;
  ctx_.backend->open(ctx_);
  if (options_.block_tokens == 0) options_.block_tokens = is_cpu(ctx_) ? 2048 : 8192;
  KDA_CHECK(options_.weights != WeightKind::fp8 || !is_cpu(ctx_), "weights fp8 need a GPU; on the CPU there is int8");
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
  if (!is_cpu(ctx_)) {
    KDA_CHECK(options_.weight_cache.empty(), "a weight cache is for int8 on the CPU: on a GPU the weights are converted as they are loaded");
    const WeightFormat format = options_.weights == WeightKind::int8  ? WeightFormat::i8
                                : options_.weights == WeightKind::fp8 ? WeightFormat::f8
                                                                      : WeightFormat::bf16;
    weights = upload_weights(ctx_, std::move(weights), format, options_.report);
  } else if (options_.weights == WeightKind::int8) {
    make_int8(ctx_, weights, fingerprint_, options_.weight_cache, options_.report);
  }
  model_ = std::make_unique<Transformer>(ctx_, std::move(weights));
}

Engine::Engine(Weights weights, const Tokenizer* tokenizer, GenerationDefaults generation, EngineOptions options)
    : Engine([&] {
        KDA_CHECK(options.device != DeviceKind::cuda, "a model in host memory runs on the CPU");
        options.device = DeviceKind::cpu;
        return std::move(options);
      }()) {
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
  if (states_->slots() != had) device_.passes.clear();  // they go by the old pools' memory
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

void Engine::ready(int64_t rows, int64_t sequences, int64_t tokens) {
  const bool grows = std::any_of(config().layers.begin(), config().layers.end(),
                                 [](const LayerSpec& l) { return l.mixer == Mixer::full; });
  const int64_t slots = states_->slots(), capacity = states_->capacity();
  if (grows) states_->reserve(ctx_, 0, tokens);
  if (states_->slots() != slots || states_->capacity() != capacity) device_.passes.clear();
  if (rows > buffers_.rows || sequences > buffers_.sequences || states_->capacity() > buffers_.capacity) {
    rows = std::max(rows, buffers_.rows);
    sequences = std::max(sequences, buffers_.sequences);
    device_.passes.clear();
    buffers_ = {};  // before the larger ones, so that both never exist together
    buffers_ = plan_buffers(ctx_, weights(), rows, sequences, states_->capacity());
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
  ready(std::min(std::max(total, int64_t(prompts.size())), options_.block_tokens), int64_t(prompts.size()), longest);

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
  const int64_t V = config().vocabulary;
  for (size_t first = 0; first < rows.size(); first += kChooseRows) {
    const int64_t R = std::min<int64_t>(kChooseRows, int64_t(rows.size() - first));
    Tensor own;
    View logits;
    if (device_.logits && device_.logits.shape()[0] >= R)
      logits = {device_.logits.v.data, Dtype::f32, {R, V}};
    else
      logits = own = ctx_.backend->alloc(Dtype::f32, {R, V});
    model_->choose_logits(ctx_, buffers_, rows.subspan(first, size_t(R)), logits);
    for (int64_t r = 0; r < R; ++r)
      fetch_logits({logits.as<float>() + r * V, Dtype::f32, {V}}, *sessions[first + size_t(r)]);
  }
}

void Engine::fetch_logits(ConstView row, Session& s) {
  s.logits_.resize(size_t(row.size()));
  ctx_.backend->copy(ctx_, s.logits_.data(), row.data, row.bytes());
}

// The arrays of one token for each session, padded to `batch` with places that nobody uses.
Step Engine::pending_step(std::span<Session* const> sessions, int64_t batch) {
  StepArrays& a = arrays_;
  a.ids.assign(size_t(batch), 0);
  a.slots.assign(size_t(batch), -1);
  a.past.assign(size_t(batch), 0);
  a.start.resize(size_t(batch) + 1);
  for (size_t n = 0; n < a.start.size(); ++n) a.start[n] = int32_t(n);
  int64_t longest = 0;
  for (size_t n = 0; n < sessions.size(); ++n) {
    const Session& s = *sessions[n];
    KDA_CHECK(s.pending(), "decode: session ", n, " has no pending token");
    KDA_CHECK(s.processed_ > 0, "decode: session ", n, " has no prompt");
    a.ids[n] = s.tokens_[size_t(s.processed_)];
    a.slots[n] = s.slot_;
    a.past[n] = int32_t(s.processed_);
    longest = std::max(longest, int64_t(s.tokens_.size()));
  }
  ready(batch, batch, longest);
  return {a.ids, a.start, a.slots, a.slots, a.past};
}

void Engine::decode(std::span<Session* const> sessions) {
  if (sessions.empty()) return;
  const Step step = pending_step(sessions, int64_t(sessions.size()));
  model_->decode(ctx_, buffers_, *states_, step);
  std::vector<int32_t> rows;
  for (size_t n = 0; n < sessions.size(); ++n) {
    ++sessions[n]->processed_;
    rows.push_back(int32_t(n));
  }
  choose(rows, sessions);
}

std::vector<Sampled> Engine::step(std::span<const Draw> draws) {
  std::vector<Sampled> out(draws.size());
  if (draws.empty()) return out;
  const auto draw_here = [&](size_t n) {
    const Draw& d = draws[n];
    out[n] = sample(*d.params, d.session->logits(), d.session->tokens(), d.session->prompt_length(), d.sequence, scratch_);
  };
  if (ctx_.backend->sample) {
    step_on_device(draws, out);
    for (size_t n = 0; n < draws.size(); ++n)
      if (!draws[n].session->logits_.empty()) draw_here(n);
  } else {
    std::vector<Session*> sessions;
    for (const Draw& d : draws) sessions.push_back(d.session);
    decode(sessions);
    for (size_t n = 0; n < draws.size(); ++n) draw_here(n);
  }
  for (size_t n = 0; n < draws.size(); ++n) draws[n].session->push(out[n].id);
  return out;
}

// Draws what the backend can; leaves logits in the sessions of the others.
void Engine::step_on_device(std::span<const Draw> draws, std::span<Sampled> out) {
  const int64_t N = int64_t(draws.size()), V = config().vocabulary;
  KDA_CHECK(options_.fixed_batch == 0 || N <= options_.fixed_batch, "decode: ", N, " sequences, fixed_batch is ",
            options_.fixed_batch);
  const int64_t B = options_.fixed_batch ? options_.fixed_batch : batch_size(N);
  std::vector<Session*> sessions;
  for (const Draw& d : draws) sessions.push_back(d.session);
  const Step step = pending_step(sessions, B);
  DeviceStep& d = device_;
  if (d.sequences < B) {
    const auto alloc = ctx_.backend->alloc;
    d.passes.clear();
    d.logits = {};
    d.sequences = B;
    d.logits = alloc(Dtype::f32, {B, V});
    d.rows = alloc(Dtype::u8, {B * int64_t(sizeof(SampleRow))});
    d.ids = alloc(Dtype::i32, {B});
    d.workspace = alloc(Dtype::u8, {int64_t(sample_workspace_bytes(ctx_, B, V))});
  }
  std::vector<SampleRow> rows(size_t(B), SampleRow{.temperature = 0, .top_p = 1, .min_p = 0, .top_k = 0, .seed = 0,
                                                   .sequence = 0, .position = 0});
  for (size_t n = 0; n < draws.size(); ++n) {
    const SamplingParams& p = *draws[n].params;
    if (!device_draws(p) || greedy(p)) continue;
    rows[n] = {.temperature = float(p.temperature),
               .top_p = float(p.top_p),
               .min_p = float(p.min_p),
               .top_k = int32_t(std::clamp<int64_t>(p.top_k, 0, V)),
               .seed = p.seed,
               .sequence = draws[n].sequence,
               .position = uint32_t(draws[n].session->tokens().size())};
  }
  model_->decode_arrays(ctx_, buffers_, step);
  ctx_.backend->copy(ctx_, d.rows.v.data, rows.data(), rows.size() * sizeof(SampleRow));
  const View logits{d.logits.v.data, Dtype::f32, {B, V}};
  const auto pass = [&] {
    model_->decode_pass(ctx_, buffers_, *states_, B);
    model_->choose_logits(ctx_, buffers_, {}, logits);
    ctx_.workspace = d.workspace;
    kda::sample(ctx_, {.logits = logits, .rows = static_cast<const SampleRow*>(d.rows.v.data), .ids = d.ids.v.as<int32_t>()});
  };
  DeviceStep::Pass& p = d.passes[B];
  if (p.warm && !p.recorded && ctx_.backend->record) p.recorded = ctx_.backend->record(ctx_, pass);
  p.recorded ? p.recorded->run(ctx_) : pass();
  p.warm = true;
  std::vector<int32_t> ids(static_cast<size_t>(B));
  ctx_.backend->copy(ctx_, ids.data(), d.ids.v.data, ids.size() * sizeof(int32_t));
  for (size_t n = 0; n < draws.size(); ++n) {
    Session& s = *draws[n].session;
    ++s.processed_;
    if (!device_draws(*draws[n].params)) {
      fetch_logits({logits.as<float>() + int64_t(n) * V, Dtype::f32, {V}}, s);
      continue;
    }
    KDA_CHECK(ids[n] >= 0, "the logits of sequence ", draws[n].sequence, " after token ", s.processed_,
              " hold a NaN or an infinity, or nothing above minus infinity");
    out[n].id = ids[n];
  }
}

void Engine::score(Session& s, std::span<const int32_t> ids, const OnLogits& on_logits, const OnHidden& hidden) {
  check_ids(ids);
  KDA_CHECK(!s.pending(), "score: the session has a pending token");
  if (ids.empty()) return;
  if (s.slot_ < 0) s.slot_ = take_slot();
  const int64_t total = int64_t(ids.size()), V = config().vocabulary, L = int64_t(config().layers.size());
  ready(std::min(total, options_.block_tokens), 1, int64_t(s.tokens_.size()) + total);
  const Shape some_rows{std::min(kLogitRows, buffers_.rows), V};
  const Tensor logits = on_logits ? ctx_.backend->alloc(Dtype::f32, some_rows) : Tensor{};
  const Tensor here = !on_logits || is_cpu(ctx_) ? logits : host_tensor(Dtype::f32, some_rows);
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
      if (here.v.data != logits.v.data) ctx_.backend->copy(ctx_, here.v.data, rows.data, rows.bytes());
      on_logits(first + r, {here.v.data, Dtype::f32, rows.shape});
    }
    s.tokens_.insert(s.tokens_.end(), block.begin(), block.end());
    s.processed_ += T;
    s.prompt_length_ = int64_t(s.tokens_.size());
    s.logits_.clear();
    first += T;
  }
}

}  // namespace kda
