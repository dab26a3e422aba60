// cli/init.cc — `kda init --like NAME -o DIR`: a random checkpoint of a named size, for measurements.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>

#include "base/error.h"
#include "base/progress.h"
#include "checkpoint/random.h"
#include "cli/commands.h"

namespace kda::cli {

namespace {
struct Options {
  std::string like, out, kda, dtype = "bf16";
  int64_t layers = 0;
  uint64_t seed = 0;
  double shard_gb = 5;
  int threads = 0;
};

void run(const Options& o) {
  const ModelConfig config = named_model(o.like, o.layers ? std::optional(o.layers) : std::nullopt, o.kda);
  const RandomCheckpoint options{.seed = o.seed,
                                 .dtype = o.dtype == "f32" ? Dtype::f32 : Dtype::bf16,
                                 .max_shard_bytes = size_t(o.shard_gb * 1e9)};
  ThreadPool pool(o.threads);
  Progress progress(std::cerr, progress_style(stderr), o.out, weight_bytes(config, options.dtype), "B");
  write_random_checkpoint(o.out, config, options, pool, [&](size_t bytes) { progress.advance(int64_t(bytes)); });
  progress.finish();
  std::cerr << o.out << ": " << o.like << ", " << config.layers.size() << " layers, " << config.parameters()
            << " parameters\n";
}
}  // namespace

void add_init(CLI::App& app) {
  auto o = std::make_shared<Options>();
  std::string names = "Models:";
  for (const auto& [name, what] : named_models())
    names += cat("\n  ", name, std::string(20 - std::min<size_t>(name.size(), 18), ' '), what);
  CLI::App* c = app.add_subcommand("init", "Write a random checkpoint of a named size");
  c->add_option("--like", o->like, "Name of the model whose shape it has (below)")->required();
  c->add_option("-o,--out", o->out, "Folder to write")->required();
  c->add_option("--layers", o->layers, "So many layers instead of the model's own")->check(CLI::Range(1, 10'000));
  c->add_option("--kda", o->kda, "Which layers are KDA: all, none, hybrid:KDA:FULL, or a list such as 0,1,5-9");
  c->add_option("--seed", o->seed, "The weights depend on it and on names and shapes alone")->capture_default_str();
  c->add_option("--dtype", o->dtype, "bf16 or f32")->check(CLI::IsMember({"bf16", "f32"}))->capture_default_str();
  c->add_option("--shard-gb", o->shard_gb, "Largest file, in GB")->check(CLI::Range(0.001, 1e6))->capture_default_str();
  c->add_option("-t,--threads", o->threads, "0: one for each core")->check(CLI::Range(0, 1024))->capture_default_str();
  c->footer(names);
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
