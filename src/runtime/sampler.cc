#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"

namespace kda {

namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

struct Largest {
  float value = kBanned;
  int64_t not_numbers = 0, infinite = 0;  // NaN; plus infinity
};

// Eight lanes, so that it runs at the speed of memory.
Largest largest(std::span<const float> x) {
  constexpr size_t kLanes = 8;
  float most[kLanes];
  int32_t bad[kLanes] = {};
  std::fill(most, most + kLanes, kBanned);
  size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes)
    for (size_t l = 0; l < kLanes; ++l) {
      const float v = x[i + l];
      most[l] = most[l] < v ? v : most[l];
      bad[l] += !(v < std::numeric_limits<float>::infinity());
    }
  for (; i < x.size(); ++i) {
    most[0] = std::max(most[0], x[i]);
    bad[0] += !(x[i] < std::numeric_limits<float>::infinity());
  }
  Largest r;
  r.value = *std::max_element(most, most + kLanes);
  if (std::accumulate(bad, bad + kLanes, 0) > 0)
    for (float v : x) r.not_numbers += std::isnan(v), r.infinite += v == std::numeric_limits<float>::infinity();
  return r;
}

float checked_largest(std::span<const float> logits) {
  const Largest r = largest(logits);
  KDA_CHECK(r.not_numbers == 0 && r.infinite == 0, "sampler: of ", logits.size(), " logits ", r.not_numbers,
            " are NaN and ", r.infinite, " are +infinity");
  KDA_CHECK(r.value > kBanned, "sampler: all ", logits.size(), " logits are -infinity");
  return r.value;
}

int32_t first_with(std::span<const float> x, float value) {
  return int32_t(std::find(x.begin(), x.end(), value) - x.begin());
}

bool changes_logits(const SamplingParams& p, int64_t generated) {
  return !p.logit_bias.empty() || p.repetition_penalty != 1 ||
         (generated > 0 && (p.presence_penalty != 0 || p.frequency_penalty != 0)) || p.no_repeat_ngram_size > 0 ||
         generated < p.min_new_tokens;
}

// An id of the prompt can lie above the vocabulary of the head; it cannot be drawn, so nothing is done to it.
void count_ids(std::span<const int32_t> tokens, SamplerScratch& s, const auto& f) {
  s.count.resize(s.scores.size());
  const auto inside = [&](int32_t id) { return size_t(id) < s.count.size(); };
  for (int32_t id : tokens)
    if (inside(id)) ++s.count[size_t(id)];
  for (int32_t id : tokens)
    if (inside(id) && s.count[size_t(id)]) {
      f(s.scores[size_t(id)], s.count[size_t(id)]);
      s.count[size_t(id)] = 0;
    }
}

void ban_repeated_ngrams(std::span<const int32_t> tokens, size_t n, std::vector<float>& scores) {
  if (tokens.size() < n) return;
  const auto suffix = tokens.last(n - 1);
  for (size_t i = 0; i + n <= tokens.size(); ++i) {
    const auto head = tokens.subspan(i, n - 1);
    const auto id = size_t(tokens[i + n - 1]);
    if (id < scores.size() && std::equal(head.begin(), head.end(), suffix.begin())) scores[id] = kBanned;
  }
}

