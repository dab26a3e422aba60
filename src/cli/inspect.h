// cli/inspect.h — what `kda inspect` finds in a model folder, apart from how it is printed.
#pragma once
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"

namespace kda::cli {

struct Inspection {
  std::filesystem::path folder;
  ModelConfig config;
  GenerationDefaults generation;
  std::vector<std::string> warnings;
  std::vector<TensorMatch> tensors;
  ModelFiles files;
  int64_t weight_bytes = 0;             // as stored, of all tensors that are used
  std::vector<std::string> not_finite;  // of --check: one message each

  bool complete() const;  // every tensor found as needed, none left over, none of those checked not finite
};

Inspection inspect_folder(const std::filesystem::path& folder);

void print_text(std::ostream&, const Inspection&);
void print_json(std::ostream&, const Inspection&);  // one object on one line

}  // namespace kda::cli
