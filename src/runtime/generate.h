// runtime/generate.h — from prompts to text: prompts in packed blocks, then all sequences token by token until each one stops.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/engine.h"
#include "runtime/sampler.h"

namespace kda {

struct GenerationRequest {
  std::vector<int32_t> prompt;  // ids as the model takes them
  SamplingParams params;
  int samples = 1;              // continuations of this prompt, which is run once and forked
};

struct Generated {
  size_t request = 0;
  std::vector<int32_t> tokens;    // generated ids, a stopping id included
  std::string text;               // decoded, without special tokens, stop strings cut off; empty without a tokenizer
  std::string finish_reason;      // "stop" (stop id or string), "length", "cancelled"
  std::string stop;               // the stop string that ended it, if one did
  std::vector<Sampled> sampled;   // one for each token when logprobs were asked for
};

struct GenerationTimes {
  int64_t prompt_tokens = 0, generated_tokens = 0;
  double prompt_s = 0, generate_s = 0;
};

struct GenerationCallbacks {
  std::function<void(int64_t done, int64_t total)> on_prompt;
  std::function<void(size_t sequence, std::string_view text)> on_text;    // text that is final; needs a tokenizer
  std::function<void(size_t sequence, const Sampled&)> on_token;
  std::function<bool()> cancelled;                                        // asked once a step
};

// Ids that end a sequence of this model: generation_config.json's, else config.json's. Taken where a request's eos_ids are empty.
std::vector<int32_t> end_ids(const Engine&);

// One result for each sample of each request, in order; sequence number = index, which is also the sampler's.
// `sessions`, if given, receives the sessions afterwards (for saving); on entry it may hold one session per request
// to continue. Without max_new_tokens a sequence runs until it stops by itself.
std::vector<Generated> generate(Engine&, const std::vector<GenerationRequest>&, const GenerationCallbacks& = {},
                                std::vector<Session>* sessions = nullptr, GenerationTimes* times = nullptr);

}  // namespace kda
