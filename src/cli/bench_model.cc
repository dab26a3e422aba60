// cli/bench_model.cc — kda bench decode and kda bench prefill: a model's generated tokens and prompts on a GPU, beside
// what its memory and its products allow, probed in the same run. A result that is not finite, or that differs from the
// same computed another way, is not timed.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/file.h"
#include "cli/bench.h"
#include "cli/options.h"
#include "runtime/engine.h"

namespace kda::cli {

namespace {

using nlohmann::json;

struct Options {
  ModelOptions model;
  std::vector<int64_t> batches{1, 16, 64}, tokens{8192};
  int64_t context = 128, steps = 64, rounds = 3, first_prompt = 16, sequences = 1, block = 0;
  bool greedy = true;
};

// Bytes per second of reading the model's files with all threads, from wherever the system has them by now.
double file_read_bytes_per_s(ThreadPool& pool, const std::filesystem::path& folder) {
  constexpr int64_t kPiece = int64_t(8) << 20;
  struct Part {
    int file;
    int64_t at;
  };
  std::vector<std::shared_ptr<int>> files;
  std::vector<Part> parts;
  int64_t bytes = 0;
  for (const auto& e : std::filesystem::directory_iterator(folder)) {
    if (e.path().extension() != ".safetensors") continue;
    const int f = ::open(e.path().c_str(), O_RDONLY | O_CLOEXEC);
    KDA_CHECK(f >= 0, e.path().string(), ": cannot be opened");
    files.emplace_back(new int(f), [](const int* p) {
      ::close(*p);
      delete p;
    });
    for (int64_t at = 0; at < int64_t(e.file_size()); at += kPiece) parts.push_back({f, at});
    bytes += int64_t(e.file_size());
  }
  KDA_CHECK(bytes > 0, folder.string(), ": holds no .safetensors file");
  std::vector<std::vector<char>> buffer(size_t(pool.threads()), std::vector<char>(size_t(kPiece)));
  const auto t = BenchClock::now();
  pool.run(int64_t(parts.size()), [&](int64_t i, int worker) {
    const Part& p = parts[size_t(i)];
    KDA_CHECK(::pread(p.file, buffer[size_t(worker)].data(), size_t(kPiece), p.at) > 0, "a model file ends early");
  });
  return double(bytes) / ms_since(t) * 1e3;
}

struct Opened {
  std::unique_ptr<Engine> engine;
  double start_ms, load_ms;  // until the device answers; from there until the model is on it
};

int64_t used_bytes(const Context& ctx) {
  const DeviceStatus s = device_status(ctx);
  return s.memory_bytes - s.free_bytes;
}

Opened open_for(const Options& o) {
  EngineOptions options = engine_options(o.model);
  options.block_tokens = o.block;
  auto start = BenchClock::now();
  Context first;
  if (cuda_backend() && options.device != DeviceKind::cpu && cuda_backend()->unavailable().empty()) {
    first.backend = cuda_backend();
    first.backend->open(first);  // the process's first one also sets up the driver
  }
  const double start_ms = ms_since(start);
  start = BenchClock::now();
  Opened x{std::make_unique<Engine>(model_folder(o.model.model), options), start_ms, 0};
  KDA_CHECK(on_cuda(x.engine->context()),
            "kda bench decode and prefill measure a GPU, and none answers here; on the CPU take kda bench generate");
  {  // waits for the last copies
    Context& ctx = x.engine->context();
    int32_t here = 0;
    ctx.backend->copy(ctx, &here, ctx.backend->alloc(Dtype::i32, {1}).v.data, sizeof here);
  }
  x.load_ms = ms_since(start);
  return x;
}

json model_line(const Options& o, Engine& e, const char* op) {
  json line = bench_line(e.context(), op);
  line.update({{"model", std::filesystem::path(o.model.model).filename().string()},
               {"layers", e.weights().layers.size()},
               {"parameters", e.config().parameters()},
               {"weights", o.model.weights},
               {"weight_bytes", e.weights().decode_bytes()}});
  return line;
}

void need_finite(std::span<const float> logits, const char* what) {
  KDA_CHECK(!logits.empty() && std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }),
            "kda bench: the logits after ", what, " are not finite, not timed");
}

double distance(std::span<const float> a, std::span<const float> b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) error += std::pow(double(a[i]) - b[i], 2), norm += std::pow(double(b[i]), 2);
  return std::sqrt(error / norm);
}

