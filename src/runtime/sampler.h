// runtime/sampler.h — from one row of logits to one token.
//
// What is done to the logits, in this order (transformers', with the penalties of OpenAI's API beside the one they
// resemble):
//   logit_bias            added; minus infinity bans the id
//   repetition_penalty    negative logits times p, others divided by it, once for each distinct id of prompt +
//   generated presence_penalty      subtracted once from each id that was generated          (the prompt does not
//   count) frequency_penalty     subtracted as often as the id was generated              (the prompt does not count)
//   no_repeat_ngram_size  bans what would complete an n-gram that prompt + generated already hold
//   min_new_tokens        bans the ids that end a sequence until so many were generated
// and, where a token is drawn and not simply the likeliest taken:
//   temperature, top_k (ties of the k-th stay), top_p (the token that crosses stays,
//   of equals the lowest ids), min_p (relative to the largest),
//   typical_p (nearest to the entropy first, the crossing token and its ties stay).
// Each takes the softmax over what the ones before it left.
//
// Source  transformers generation/logits_process.py; for presence and frequency OpenAI's API reference and vLLM.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kda {

struct SamplingParams {
  bool do_sample = false;         // false: the likeliest token, whatever the fields of the second list say
  double temperature = 1;         // 0: as do_sample = false
  int64_t top_k = 0;              // 0 or -1: off
  double top_p = 1;               // [0,1]; 1: off
  double min_p = 0;               // [0,1]; 0: off
  double typical_p = 1;           // (0,1]; 1: off
  double repetition_penalty = 1;  // > 0
  double presence_penalty = 0;    // [-2,2]
  double frequency_penalty = 0;   // [-2,2]
  int64_t no_repeat_ngram_size = 0;
  int64_t min_new_tokens = 0;
  int64_t max_new_tokens = 256;
  std::map<int32_t, double> logit_bias = {};
  std::vector<std::string> stop = {};  // texts that end a sequence; see stop.h
  std::vector<int32_t> stop_ids = {};  // ids that end a sequence
  std::vector<int32_t> eos_ids = {};   // the model's own; they end a sequence unless ignore_eos
  bool ignore_eos = false;
  uint64_t seed = 0;
  int logprobs = -1;  // -1: none; n: the drawn token's, and those of the n likeliest
};

// Throws Error naming the field, the range and the value.
void validate(const SamplingParams&, int64_t vocabulary);

// Whether the token is taken without chance.
bool greedy(const SamplingParams&);

// Whether the token ends its sequence.
bool ends_sequence(const SamplingParams&, int32_t id);

struct Sampled {
  int32_t id = -1;
  // Natural logs under the model's own distribution: softmax of the logits as they came, before anything of the above
  // (as OpenAI and vLLM report them). NaN and empty unless params.logprobs >= 0. Likeliest first, then by rising id.
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;
};

// Memory kept between calls; one per thread that samples.
struct SamplerScratch {
  std::vector<float> scores;    // [vocabulary]
  std::vector<uint32_t> count;  // [vocabulary]  zero between calls
  std::vector<int32_t> id;      // what can be drawn, by rising id,
  std::vector<double> weight;   // and how likely, up to a common factor
  std::vector<std::pair<double, int32_t>> order;
  std::vector<float> heap;
};

// One token after `tokens` (prompt + generated, the first prompt_length of them being the prompt). Random numbers are
// Philox(key = seed, counter = (sequence, position of the token, 0, 0)): the result depends on the arguments and
// nothing else. The likeliest token is the one with the lowest id among equals. Throws Error when the logits hold a NaN
// or plus infinity, or nothing above minus infinity, before or after the above; `params` were validated.
Sampled sample(const SamplingParams& params, std::span<const float> logits, std::span<const int32_t> tokens,
               int64_t prompt_length, uint32_t sequence, SamplerScratch& scratch);

// The distribution `sample` draws from, [vocabulary]: what is left after every step above, adding up to 1. For greedy
// parameters all of it is on one token.
std::vector<double> probabilities(const SamplingParams& params, std::span<const float> logits,
                                  std::span<const int32_t> tokens, int64_t prompt_length, SamplerScratch& scratch);

}  // namespace kda
