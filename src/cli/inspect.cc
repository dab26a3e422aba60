// cli/inspect.cc — `kda inspect DIR`: the layers, every tensor against the table, and what running it takes in memory.
#include "cli/inspect.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>

#include "base/file.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/options.h"

namespace kda::cli {

namespace {
// Reads every float of every tensor that is used.
void check_all(Inspection& x, int threads) {
  std::vector<const TensorMatch*> todo;
  for (const auto& m : x.tensors)
    if (m.status == TensorMatch::Status::ok) todo.push_back(&m);
  ThreadPool pool(threads);
  Progress progress(std::cerr, progress_style(stderr), "reading", x.weight_bytes, "B");
  std::vector<std::string> problems(todo.size());
  const int64_t batch = 4 * pool.threads();
  for (int64_t from = 0; from < int64_t(todo.size()); from += batch) {
    const int64_t n = std::min(batch, int64_t(todo.size()) - from);
    pool.run(n, [&](int64_t task, int) {
      const TensorMatch& m = *todo[size_t(from + task)];
      try {
        check_finite(m.file_name, x.files.tensor(m.file_name, m.spec->shape));
      } catch (const Error& e) {
        problems[size_t(from + task)] = e.what();
      }
    });
    int64_t bytes = 0;
    for (int64_t i = from; i < from + n; ++i) {
      const auto& e = x.files.entry(todo[size_t(i)]->file_name);
      bytes += int64_t(e.end - e.begin);
    }
    progress.advance(bytes);
  }
  progress.finish();
  for (auto& p : problems)
    if (!p.empty()) x.not_finite.push_back(std::move(p));
}

struct Options {
  std::string model;
  bool json = false, check = false;
  int threads = 0;
};

void run(const Options& o) {
  Inspection x = inspect_folder(model_folder(o.model));
  if (o.check) check_all(x, o.threads);
  o.json ? print_json(std::cout, x) : print_text(std::cout, x);
  KDA_CHECK(x.complete(), x.folder.string(), ": cannot be run: ",
            x.not_finite.empty() ? "its tensors do not fit its config.json" : "it has values that are not finite");
}
}  // namespace

Inspection inspect_folder(const std::filesystem::path& folder) {
  constexpr size_t kMaxBytes = size_t(16) << 20;
  const auto config = folder / "config.json", generation = folder / "generation_config.json";
  KDA_CHECK(path_exists(config), config.string(), ": missing; a model folder needs config.json and safetensors");
  ModelFiles files(folder);
  ModelConfig c = parse_config(read_file(config, kMaxBytes), files.shapes(), config.string());
  Inspection x{.folder = folder,
               .config = {},
               .generation = {},
               .warnings = c.warnings,
               .tensors = match_tensors(c, files),
               .files = std::move(files),
               .weight_bytes = 0,
               .not_finite = {}};
  x.config = std::move(c);
  if (path_exists(generation))
    x.generation = parse_generation_config(read_file(generation, kMaxBytes), x.warnings, generation.string());
  for (const auto& m : x.tensors) {
    if (m.status != TensorMatch::Status::ok) continue;
    const auto& e = x.files.entry(m.file_name);
    x.weight_bytes += int64_t(e.end - e.begin);
  }
  return x;
}

bool Inspection::complete() const {
  using Status = TensorMatch::Status;
  return not_finite.empty() && std::all_of(tensors.begin(), tensors.end(), [](const TensorMatch& m) {
           return m.status == Status::ok || m.status == Status::computed;
         });
}

void add_inspect(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("inspect", "What a model folder holds, against what its config.json needs");
  c->add_option("model", o->model, "Folder of a model, or a hub id owner/name that is in the local cache")->required();
  c->add_flag("--json", o->json, "One JSON object instead of text");
  c->add_flag("--check", o->check, "Read every weight and look for values that are not finite");
  c->add_option("-t,--threads", o->threads, "Threads for --check; 0: one for each core")->check(CLI::Range(0, 1024));
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
