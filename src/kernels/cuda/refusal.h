// kernels/cuda/refusal.h — why no CUDA device can be used, in words, from what was found; needs no CUDA to be built or
// tested.
#pragma once
#include <string>

namespace kda::cuda {

// What was found while looking for a device, as far as it went.
struct Found {
  enum class Kernel {
    ran,
    no_code,      // neither machine code nor PTX of this program is for the device
    ptx_too_new,  // there is PTX, of a toolkit newer than the driver
    failed,
  };

  int runtime = 0, driver = 0;  // 13020 for CUDA 13.2; driver 0: none answers
  int devices = 0;
  std::string trouble;          // CUDA's words where a call failed; empty: none did
  std::string name;             // of device 0
  int major = 0, minor = 0;     // its compute capability
  std::string targets;          // KDA_CUDA_ARCHS: "90a 80-virtual"
  Kernel kernel = Kernel::ran;  // the probe's fate
};

// Empty when device 0 can be used; else what is needed and what is there.
std::string refusal(const Found&);

// "90a 80-virtual" in words: "machine code for sm_90a and PTX of compute_80".
std::string targets_in_words(const std::string& targets);

}  // namespace kda::cuda