// The steps up to min_new_tokens, in f32 as transformers takes them, so that ties are its ties.
void process(const SamplingParams& p, std::span<const float> logits, std::span<const int32_t> tokens,
             int64_t prompt_length, SamplerScratch& s) {
  KDA_CHECK(prompt_length >= 0 && prompt_length <= int64_t(tokens.size()), "sampler: prompt_length must be in [0,",
            tokens.size(), "], got ", prompt_length);
  s.scores.assign(logits.begin(), logits.end());
  const int64_t generated = int64_t(tokens.size()) - prompt_length;
  for (const auto& [id, bias] : p.logit_bias) s.scores[size_t(id)] += float(bias);
  if (p.repetition_penalty != 1) {
    const float penalty = float(p.repetition_penalty);
    count_ids(tokens, s, [&](float& x, uint32_t) { x = x < 0 ? x * penalty : x / penalty; });
  }
  if (p.presence_penalty != 0 || p.frequency_penalty != 0)
    count_ids(tokens.subspan(size_t(prompt_length)), s, [&](float& x, uint32_t times) {
      x -= float(p.presence_penalty) + float(p.frequency_penalty) * float(times);
    });
  if (p.no_repeat_ngram_size > 0) ban_repeated_ngrams(tokens, size_t(p.no_repeat_ngram_size), s.scores);
  if (generated < p.min_new_tokens)
    for (const auto* ids : {&p.stop_ids, &p.eos_ids})
      for (int32_t id : *ids)
        if (ends_sequence(p, id) && size_t(id) < s.scores.size()) s.scores[size_t(id)] = kBanned;
}

// The k-th largest value. A heap of k is one comparison for almost every token; a large k is worth a selection.
float kth_largest(std::span<const float> x, size_t k, std::vector<float>& heap) {
  if (k > 512) {
    heap.assign(x.begin(), x.end());
    std::nth_element(heap.begin(), heap.begin() + std::ptrdiff_t(k - 1), heap.end(), std::greater<>());
    return heap[k - 1];
  }
  heap.assign(x.begin(), x.begin() + std::ptrdiff_t(k));
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  for (size_t i = k; i < x.size(); ++i)
    if (x[i] > heap.front()) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      heap.back() = x[i];
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  return heap.front();
}

// Removes from id and weight what `keep(index)` refuses, the order staying.
void keep_if(SamplerScratch& s, const auto& keep) {
  size_t to = 0;
  for (size_t i = 0; i < s.id.size(); ++i)
    if (keep(i)) {
      s.id[to] = s.id[i];
      s.weight[to++] = s.weight[i];
    }
  s.id.resize(to);
  s.weight.resize(to);
}

double total(const SamplerScratch& s) { return std::accumulate(s.weight.begin(), s.weight.end(), 0.0); }

// The element of s.order, taken as sorted, with which the weights come to `limit`; the last one if they never do. By
// halves, so that the whole need not be sorted.
std::pair<double, int32_t> crossing(SamplerScratch& s, double limit) {
  const auto weight = [&](size_t i) { return s.weight[size_t(s.order[i].second)]; };
  const auto at = [&](size_t i) { return s.order.begin() + std::ptrdiff_t(i); };
  size_t from = 0, to = s.order.size();
  double before = 0;
  while (to - from > 32) {
    const size_t middle = from + (to - from) / 2;
    std::nth_element(at(from), at(middle), at(to));
    double half = 0;
    for (size_t i = from; i < middle; ++i) half += weight(i);
    if (before + half >= limit) {
      to = middle;
    } else {
      before += half;
      from = middle;
    }
  }
  std::sort(at(from), at(to));
  while (from + 1 < to && (before += weight(from)) < limit) ++from;
  return s.order[from];
}

void apply_top_p(SamplerScratch& s, double top_p) {
  const double mass = total(s);
  // Tokens this rare have less than 1 - top_p between them, so none of them is kept: most need no ordering. The
  // likeliest always stays; the half leaves room for rounding.
  const double rare = 0.5 * (1 - top_p) * mass / double(s.id.size());
  s.order.clear();
  for (size_t i = 0; i < s.id.size(); ++i)
    if (s.weight[i] >= rare) s.order.emplace_back(-s.weight[i], int32_t(i));
  // Among equals the lowest id stays, as in a greedy choice. (In transformers that is up to an unstable sort.)
  const auto last = crossing(s, top_p * mass);
  keep_if(s, [&](size_t i) { return std::pair(-s.weight[i], int32_t(i)) <= last; });
}

