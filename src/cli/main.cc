// cli/main.cc — the program `kda`: a table of subcommands. Only this file ends the process.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include "base/error.h"
#include "cli/commands.h"

namespace {
constexpr void (*kCommands[])(CLI::App&) = {
    kda::cli::add_inspect,
    kda::cli::add_generate,
    kda::cli::add_score,
    kda::cli::add_tokenize,
    kda::cli::add_detokenize,
    kda::cli::add_init,
    kda::cli::add_probe,
    kda::cli::add_needles,
    kda::cli::add_report,
    kda::cli::add_convert,
    kda::cli::add_demo,
    kda::cli::add_capture,
    kda::cli::add_bench,
    kda::cli::add_distill,
    kda::cli::add_train,
};

// A first word that is no subcommand; the parser would only say that one is missing.
void check_command(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::string known;
  for (const CLI::App* c : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (c->check_name(argv[1])) return;
    known += ' ' + c->get_name();
  }
  throw kda::Error(kda::cat("unknown command '", argv[1], "'; there are:", known));
}
}  // namespace

int main(int argc, char** argv) {
  CLI::App app("kda: run models of Kimi Delta Attention layers: constant memory at any length", "kda");
  app.require_subcommand(1);
  for (const auto add : kCommands) add(app);
  try {
    check_command(app, argc, argv);
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {  // --help among them
      if (app.exit(e) != 0) return 1;
    }
    std::cout.flush();
    if (!std::cout) throw kda::Error("standard output: cannot write");
    return 0;
  } catch (const std::bad_alloc&) {
    std::cerr << "kda: out of memory\n";
  } catch (const std::exception& e) {
    std::cerr << "kda: " << e.what() << '\n';
  }
  return 1;
}
