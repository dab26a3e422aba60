// Run files of any bytes, with a --set from what follows the last line that begins with '%': a run whose written form
// reads back as itself, or an Error.
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "train/run_file.h"
#include "train/train_state.h"
#include "train/yaml.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> settings;
  if (const size_t at = text.rfind("\n%"); at != text.npos) {
    settings.push_back(text.substr(at + 2));
    text.resize(at + 1);
  }
  for (const bool only_text : {false, true}) {
    try {
      std::vector<std::string> notes;
      const kda::RunFile run = kda::read_run_file(text, "run.yaml", settings, only_text, notes);
      const std::string written = kda::write_run_file(run);
      const kda::RunFile again = kda::read_run_file(written, "written", {}, only_text, notes);
      if (kda::write_run_file(again) != written || again.stages.size() != run.stages.size()) std::abort();
      for (const auto& s : run.stages) {
        kda::parameter_rules(s);
        if (kda::steps_of(s, 1000000) < 1) std::abort();
      }
    } catch (const kda::Error&) {
    }
  }
  try {
    const auto state = kda::read_state(text, "state.json");
    if (!(kda::read_state(kda::write_state(state), "again") == state)) std::abort();
  } catch (const kda::Error&) {
  }
  return 0;
}
