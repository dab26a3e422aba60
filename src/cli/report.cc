// cli/report.cc — kda report: training runs as one HTML page.
#include <iostream>

#include "base/file.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/report.h"

namespace kda::cli {

namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> runs;
  std::string out = "report.html", title;
};

// A run's folder with its metrics.jsonl and run.yaml, or a metrics file.
ReportRun read_run(const std::string& given) {
  fs::path folder = given, metrics = given;
  if (is_folder(folder))
    metrics = folder / "metrics.jsonl";
  else
    folder = folder.parent_path();
  KDA_CHECK(path_exists(metrics), given, ": needed a run's folder with metrics.jsonl in it, or such a file");
  ReportRun r;
  r.name = is_folder(given) ? (folder.has_filename() ? folder : folder.parent_path()).filename().string()
           : metrics.filename() == "metrics.jsonl" && folder.has_filename() ? folder.filename().string()
                                                                            : metrics.stem().string();
  if (r.name.empty() || r.name == ".") r.name = given;
  r.where = metrics.string();
  r.metrics = read_file(metrics);
  if (path_exists(folder / "run.yaml")) r.run_file = read_file(folder / "run.yaml");
  return r;
}

void run(const Options& o) {
  std::vector<ReportRun> runs;
  for (const std::string& given : o.runs) {
    runs.push_back(read_run(given));
    for (size_t i = 0; i + 1 < runs.size(); ++i)  // two folders of one name: the paths tell them apart
      if (runs[i].name == runs.back().name) runs[i].name = o.runs[i], runs.back().name = given;
  }
  std::string title = o.title;
  for (const ReportRun& r : runs)
    if (o.title.empty()) title += (title.empty() ? "" : ", ") + r.name;
  const std::string page = report_page(runs, title);
  if (o.out == "-") {
    std::cout << page;
    return;
  }
  AtomicFile file{o.out};
  file.write(page);
  file.commit();
  std::cerr << "wrote " << o.out << '\n';
}

}  // namespace

void add_report(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("report", "training runs as one HTML page: losses, rates, speed, evaluations");
  c->add_option("runs", o->runs,
                "folders of runs (metrics.jsonl, run.yaml), or metrics files; several are drawn together")
      ->required();
  c->add_option("-o,--out", o->out, "file to write; - for standard output")->capture_default_str();
  c->add_option("--title", o->title, "title of the page; default: the runs' names");
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