// The same prompt twice gives the same bits, and in two pieces the same within the rounding of bf16.
void check_prompts(Engine& e, json& line) {
  const auto ids = random_ids(300, e.config().vocabulary);
  const auto run = [&](std::vector<size_t> cuts) {
    auto s = std::make_unique<Session>(e);
    size_t from = 0;
    for (size_t to : cuts) {
      const Prompt p{s.get(), std::span(ids).subspan(from, to - from)};
      e.prefill({&p, 1});
      from = to;
    }
    need_finite(s->logits(), "a prompt");
    return std::vector<float>(s->logits().begin(), s->logits().end());
  };
  const auto once = run({300}), again = run({300}), pieces = run({128, 300});
  KDA_CHECK(once == again, "kda bench: the same prompt twice gave other logits, not timed");
  const double apart = distance(pieces, once);
  KDA_CHECK(apart < 0.05, "kda bench: a prompt in two pieces is ", apart,
            " (relative L2) from the same in one, not timed");
  line["pieces_apart"] = apart;
}

// What the state of the batch moves: read and written once a step by KDA layers, read by full attention.
double state_bytes(const Engine& e, int64_t batch, int64_t context) {
  double bytes = 0;
  for (const LayerSpec& l : e.config().layers)
    bytes += l.mixer == Mixer::full ? 2.0 * 2 * double(l.kv_heads * l.head_dim) * double(context)
                                    : 8.0 * double(l.kda_heads * l.K * l.V);
  return bytes * double(batch);
}

void bench_decode(const Options& o) {
  Opened x = open_for(o);
  Engine& e = *x.engine;
  const int64_t vocabulary = e.config().vocabulary;
  SamplingParams params;
  if (!o.greedy) params.do_sample = true, params.temperature = 0.8, params.top_p = 0.95;
  {
    json line = model_line(o, e, "load");
    const auto t = BenchClock::now();
    Session s(e);
    const auto ids = random_ids(o.first_prompt, vocabulary);
    const Prompt p{&s, ids};
    e.prefill({&p, 1});
    SamplerScratch scratch;
    sample(params, s.logits(), s.tokens(), s.prompt_length(), 0, scratch);
    line["first_token_ms"] = x.start_ms + x.load_ms + ms_since(t);  // from the start of the program
    line["device_start_ms"] = x.start_ms;
    line["load_ms"] = x.load_ms, line["first_prompt_tokens"] = o.first_prompt;
    line["device_bytes"] = used_bytes(e.context());
    const auto folder = model_folder(o.model.model);
    double file_bytes = 0;
    for (const auto& f : std::filesystem::directory_iterator(folder))
      if (f.path().extension() == ".safetensors") file_bytes += double(f.file_size());
    const double file = file_read_bytes_per_s(e.threads(), folder), pinned = probe_pinned_copy_bytes_per_s(e.context());
    line.update({{"file_bytes", file_bytes},
                 {"bytes_per_s", file_bytes / x.load_ms * 1e3},
                 {"file_read_bytes_per_s", file},
                 {"pinned_copy_bytes_per_s", pinned},
                 {"limit", file < pinned ? "reading the files" : "copying from pinned memory"},
                 {"share", file_bytes / x.load_ms * 1e3 / std::min(file, pinned)}});
    print_line(line);
  }
  const double read_rate = probe_device_read_bytes_per_s(e.context());
  for (const int64_t B : o.batches) {
    json line = model_line(o, e, "decode");
    check_prompts(e, line);
    e.reserve_sessions(B);
    std::vector<Session> sessions;
    std::vector<Prompt> prompts;
    std::vector<std::vector<int32_t>> ids;
    for (int64_t n = 0; n < B; ++n) {
      sessions.emplace_back(e);
      ids.push_back(random_ids(o.context, vocabulary, uint32_t(n)));
    }
    for (int64_t n = 0; n < B; ++n) prompts.push_back({&sessions[size_t(n)], ids[size_t(n)]});
    e.prefill(prompts);
    std::vector<Engine::Draw> draws;
    SamplerScratch scratch;
    for (int64_t n = 0; n < B; ++n) {
      Session& s = sessions[size_t(n)];
      need_finite(s.logits(), "the prompt of a batch");
      s.push(sample(params, s.logits(), s.tokens(), s.prompt_length(), uint32_t(n), scratch).id);
      draws.push_back({&s, &params, uint32_t(n)});
    }
    std::vector<double> ms;
    for (int64_t i = 0; i < o.steps + 3; ++i) {
      const auto t = BenchClock::now();
      e.step(draws);
      if (i >= 3) ms.push_back(ms_since(t));  // the first load, the second record
    }
    {  // what was generated, run again as a prompt, leads to the same logits
      Session& s = sessions[0];
      Session* one = &s;
      e.decode({&one, 1});
      Session fresh(e);
      const std::vector<int32_t> all = s.tokens();
      const Prompt p{&fresh, all};
      e.prefill({&p, 1});
      need_finite(s.logits(), "generated tokens");
      const double apart = distance(s.logits(), fresh.logits());
      KDA_CHECK(apart < 0.1, "kda bench: logits after generated tokens are ", apart,
                " (relative L2) from those of the same tokens as a prompt");
      line["decode_prefill_apart"] = apart;
    }
    const double weights = double(e.weights().decode_bytes()), state = state_bytes(e, B, o.context + o.steps / 2),
                 p50 = percentile(ms, .5);
    put_spread(line, ms);
    line.update({{"batch", B},
                 {"context", o.context},
                 {"steps", o.steps},
                 {"sampling", o.greedy ? "greedy" : "top_p"},
                 {"tok_per_s", 1e3 * double(B) / p50},
                 {"state_bytes", state},
                 {"limit", "reading device memory: weights; with_state counts states read and written too"},
                 {"limit_bytes_per_s", read_rate},
                 {"share", weights / p50 * 1e3 / read_rate},
                 {"share_with_state", (weights + state) / p50 * 1e3 / read_rate},
                 {"device_bytes", used_bytes(e.context())}});
    print_line(line);
  }
}

