#include "kernels/cuda/refusal.h"

#include <cstdlib>
#include <sstream>
#include <vector>

#include "base/error.h"

namespace kda::cuda {

namespace {

std::string version(int v) { return cat(v / 1000, ".", v % 1000 / 10); }

// The oldest release of NVIDIA's driver for Linux that runs programs of a CUDA toolkit (CUDA's release notes, "minor
// version compatibility").
std::string release_for(int runtime) {
  switch (runtime / 1000) {
    case 12: return " (release 525 or later)";
    case 13: return " (release 580 or later)";
    default: return "";
  }
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> out;
  for (std::string w; in >> w;) out.push_back(w);
  return out;
}

bool is_ptx(const std::string& target) { return target.ends_with("-virtual"); }
std::string number_of(const std::string& target) { return target.substr(0, target.find('-')); }

std::string list(const std::vector<std::string>& words, const char* before) {
  std::string out;
  for (const std::string& w : words) out += cat(out.empty() ? "" : ", ", before, w);
  return out;
}

// What would give this device code that runs there.
std::string remedy(const Found& f) {
  const int sm = f.major * 10 + f.minor;
  return cat("; for code that does, configure with -DKDA_CUDA_ARCHS=\"", sm, f.major >= 9 ? "a" : "",
             sm == 80 ? "\"" : ";80-virtual\"", " and build again");
}

std::string device_of(const Found& f) { return cat(f.name, " is sm_", f.major, f.minor); }

}  // namespace

std::string targets_in_words(const std::string& targets) {
  std::vector<std::string> code, ptx;
  for (const std::string& t : words_of(targets)) (is_ptx(t) ? ptx : code).push_back(number_of(t));
  if (code.empty()) return cat("PTX of ", list(ptx, "compute_"));
  return cat("machine code for ", list(code, "sm_"), ptx.empty() ? "" : " and PTX of ", list(ptx, "compute_"));
}

std::string refusal(const Found& f) {
  const std::string needed =
      cat("needs a driver for CUDA ", version(f.runtime / 1000 * 1000), " or later", release_for(f.runtime));
  if (f.driver == 0) return cat("no NVIDIA driver answers (libcuda.so.1 was not found): ", needed);
  if (f.driver / 1000 < f.runtime / 1000)
    return cat("the NVIDIA driver is too old: ", needed, ", has one for CUDA ", version(f.driver));
  if (f.name.empty()) {
    if (!f.trouble.empty()) return cat("the driver does not answer: ", f.trouble, " (nvidia-smi tells its state)");
    if (f.devices == 0) return "the driver shows no CUDA device (CUDA_VISIBLE_DEVICES may hide it)";
  }
  if (f.major < 8) return cat(device_of(f), ": needs sm_80 or later");
  const std::string have = cat(device_of(f), ": this program has ", targets_in_words(f.targets));
  switch (f.kernel) {
    case Found::Kernel::ran: return "";
    case Found::Kernel::no_code: return cat(have, ", which does not run there", remedy(f));
    case Found::Kernel::ptx_too_new:
      return cat(have, "; compiling that PTX there needs a driver for CUDA ", version(f.runtime),
                 " or later, has one for CUDA ", version(f.driver), remedy(f));
    case Found::Kernel::failed: return cat(f.name, " does not run a kernel: ", f.trouble);
  }
  return "";
}

}  // namespace kda::cuda
