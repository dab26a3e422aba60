// cli/bench.cc — kda bench: speed as JSON lines, beside what the machine allows, probed in the same run.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "base/memory.h"
#include "base/rng.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "kernels/probe.h"
#include "runtime/generate.h"

namespace kda::cli {

namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct Options {
  ModelOptions model;
  std::vector<int64_t> prompt_tokens{512};
  int64_t first_prompt = 16, decode_tokens = 16, rounds = 3;
};

double ms_since(Clock::time_point t) { return std::chrono::duration<double, std::milli>(Clock::now() - t).count(); }

double percentile(std::vector<double> v, double p) {
  std::sort(v.begin(), v.end());
  return v[size_t(std::lround(p * double(v.size() - 1)))];
}

std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}

std::vector<int32_t> random_ids(int64_t n, int64_t vocabulary) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i)
    ids.push_back(int32_t(Philox::block(1, {uint32_t(i), 0, 0, 0})[0] % uint64_t(vocabulary)));
  return ids;
}

// The layers' matrices: what a forward pass multiplies by, and how often.
std::vector<GemmShape> layer_products(const Weights& w) {
  std::map<std::pair<int64_t, int64_t>, int64_t> count;
  for (const LayerWeights& l : w.layers)
    for (const Linear* m : {&l.full.q, &l.full.k, &l.full.v, &l.full.o, &l.kda.q, &l.kda.k, &l.kda.v, &l.kda.f0, &l.kda.f1,
                            &l.kda.b, &l.kda.g0, &l.kda.g1, &l.kda.o, &l.mlp.gate, &l.mlp.up, &l.mlp.down})
      if (m->w) ++count[{m->N(), m->K()}];
  std::vector<GemmShape> out;
  for (const auto& [shape, n] : count) out.push_back({shape.first, shape.second, n});
  return out;
}

void generate_speed(const Options& o) {
  const auto start = Clock::now();
  const auto engine = open_engine(o.model);
  const double load_ms = ms_since(start);
  const int64_t V = engine->config().vocabulary;
  const Weights& w = engine->weights();
  json line{{"op", "generate"},
            {"device", cpu_name()},
            {"commit", KDA_COMMIT},
            {"model", o.model.model},
            {"layers", w.layers.size()},
            {"parameters", engine->config().parameters()},
            {"weights", o.model.weights},
            {"precision", o.model.precision},
            {"threads", engine->threads().threads()}};

  {  // Time to the first token, from before the checkpoint was opened.
    GenerationRequest r{.prompt = random_ids(o.first_prompt, V), .params = {}};
    r.params.max_new_tokens = 1;
    generate(*engine, {r});
    line["first_prompt_tokens"] = o.first_prompt;
    line["load_ms"] = load_ms;
    line["first_token_ms"] = ms_since(start);
    line["resident_bytes"] = resident_bytes();  // before the probes take memory of their own
    line["peak_resident_bytes"] = peak_resident_bytes();
  }

  const std::vector<GemmShape> shapes = layer_products(w);
  double products = 0;
  for (const GemmShape& s : shapes) products += double(s.N) * double(s.K) * double(s.count);

  for (const int64_t T : o.prompt_tokens) {
    const auto ids = random_ids(T, V);
    std::vector<double> ms, probes, shares;
    for (int64_t round = 0; round <= o.rounds; ++round) {
      const double probe = probe_gemm_flops_per_s(engine->threads(), T, shapes);
      Session s(*engine);
      const Prompt p{&s, ids};
      const auto t = Clock::now();
      engine->prefill({&p, 1});
      if (round == 0) continue;  // warm-up
      ms.push_back(ms_since(t));
      probes.push_back(probe);
      shares.push_back(2e3 * products * double(T) / ms.back() / probe);
    }
    json prompt{{"tokens", T},
                {"ms_p10", percentile(ms, .1)},
                {"ms_p50", percentile(ms, .5)},
                {"ms_p90", percentile(ms, .9)},
                {"tok_per_s", 1e3 * double(T) / percentile(ms, .5)},
                {"limit", "gemm, weights packed beforehand"},
                {"limit_flop_per_s", percentile(probes, .5)},
                {"share", percentile(shares, .5)},
                {"share_min", percentile(shares, 0)},
                {"share_max", percentile(shares, 1)}};
    line["prompt"].push_back(prompt);
  }

  // A pass over DRAM before and after every step: the machine's speed drifts faster than a round lasts.
  const int64_t weight_bytes = w.decode_bytes(), state_bytes = engine->config().state_bytes();
  const int64_t bytes = weight_bytes + state_bytes;  // read for a token; what is written back is not counted
  std::vector<double> ms, probes, shares;
  DramProbe dram(engine->threads());
  for (int64_t round = 0; round < o.rounds; ++round) {
    Session s(*engine);
    const auto ids = random_ids(16, V);
    const Prompt p{&s, ids};
    engine->prefill({&p, 1});
    double before = dram.bytes_per_s();
    for (int64_t i = 0; i < o.decode_tokens; ++i) {
      s.push(ids[size_t(i) % ids.size()]);
      Session* one = &s;
      const auto t = Clock::now();
      engine->decode({&one, 1});
      ms.push_back(ms_since(t));
      const double after = dram.bytes_per_s();
      probes.push_back((before + after) / 2);
      shares.push_back(1e3 * double(bytes) / ms.back() / probes.back());
      before = after;
    }
  }
  line["decode"] = {{"tokens", ms.size()},
                    {"ms_p10", percentile(ms, .1)},
                    {"ms_p50", percentile(ms, .5)},
                    {"ms_p90", percentile(ms, .9)},
                    {"tok_per_s", 1e3 / percentile(ms, .5)},
                    {"weight_bytes", weight_bytes},
                    {"state_bytes", state_bytes},
                    {"limit", "DRAM read"},
                    {"limit_bytes_per_s", percentile(probes, .5)},
                    {"share", percentile(shares, .5)},
                    {"share_p10", percentile(shares, .1)},
                    {"share_p90", percentile(shares, .9)}};
  std::cout << json_line(line);
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "measure speed");
  bench->require_subcommand(1);
  auto o = std::make_shared<Options>();
  CLI::App* c = bench->add_subcommand("generate", "prompt and decode speed, with the memory and product limits of the same run");
  add_model_options(*c, o->model);
  c->add_option("--prompt-tokens", o->prompt_tokens, "lengths to time")->delimiter(',')->check(whole_number(1))->capture_default_str();
  c->add_option("--first-prompt-tokens", o->first_prompt, "prompt of the time to the first token")->check(whole_number(1))->capture_default_str();
  c->add_option("--decode-tokens", o->decode_tokens, "tokens a round")->check(whole_number(1))->capture_default_str();
  c->add_option("--rounds", o->rounds, "each with its own probes")->check(whole_number(1))->capture_default_str();
  c->callback([o] { generate_speed(*o); });
}

}  // namespace kda::cli