void bench_prefill(const Options& o) {
  Opened x = open_for(o);
  Engine& e = *x.engine;
  double products = 0;
  for (const GemmShape& s : layer_products(e.weights())) products += double(s.N) * double(s.K) * double(s.count);
  for (const int64_t T : o.tokens) {
    json line = model_line(o, e, "prefill");
    check_prompts(e, line);
    e.reserve_sessions(o.sequences);
    const int64_t loaded = used_bytes(e.context());
    std::vector<double> ms;
    std::vector<float> first;
    // A long prompt warms itself up: its first block is a small part of it.
    const int64_t warm = T >= 100'000 ? 0 : 1, rounds = T >= 100'000 ? 1 : o.rounds;
    if (!warm) {
      const auto ids = random_ids(std::min<int64_t>(2 * e.options().block_tokens, T), e.config().vocabulary);
      Session s(e);
      const Prompt p{&s, ids};
      e.prefill({&p, 1});
    }
    for (int64_t round = 0; round < warm + rounds; ++round) {
      std::vector<Session> sessions;
      std::vector<std::vector<int32_t>> ids;
      for (int64_t n = 0; n < o.sequences; ++n) {
        sessions.emplace_back(e);
        ids.push_back(random_ids(T, e.config().vocabulary, uint32_t(n)));
      }
      std::vector<Prompt> prompts;
      for (int64_t n = 0; n < o.sequences; ++n) prompts.push_back({&sessions[size_t(n)], ids[size_t(n)]});
      const auto t = BenchClock::now();
      e.prefill(prompts);
      if (round >= warm) ms.push_back(ms_since(t));
      const auto logits = sessions[0].logits();
      need_finite(logits, "a prompt");
      if (first.empty()) first.assign(logits.begin(), logits.end());
      KDA_CHECK(std::equal(logits.begin(), logits.end(), first.begin()),
                "kda bench: the same prompt twice gave other logits");
    }
    const int64_t device = used_bytes(e.context());
    const double p50 = percentile(ms, .5), all = double(T * o.sequences), flops = probe_matmul_flops_per_s(e.context());
    put_spread(line, ms);
    line.update({{"tokens", T},
                 {"sequences", o.sequences},
                 {"block_tokens", e.options().block_tokens},
                 {"rounds", rounds},
                 {"tok_per_s", 1e3 * all / p50},
                 {"device_bytes", device},
                 {"device_bytes_above_loaded", device - loaded},
                 {"limit", "products of the layers' matrices"},
                 {"limit_flops_per_s", flops},
                 {"share", 2e3 * products * all / p50 / flops}});
    print_line(line);
  }
}

}  // namespace

void add_bench_decode(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* c = bench.add_subcommand("decode", "generated tokens a second on a GPU, loading and the first token");
  add_model_options(*c, o->model);
  c->add_option("--batch", o->batches, "sequences at once")
      ->delimiter(',')
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--context", o->context, "tokens each sequence begins with")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--steps", o->steps, "tokens to time")->check(whole_number(1))->capture_default_str();
  c->add_option("--first-prompt-tokens", o->first_prompt, "prompt of the time to the first token")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_flag("--greedy,!--sample", o->greedy, "the likeliest token, or temperature 0.8 and top_p 0.95");
  c->callback([o] { bench_decode(*o); });
}

void add_bench_prefill(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* c = bench.add_subcommand("prefill", "prompt tokens a second on a GPU, and the memory they take");
  add_model_options(*c, o->model);
  c->add_option("--tokens", o->tokens, "lengths")->delimiter(',')->check(whole_number(1))->capture_default_str();
  c->add_option("--sequences", o->sequences, "prompts of that length at once")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--block", o->block, "tokens of a pass; 0: the engine's own")
      ->check(whole_number())
      ->capture_default_str();
  c->add_option("--rounds", o->rounds, "timings of each length under 100,000")
      ->check(whole_number(1))
      ->capture_default_str();
  c->callback([o] { bench_prefill(*o); });
}

}  // namespace kda::cli
