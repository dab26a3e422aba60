// cli/commands.h — every subcommand of `kda`. Each adds itself to the program; its callback throws Error.
#pragma once
#include <CLI/CLI.hpp>

namespace kda::cli {

void add_inspect(CLI::App&);
void add_generate(CLI::App&);
void add_score(CLI::App&);
void add_tokenize(CLI::App&);
void add_detokenize(CLI::App&);
void add_init(CLI::App&);
void add_probe(CLI::App&);
void add_needles(CLI::App&);
void add_report(CLI::App&);
void add_convert(CLI::App&);
void add_demo(CLI::App&);
void add_capture(CLI::App&);
void add_bench(CLI::App&);
void add_distill(CLI::App&);
void add_train(CLI::App&);

}  // namespace kda::cli
