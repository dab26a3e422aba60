// cli/bench.cc — kda bench: speed as JSON lines, beside what the machine allows, probed in the same run.
#include "cli/bench.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>

#include "base/memory.h"
#include "base/rng.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "kernels/matmul.h"
#include "runtime/generate.h"

namespace kda::cli {

using nlohmann::json;
using Clock = BenchClock;

double ms_since(Clock::time_point t) { return std::chrono::duration<double, std::milli>(Clock::now() - t).count(); }

double percentile(std::vector<double> v, double p) {
  std::sort(v.begin(), v.end());
  return v[size_t(std::lround(p * double(v.size() - 1)))];
}

void put_spread(json& line, const std::vector<double>& ms) {
  line["ms_p10"] = percentile(ms, .1);
  line["ms_p50"] = percentile(ms, .5);
  line["ms_p90"] = percentile(ms, .9);
}

bool on_cuda(const Context& ctx) { return ctx.backend == cuda_backend(); }

namespace {
std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}
}  // namespace

std::string device_name(const Context& ctx) { return on_cuda(ctx) ? device_status(ctx).name : cpu_name(); }

json bench_line(const Context& ctx, const char* op) {
  return {{"op", op}, {"device", device_name(ctx)}, {"commit", KDA_COMMIT}};
}

void print_line(const json& line) { std::cout << json_line(line) << std::flush; }

std::vector<int32_t> random_ids(int64_t n, int64_t vocabulary, uint32_t seed) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i)
    ids.push_back(int32_t(Philox::block(1, {uint32_t(i), seed, 0, 0})[0] % uint64_t(vocabulary)));
  return ids;
}

std::vector<GemmShape> layer_products(const Weights& w) {
  std::map<std::pair<int64_t, int64_t>, int64_t> count;
  for (const LayerWeights& l : w.layers)
    for (const Linear* m : {&l.full.q, &l.full.k, &l.full.v, &l.full.o, &l.kda.q, &l.kda.k, &l.kda.v, &l.kda.f0,
                            &l.kda.f1, &l.kda.b, &l.kda.g0, &l.kda.g1, &l.kda.o, &l.mlp.gate, &l.mlp.up, &l.mlp.down})
      if (m->w) ++count[{m->N(), m->K()}];
  std::vector<GemmShape> out;
  for (const auto& [shape, n] : count) out.push_back({shape.first, shape.second, n});
  return out;
}

double probe_matmul_flops_per_s(Context& ctx) {
  const int64_t n = on_cuda(ctx) ? 8192 : 1024;
  const Dtype act = ctx.backend->activation, weight = Dtype::bf16;
  const Tensor workspace = ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, n, n, n))});
  const Tensor x = ctx.backend->alloc(act, {n, n}), w = ctx.backend->alloc(weight, {n, n}),
               y = ctx.backend->alloc(act, {n, n});
  {  // a product of zeros is faster than one of numbers
    std::vector<bf16> row(size_t(n) * 7 + 3);
    for (size_t i = 0; i < row.size(); ++i)
      row[i] = bf16(float(int32_t(Philox::block(2, {uint32_t(i), 0, 0, 0})[0])) * 0x1p-31f);
    std::vector<float> wide_row(row.begin(), row.end());
    const auto fill = [&](const Tensor& t) {
      const void* from = t.dtype() == Dtype::bf16 ? static_cast<const void*>(row.data()) : wide_row.data();
      const size_t piece = row.size() * size_of(t.dtype());
      for (size_t at = 0; at < t.v.bytes(); at += piece)
        ctx.backend->copy(ctx, static_cast<std::byte*>(t.v.data) + at, from, std::min(piece, t.v.bytes() - at));
    };
    fill(x), fill(w);
  }
  const Tensor before = ctx.workspace;
  ctx.workspace = workspace;
  const MatmulSegment segment{{w, {}}, y};
  const auto ms = time_ms(
      ctx, 9, [] {},
      [&] {
        matmul(ctx, {.x = x, .segments = {&segment, 1}});
      });
  ctx.workspace = before;
  return 2e3 * double(n) * double(n) * double(n) / percentile(ms, .5);
}

std::vector<double> time_ms(Context& ctx, int64_t rounds, const std::function<void()>& before,
                            const std::function<void()>& work) {
  std::vector<double> ms;
  before(), work();
  for (int64_t i = 0; i < rounds; ++i) {
    if (on_cuda(ctx)) {
      ms.push_back(device_ms(ctx, before, work));
    } else {
      before();
      const auto t = Clock::now();
      work();
      ms.push_back(ms_since(t));
    }
  }
  return ms;
}

namespace {

struct Options {
  ModelOptions model;
  std::vector<int64_t> prompt_tokens{512};
  int64_t first_prompt = 16, decode_tokens = 16, rounds = 3;
};

void generate_speed(const Options& o) {
  const auto start = Clock::now();
  const auto engine = open_engine(o.model);
  const double load_ms = ms_since(start);
  const int64_t V = engine->config().vocabulary;
  const Weights& w = engine->weights();
  KDA_CHECK(!on_cuda(engine->context()),
            "kda bench generate measures the CPU; on a GPU take kda bench decode and prefill");
  json line = bench_line(engine->context(), "generate");
  line.update({{"model", o.model.model},
               {"layers", w.layers.size()},
               {"parameters", engine->config().parameters()},
               {"weights", o.model.weights},
               {"precision", o.model.precision},
               {"threads", engine->threads().threads()}});

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
  CLI::App* c =
      bench->add_subcommand("generate", "prompt and decode speed, with the memory and product limits of the same run");
  add_model_options(*c, o->model);
  c->add_option("--prompt-tokens", o->prompt_tokens, "lengths to time")
      ->delimiter(',')
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--first-prompt-tokens", o->first_prompt, "prompt of the time to the first token")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--decode-tokens", o->decode_tokens, "tokens a round")->check(whole_number(1))->capture_default_str();
  c->add_option("--rounds", o->rounds, "each with its own probes")->check(whole_number(1))->capture_default_str();
  c->callback([o] { generate_speed(*o); });
  add_bench_kda(*bench);
  add_bench_decode(*bench);
  add_bench_prefill(*bench);
}

}  // namespace kda::cli
