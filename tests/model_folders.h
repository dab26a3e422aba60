// tests/model_folders.h — where there are whole models to test with.
#pragma once
#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "tests/golden.h"

namespace kda::test {

// Every folder with a model and its expected values: all of the golden folder, nano-teacher, and our own test data.
inline std::vector<std::filesystem::path> model_folders() {
  namespace fs = std::filesystem;
  std::vector<fs::path> roots, out;
  if (const char* dir = std::getenv("KDA_GOLDEN_DIR")) roots.push_back(dir);
  else roots = {fs::path(KDA_SOURCE_DIR) / "../shared/golden", fs::path(KDA_SOURCE_DIR) / "tests/golden"};
  for (const char* family : {"llama", "fla"}) roots.push_back(fs::path(KDA_SOURCE_DIR) / "tests/data" / family);
  roots.push_back(shared_path("nano-teacher"));
  std::set<std::string> names;
  const auto add = [&](const fs::path& p) {
    if (fs::exists(p / "config.json") && fs::exists(p / "expected.safetensors") && names.insert(p.filename().string()).second)
      out.push_back(p);
  };
  for (const fs::path& root : roots) {
    if (root.empty() || !fs::exists(root)) continue;
    add(root);
    for (const auto& e : fs::directory_iterator(root)) add(e.path());
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace kda::test
