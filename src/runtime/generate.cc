#include "runtime/generate.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "runtime/stop.h"
#include "text/utf8.h"

namespace kda {

namespace {

double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

// One sequence being generated.
struct Running {
  size_t index = 0;  // of the result, and the sampler's sequence number
  SamplingParams params;
  Session* session = nullptr;
  std::unique_ptr<StreamDecoder> decoder;
  StopMatcher stops{{}};
  bool done = false;
  bool drawn = false;  // `next` is this sequence's next token, pushed already
  Sampled next;
};

}  // namespace

std::vector<int32_t> end_ids(const Engine& e) {
  return e.generation().eos.empty() ? e.config().eos : e.generation().eos;
}

std::vector<Generated> generate(Engine& engine, const std::vector<GenerationRequest>& requests,
                                const GenerationCallbacks& callbacks, std::vector<Session>* sessions,
                                GenerationTimes* times) {
  std::vector<Session> own;
  std::vector<Session>& all = sessions ? *sessions : own;
  KDA_CHECK(all.empty() || all.size() == requests.size(), "generate: ", all.size(), " sessions for ", requests.size(), " requests");
  size_t count = 0;
  for (const GenerationRequest& r : requests) {
    validate(r.params, engine.config().vocabulary);
    KDA_CHECK(r.samples >= 1, "generate: samples must be at least 1, got ", r.samples);
    KDA_CHECK(r.params.stop.empty() || engine.tokenizer(), "stop strings need a tokenizer, and this model folder has none");
    for (const std::string& stop : r.params.stop) {
      const size_t at = text::utf8_invalid_at(stop);
      KDA_CHECK(at == std::string::npos, "a stop string must be UTF-8, and could never match otherwise; byte ", at, " is not");
    }
    count += size_t(r.samples);
  }
  GenerationTimes t;
  const auto begin = std::chrono::steady_clock::now();

  std::vector<Session> first = std::move(all);
  while (first.size() < requests.size()) first.emplace_back(engine);
  std::vector<Prompt> prompts;
  for (size_t i = 0; i < requests.size(); ++i) {
    prompts.push_back({&first[i], requests[i].prompt});
    t.prompt_tokens += int64_t(requests[i].prompt.size());
  }
  engine.reserve_sessions(int64_t(count));
  engine.prefill(prompts, callbacks.on_prompt);
  all.clear();
  all.reserve(count);
  std::vector<Generated> results(count);
  std::vector<Running> running(count);
  const std::vector<int32_t> ends = end_ids(engine);
  for (size_t i = 0; i < requests.size(); ++i) {
    for (int s = 0; s < requests[i].samples; ++s) {
      const size_t n = all.size();
      all.push_back(s + 1 < requests[i].samples ? first[i].fork() : std::move(first[i]));
      results[n].request = i;
      running[n].index = n;
      running[n].params = requests[i].params;
      if (running[n].params.eos_ids.empty()) running[n].params.eos_ids = ends;
      running[n].stops = StopMatcher(requests[i].params.stop);
      if (engine.tokenizer()) running[n].decoder = std::make_unique<StreamDecoder>(*engine.tokenizer(), true);
    }
  }
  for (size_t n = 0; n < count; ++n) running[n].session = &all[n];
  t.prompt_s = seconds_since(begin);
  const auto generating = std::chrono::steady_clock::now();

  const auto emit = [&](Running& r, const std::string& text) {
    if (text.empty()) return;
    results[r.index].text += text;
    if (callbacks.on_text) callbacks.on_text(r.index, text);
  };
  const auto finish = [&](Running& r, const char* reason) {
    if (r.decoder && !r.stops.stopped()) {
      emit(r, r.stops.push(r.decoder->finish()));
      if (!r.stops.stopped()) emit(r, r.stops.finish());
    }
    if (r.stops.stopped()) results[r.index].stop = r.params.stop[size_t(r.stops.hit())];
    results[r.index].finish_reason = r.stops.stopped() ? "stop" : reason;
    r.done = true;
  };

  SamplerScratch scratch;
  std::vector<Engine::Draw> pending;
  std::vector<Running*> whose;
  for (;;) {
    const bool cancelled = callbacks.cancelled && callbacks.cancelled();
    pending.clear();
    whose.clear();
    for (Running& r : running) {
      if (r.done) continue;
      Generated& g = results[r.index];
      const SamplingParams& p = r.params;
      const auto go_on = [&] {
        if (cancelled) return finish(r, "cancelled");
        pending.push_back({r.session, &p, uint32_t(r.index)});
        whose.push_back(&r);
      };
      if (!r.drawn) {
        if (cancelled) {
          finish(r, "cancelled");
          continue;
        }
        if (int64_t(g.tokens.size()) >= p.max_new_tokens) {
          finish(r, "length");
          continue;
        }
        if (r.session->pending()) {  // continued from a session that stopped on a fresh token
          go_on();
          continue;
        }
        r.next = sample(p, r.session->logits(), r.session->tokens(), r.session->prompt_length(), uint32_t(r.index), scratch);
        r.session->push(r.next.id);
      }
      r.drawn = false;
      g.tokens.push_back(r.next.id);
      if (p.logprobs >= 0) g.sampled.push_back(r.next);
      ++t.generated_tokens;
      if (callbacks.on_token) callbacks.on_token(r.index, r.next);
      if (ends_sequence(p, r.next.id)) {
        finish(r, "stop");
        continue;
      }
      if (r.decoder) emit(r, r.stops.push(r.decoder->push(r.next.id)));
      if (r.stops.stopped()) finish(r, "stop");
      else if (int64_t(g.tokens.size()) >= p.max_new_tokens) finish(r, "length");
      else go_on();
    }
    if (pending.empty()) break;
    std::vector<Sampled> next = engine.step(pending);
    for (size_t i = 0; i < whose.size(); ++i) {
      whose[i]->next = std::move(next[i]);
      whose[i]->drawn = true;
    }
  }
  t.generate_s = seconds_since(generating);
  if (times) *times = t;
  return results;
}

}  // namespace kda
