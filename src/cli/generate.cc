// cli/generate.cc — kda generate: prompts in, text out.
#include "runtime/generate.h"

#include <unistd.h>

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"

namespace kda::cli {

namespace {

using nlohmann::json;

struct Options {
  ModelOptions model;
  std::string prompt, file, ids, prompts_file, save_state, load_state;
  int64_t max_new_tokens = -1, min_new_tokens = -1, top_k = -1, no_repeat_ngram = -1;
  double temperature = -1, top_p = -1, min_p = -1, typical_p = -1, repetition = -1;
  double presence = 0, frequency = 0;
  std::vector<std::string> stop, logit_bias;
  std::vector<int32_t> stop_ids;
  uint64_t seed = 0;
  int logprobs = -1, samples = 1;
  bool do_sample = false, greedy = false, ignore_eos = false, as_json = false, no_special = false;
  const CLI::App* command = nullptr;
  bool given(const char* option) const { return command->count(option) > 0; }
};

constexpr int64_t kDefaultNewTokens = 128;

// The checkpoint's defaults, then what the command line says. `notes` says which defaults were taken.
SamplingParams sampling(const Options& o, const Engine& engine, std::string& notes) {
  const GenerationDefaults& d = engine.generation();
  SamplingParams p;
  const auto choose = [&](auto& field, const auto& given, bool is_given, const auto& fallback, const char* name) {
    using T = std::decay_t<decltype(field)>;
    if (is_given) {
      field = T(given);
    } else if (fallback) {
      field = T(*fallback);
      notes += cat(notes.empty() ? "" : ", ", name, " ", *fallback);
    }
  };
  choose(p.temperature, o.temperature, o.temperature >= 0, d.temperature, "temperature");
  choose(p.top_k, o.top_k, o.top_k >= 0, d.top_k, "top_k");
  choose(p.top_p, o.top_p, o.top_p >= 0, d.top_p, "top_p");
  choose(p.min_p, o.min_p, o.min_p >= 0, d.min_p, "min_p");
  choose(p.typical_p, o.typical_p, o.typical_p >= 0, d.typical_p, "typical_p");
  choose(p.repetition_penalty, o.repetition, o.repetition >= 0, d.repetition_penalty, "repetition_penalty");
  choose(p.no_repeat_ngram_size, o.no_repeat_ngram, o.no_repeat_ngram >= 0, d.no_repeat_ngram_size, "no_repeat_ngram_size");
  choose(p.min_new_tokens, o.min_new_tokens, o.min_new_tokens >= 0, d.min_new_tokens, "min_new_tokens");
  p.max_new_tokens = kDefaultNewTokens;
  if (o.max_new_tokens < 0 && !d.max_new_tokens && d.max_length) notes += cat(notes.empty() ? "" : ", ", "max_length ", *d.max_length);
  choose(p.max_new_tokens, o.max_new_tokens, o.max_new_tokens >= 0, d.max_new_tokens, "max_new_tokens");
  std::optional<bool> sample = d.do_sample;
  if (o.temperature > 0 || o.do_sample) sample = true;
  if (o.temperature == 0 || o.greedy) sample = false;
  p.do_sample = sample.value_or(false);
  if (d.do_sample.value_or(false) && p.do_sample && o.temperature < 0 && !o.do_sample) notes += cat(notes.empty() ? "" : ", ", "do_sample");
  p.presence_penalty = o.presence;
  p.frequency_penalty = o.frequency;
  for (const std::string& s : o.logit_bias) {
    const size_t colon = s.find(':');
    KDA_CHECK(colon != std::string::npos, "--logit-bias must be ID:BIAS, got \"", s, "\"");
    const std::string bias = s.substr(colon + 1);
    const std::vector<int32_t> ids = parse_ids(s.substr(0, colon), "--logit-bias");
    KDA_CHECK(ids.size() == 1, "--logit-bias must be ID:BIAS, got \"", s, "\"");
    const int32_t id = ids[0];
    if (bias == "false") {
      p.logit_bias[id] = -INFINITY;
    } else {
      char* end = nullptr;
      p.logit_bias[id] = std::strtod(bias.c_str(), &end);
      KDA_CHECK(!bias.empty() && *end == 0, "--logit-bias: \"", bias, "\" is no number");
    }
  }
  p.stop = o.stop;
  p.stop_ids = o.stop_ids;
  p.ignore_eos = o.ignore_eos;
  p.seed = o.seed;
  p.logprobs = o.logprobs;
  return p;
}

std::vector<int32_t> encode(const Engine& engine, const std::string& text, bool special) {
  KDA_CHECK(engine.tokenizer(), "a text prompt needs tokenizer.json, which this model folder lacks: give --prompt-ids");
  return engine.tokenizer()->encode(text, special);
}

std::vector<std::vector<int32_t>> prompts(const Options& o, const Engine& engine, bool continuing) {
  const bool special = !o.no_special && !continuing;
  if (o.given("--prompt-ids")) return {parse_ids(o.ids, "--prompt-ids")};
  if (o.given("--prompts-file")) {
    std::vector<std::vector<int32_t>> out;
    const std::string all = read_text(o.prompts_file);
    int64_t line_number = 0;
    for (size_t at = 0; at < all.size();) {
      const size_t end = std::min(all.find('\n', at), all.size());
      const std::string line = all.substr(at, end - at);
      at = end + 1;
      ++line_number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      const std::string where = cat(o.prompts_file, " line ", line_number);
      const json whole = parse_json(line, where);
      const char* key = whole.is_object() && whole.contains("prompt_ids") ? "prompt_ids" : "prompt";
      const json& j = whole.is_object() && whole.contains(key) ? whole[key] : whole;
      KDA_CHECK(j.is_string() || j.is_array(), where, ": needed a string, a list of ids, or an object with `prompt` or `prompt_ids`");
      out.push_back(j.is_string() ? encode(engine, j.get<std::string>(), special) : json_ids(j, where));
      KDA_CHECK(!out.back().empty(), where, ": an empty prompt");
      for (const int32_t id : out.back())
        KDA_CHECK(id < engine.config().vocabulary, where, ": id ", id, " outside the model's vocabulary of ", engine.config().vocabulary);
    }
    KDA_CHECK(!out.empty(), o.prompts_file, ": no prompts");
    return out;
  }
  if (o.given("--prompt")) return {encode(engine, o.prompt, special)};
  if (o.given("--file")) return {encode(engine, read_text(o.file), special)};
  if (continuing && isatty(STDIN_FILENO)) return {{}};
  std::string text;
  if (!isatty(STDIN_FILENO)) text = read_text("-");
  if (text.empty()) {
    if (continuing) return {{}};
    // No prompt at all: from the begin-of-text token, where there is one.
    KDA_CHECK(engine.config().bos, "no prompt: give -p TEXT, -f FILE, --prompt-ids or --prompts-file, or text on standard input");
    return {{*engine.config().bos}};
  }
  return {encode(engine, text, special)};
}

json to_json(const Generated& g, bool has_text, bool logprobs) {
  json j{{"tokens", g.tokens}, {"text", has_text ? json(g.text) : json()}, {"finish_reason", g.finish_reason}};
  if (!g.stop.empty()) j["stop"] = g.stop;
  if (logprobs) {
    for (const Sampled& s : g.sampled) {
      json top = json::array();
      for (const auto& [id, logprob] : s.top) top.push_back({{"id", id}, {"logprob", logprob}});
      j["logprobs"].push_back({{"id", s.id}, {"logprob", s.logprob}, {"top", top}});
    }
  }
  return j;
}

void print_logprobs(const Generated& g) {
  for (const Sampled& s : g.sampled) {
    std::cout << s.id << '\t' << s.logprob;
    for (const auto& [id, logprob] : s.top) std::cout << '\t' << id << ':' << logprob;
    std::cout << '\n';
  }
}

double rate(int64_t tokens, double seconds) { return seconds > 0 ? double(tokens) / seconds : 0; }

void run(const Options& o) {
  const auto engine = open_engine(o.model);
  std::string notes;
  const SamplingParams params = sampling(o, *engine, notes);
  if (!notes.empty()) std::cerr << "from generation_config.json: " << notes << '\n';

  if (o.given("--save-state")) check_output(o.save_state, engine->folder());
  std::vector<Session> sessions;
  if (o.given("--load-state")) {
    sessions.push_back(Session::restore(*engine, o.load_state));
    std::cerr << "state of " << sessions[0].tokens().size() << " tokens read from " << o.load_state << '\n';
  }
  std::vector<GenerationRequest> requests;
  for (auto& ids : prompts(o, *engine, !sessions.empty())) {
    requests.push_back({std::move(ids), params, o.samples});
    // transformers' max_length counts the prompt; max_new_tokens, where given, goes before it.
    const GenerationDefaults& d = engine->generation();
    if (o.max_new_tokens < 0 && !d.max_new_tokens && d.max_length)
      requests.back().params.max_new_tokens = std::max<int64_t>(0, *d.max_length - int64_t(requests.back().prompt.size()));
  }
  KDA_CHECK(sessions.empty() || requests.size() == 1, "--load-state continues one conversation, ", requests.size(), " prompts given");
  KDA_CHECK(!o.given("--save-state") || (requests.size() == 1 && o.samples == 1), "--save-state keeps one conversation, ",
            requests.size(), " prompts with ", o.samples, " samples each given");

  const bool one = requests.size() == 1 && o.samples == 1, text = engine->tokenizer() != nullptr;
  const int64_t trained = engine->config().max_positions;
  bool warned = trained <= 0;
  int64_t length = 0;
  for (const auto& r : requests) length = std::max(length, int64_t(r.prompt.size()));
  if (!sessions.empty()) length += int64_t(sessions[0].tokens().size());
  const auto warn = [&] {
    if (!warned && length > trained)
      warned = true, std::cerr << "warning: past max_position_embeddings (" << trained << "): the model was not trained at this length\n";
  };
  warn();

  int64_t prompt_tokens = 0;
  for (const auto& r : requests) prompt_tokens += int64_t(r.prompt.size());
  auto progress = std::make_unique<Progress>(std::cerr, progress_style(stderr), "prompt", prompt_tokens, "tok");
  GenerationCallbacks callbacks;
  callbacks.on_prompt = [&](int64_t done, int64_t total) {
    progress->set(done);
    if (done == total) progress.reset();  // its line makes room for the text
  };
  callbacks.on_token = [&](size_t sequence, const Sampled& s) {
    if (sequence == 0) ++length, warn();
    if (one && !o.as_json && !text) std::cout << s.id << ' ' << std::flush;
  };
  if (one && !o.as_json) callbacks.on_text = [&](size_t, std::string_view piece) { std::cout << piece << std::flush; };
  GenerationTimes times;
  const auto results = generate(*engine, requests, callbacks, &sessions, &times);
  if (o.given("--save-state")) sessions.at(0).save(o.save_state);

  if (o.as_json) {
    json out{{"sequences", json::array()},
             {"timings",
              {{"prompt_tokens", times.prompt_tokens},
               {"prompt_ms", times.prompt_s * 1e3},
               {"prompt_tok_per_s", rate(times.prompt_tokens, times.prompt_s)},
               {"generated_tokens", times.generated_tokens},
               {"generate_ms", times.generate_s * 1e3},
               {"generate_tok_per_s", rate(times.generated_tokens, times.generate_s)}}}};
    for (const Generated& g : results) out["sequences"].push_back(to_json(g, text, o.logprobs >= 0));
    std::cout << json_line(out);
  } else if (one) {
    std::cout << '\n';
    print_logprobs(results[0]);
  } else {
    for (size_t i = 0; i < results.size(); ++i) {
      std::cout << "--- prompt " << results[i].request + 1 << ", sample " << i % size_t(o.samples) + 1 << '\n';
      if (text) std::cout << results[i].text << '\n';
      else {
        for (int32_t id : results[i].tokens) std::cout << id << ' ';
        std::cout << '\n';
      }
      print_logprobs(results[i]);
    }
  }
  std::cout.flush();  // before the line on the other stream
  std::fprintf(stderr, "prompt %lld tokens, %.1f tok/s; generated %lld tokens, %.1f tok/s%s%s\n", (long long)times.prompt_tokens,
               rate(times.prompt_tokens, times.prompt_s), (long long)times.generated_tokens,
               rate(times.generated_tokens, times.generate_s), one ? "; " : "", one ? results[0].finish_reason.c_str() : "");
}

}  // namespace

void add_generate(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("generate", "continue a prompt");
  add_model_options(*c, o->model);
  auto* source = c->add_option_group("prompt", "one of these, else standard input");
  source->add_option("-p,--prompt", o->prompt, "text");
  source->add_option("-f,--file", o->file, "text file, - for standard input");
  source->add_option("--prompt-ids", o->ids, "token ids 1,2,3, taken as they are");
  source->add_option("--prompts-file", o->prompts_file,
                     "JSON lines, run as one batch: a string, a list of ids, or {\"prompt\": ..} or {\"prompt_ids\": ..}");
  source->require_option(0, 1);
  c->add_option("-n,--max-new-tokens", o->max_new_tokens, cat("tokens to generate at most; default ", kDefaultNewTokens))
      ->check(whole_number());
  c->add_option("--min-new-tokens", o->min_new_tokens, "no stopping before this many")->check(whole_number());
  c->add_option("--temperature", o->temperature, "0: greedy; above 0: samples")->check(at_least(0));
  c->add_option("--top-k", o->top_k, "keep the k likeliest; 0: off")->check(whole_number());
  c->add_option("--top-p", o->top_p, "keep the smallest set with this much probability")->check(share());
  c->add_option("--min-p", o->min_p, "keep what has at least this share of the likeliest's probability")->check(share());
  c->add_option("--typical-p", o->typical_p, "locally typical sampling")->check(share());
  c->add_option("--repetition-penalty", o->repetition, "above 1 makes ids seen before less likely")->check(above_zero());
  c->add_option("--presence-penalty", o->presence, "subtracted once for ids generated before");
  c->add_option("--frequency-penalty", o->frequency, "subtracted for each time an id was generated before");
  c->add_option("--no-repeat-ngram-size", o->no_repeat_ngram, "never generate an n-gram twice; 0: off")->check(whole_number());
  c->add_option("--logit-bias", o->logit_bias, "ID:BIAS, or ID:false to ban; may be repeated");
  c->add_option("--stop", o->stop, "end at this string, which is left out; may be repeated");
  c->add_option("--stop-ids", o->stop_ids, "end at these ids")->delimiter(',');
  c->add_flag("--ignore-eos", o->ignore_eos, "do not end at the model's end-of-text ids");
  c->add_flag("--do-sample", o->do_sample, "sample even at the default temperature");
  c->add_flag("--greedy", o->greedy, "take the likeliest token whatever generation_config.json says");
  c->add_option("--seed", o->seed, "of sampling")->check(whole_number())->capture_default_str();
  c->add_option("--num-samples", o->samples, "continuations of each prompt")->check(CLI::Range(1, 4096))->capture_default_str();
  c->add_option("--logprobs", o->logprobs, "log-probability of each token, and of the N likeliest")->check(CLI::Range(0, 1000));
  c->add_flag("--no-special", o->no_special, "do not put the begin-of-text token before a text prompt");
  c->add_option("--save-state", o->save_state, "write the conversation's state here afterwards");
  c->add_option("--load-state", o->load_state, "continue the conversation saved here");
  c->add_flag("--json", o->as_json, "print one JSON object");
  o->command = c;
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