void apply_typical_p(SamplerScratch& s, double typical_p) {
  const double mass = total(s);
  double entropy = 0;
  s.order.clear();
  for (size_t i = 0; i < s.id.size(); ++i) {
    const double share = s.weight[i] / mass, surprise = -std::log(share);
    if (share > 0) entropy += share * surprise;
    s.order.emplace_back(surprise, int32_t(i));
  }
  for (auto& [distance, i] : s.order) distance = std::abs(distance - entropy);
  const double limit = crossing(s, typical_p * mass).first;
  for (const auto& [distance, i] : s.order)
    if (distance > limit) s.weight[size_t(i)] = -1;
  keep_if(s, [&](size_t i) { return s.weight[i] >= 0; });
}

// Everything between process() and the draw: fills id and weight.
void shape(const SamplingParams& p, SamplerScratch& s) {
  if (p.temperature != 1)
    for (float& x : s.scores) x /= float(p.temperature);
  const float most = largest(s.scores).value;
  KDA_CHECK(most > kBanned, "sampler: every token is banned");
  // A tiny temperature can carry logits beyond f32.
  KDA_CHECK(most < std::numeric_limits<float>::infinity(), "sampler: temperature ", p.temperature,
            " carries a logit beyond the range of f32; use 0 for the likeliest token");
  float least = std::numeric_limits<float>::lowest();
  if (p.top_k > 0 && size_t(p.top_k) < s.scores.size())
    least = std::max(least, kth_largest(s.scores, size_t(p.top_k), s.heap));
  s.id.clear();
  s.weight.clear();
  for (size_t i = 0; i < s.scores.size(); ++i)
    if (s.scores[i] >= least) {
      s.id.push_back(int32_t(i));
      s.weight.push_back(std::exp(double(s.scores[i]) - double(most)));
    }
  if (p.top_p < 1) apply_top_p(s, p.top_p);
  if (p.min_p > 0) {
    const double limit = p.min_p * *std::max_element(s.weight.begin(), s.weight.end());
    keep_if(s, [&](size_t i) { return s.weight[i] >= limit; });
  }
  if (p.typical_p < 1) apply_typical_p(s, p.typical_p);
}

int32_t draw(const SamplerScratch& s, double u) {
  const double target = u * total(s);
  double sum = 0;
  for (size_t i = 0; i < s.id.size(); ++i)
    if ((sum += s.weight[i]) > target) return s.id[i];
  // Not reached but by rounding: the last one that can be drawn at all.
  for (size_t i = s.id.size(); i-- > 0;)
    if (s.weight[i] > 0) return s.id[i];
  return s.id.back();
}

int32_t likeliest(std::span<const float> scores) {
  const float most = largest(scores).value;
  KDA_CHECK(most > kBanned, "sampler: every token is banned");
  return first_with(scores, most);
}

void add_logprobs(std::span<const float> logits, float most, int count, SamplerScratch& s, Sampled& r) {
  double sum = 0;
  for (float x : logits) sum += double(std::exp(x - most));
  const double lse = double(most) + std::log(sum);
  const auto logprob = [&](int32_t id) { return float(double(logits[size_t(id)]) - lse); };
  r.logprob = logprob(r.id);
  const size_t n = std::min(size_t(count), logits.size());
  if (n == 0) return;
  const float least = kth_largest(logits, n, s.heap);
  s.order.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] >= least) s.order.emplace_back(-double(logits[i]), int32_t(i));
  std::sort(s.order.begin(), s.order.end());
  for (size_t i = 0; i < n; ++i) r.top.emplace_back(s.order[i].second, logprob(s.order[i].second));
}

}  // namespace

