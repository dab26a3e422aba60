// cli/main.cc — the program `kda`: a table of subcommands. Only this file ends the process.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <new>

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
    kda::cli::add_bench,
};
}

int main(int argc, char** argv) {
  CLI::App app("kda: run models of Kimi Delta Attention layers: constant memory at any length", "kda");
  app.require_subcommand(1);
  for (const auto add : kCommands) add(app);
  try {
    app.parse(argc, argv);
    std::cout.flush();
    if (!std::cout) throw kda::Error("standard output: cannot write");
    return 0;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 1;
  } catch (const std::bad_alloc&) {
    std::cerr << "kda: out of memory\n";
  } catch (const std::exception& e) {
    std::cerr << "kda: " << e.what() << '\n';
  }
  return 1;
}