void validate(const SamplingParams& p, int64_t vocabulary) {
  const auto range = [](const char* field, double value, double low, double high, const char* text) {
    KDA_CHECK(value >= low && value <= high, field, " must be ", text, ", got ", value);
  };
  constexpr double kTiny = std::numeric_limits<double>::min(), kHuge = std::numeric_limits<float>::max();
  range("temperature", p.temperature, 0, kHuge, "0 or more");
  range("top_p", p.top_p, 0, 1, "in [0,1]");
  range("min_p", p.min_p, 0, 1, "in [0,1]");
  range("typical_p", p.typical_p, kTiny, 1, "in (0,1]");
  range("repetition_penalty", p.repetition_penalty, kTiny, kHuge, "above 0");
  range("presence_penalty", p.presence_penalty, -2, 2, "in [-2,2]");
  range("frequency_penalty", p.frequency_penalty, -2, 2, "in [-2,2]");
  KDA_CHECK(p.top_k >= -1, "top_k must be 1 or more, or 0 for none, got ", p.top_k);
  KDA_CHECK(p.no_repeat_ngram_size >= 0, "no_repeat_ngram_size must be 0 or more, got ", p.no_repeat_ngram_size);
  KDA_CHECK(p.max_new_tokens >= 0, "max_new_tokens must be 0 or more, got ", p.max_new_tokens);
  KDA_CHECK(p.min_new_tokens >= 0 && p.min_new_tokens <= p.max_new_tokens,
            "min_new_tokens must be in [0, max_new_tokens = ", p.max_new_tokens, "], got ", p.min_new_tokens);
  KDA_CHECK(p.logprobs >= -1 && p.logprobs <= vocabulary, "logprobs must be in [0, the vocabulary of ", vocabulary,
            "], got ", p.logprobs);
  const auto inside = [&](const char* field, int32_t id) {
    KDA_CHECK(id >= 0 && id < vocabulary, field, " must name ids in [0,", vocabulary, "), got ", id);
  };
  for (const auto& [id, bias] : p.logit_bias) {
    inside("logit_bias", id);
    KDA_CHECK(bias <= kHuge, "logit_bias must be a number, or -infinity to ban, got ", bias, " for id ", id);
  }
  for (int32_t id : p.stop_ids) inside("stop_ids", id);
  for (const std::string& s : p.stop) KDA_CHECK(!s.empty(), "stop must not hold an empty text");
}

bool greedy(const SamplingParams& p) { return !p.do_sample || p.temperature == 0; }

bool ends_sequence(const SamplingParams& p, int32_t id) {
  const auto in = [&](const std::vector<int32_t>& ids) { return std::find(ids.begin(), ids.end(), id) != ids.end(); };
  return in(p.stop_ids) || (!p.ignore_eos && in(p.eos_ids));
}

Sampled sample(const SamplingParams& p, std::span<const float> logits, std::span<const int32_t> tokens,
               int64_t prompt_length, uint32_t sequence, SamplerScratch& s) {
  const float most = checked_largest(logits);
  Sampled r;
  if (greedy(p) && !changes_logits(p, int64_t(tokens.size()) - prompt_length)) {
    r.id = first_with(logits, most);
  } else {
    process(p, logits, tokens, prompt_length, s);
    if (greedy(p)) {
      r.id = likeliest(s.scores);
    } else {
      shape(p, s);
      const auto words = Philox::block(p.seed, {sequence, uint32_t(tokens.size()), 0, 0});
      r.id = draw(s, uniform53(words[0], words[1]));
    }
  }
  if (p.logprobs >= 0) {
    add_logprobs(logits, most, p.logprobs, s, r);
  } else {
    r.logprob = std::numeric_limits<float>::quiet_NaN();
  }
  return r;
}

std::vector<double> probabilities(const SamplingParams& p, std::span<const float> logits,
                                  std::span<const int32_t> tokens, int64_t prompt_length, SamplerScratch& s) {
  checked_largest(logits);
  process(p, logits, tokens, prompt_length, s);
  std::vector<double> out(logits.size());
  if (greedy(p)) {
    out[size_t(likeliest(s.scores))] = 1;
    return out;
  }
  shape(p, s);
  const double mass = total(s);
  for (size_t i = 0; i < s.id.size(); ++i) out[size_t(s.id[i])] = s.weight[i] / mass;
  return out;
}

}  // namespace kda
