// What is said where no CUDA device can be used, for every way that can come about.
#include <gtest/gtest.h>

#include "kernels/cuda/refusal.h"

namespace kda::test {
namespace {

using cuda::Found;

Found h100() {
  Found f;
  f.runtime = 13000, f.driver = 13010, f.devices = 1;
  f.name = "NVIDIA H100", f.major = 9, f.minor = 0;
  f.targets = "90a 80-virtual";
  return f;
}

TEST(CudaRefusal, ADeviceThatRanIsNotRefused) { EXPECT_EQ(cuda::refusal(h100()), ""); }

TEST(CudaRefusal, ADriverIsNeeded) {
  Found f;
  f.runtime = 13020;
  EXPECT_EQ(cuda::refusal(f),
            "no NVIDIA driver answers (libcuda.so.1 was not found): needs a driver for CUDA 13.0 or "
            "later (release 580 or later)");
}

TEST(CudaRefusal, AnOldDriver) {
  Found f;
  f.runtime = 13020, f.driver = 12040;
  EXPECT_EQ(cuda::refusal(f),
            "the NVIDIA driver is too old: needs a driver for CUDA 13.0 or later (release 580 or "
            "later), has one for CUDA 12.4");
  f.runtime = 12080, f.driver = 11080;
  EXPECT_EQ(cuda::refusal(f),
            "the NVIDIA driver is too old: needs a driver for CUDA 12.0 or later (release 525 or "
            "later), has one for CUDA 11.8");
}

// Within a major version an older driver runs a newer toolkit's machine code.
TEST(CudaRefusal, AnOlderDriverOfTheSameMajorVersion) {
  Found f = h100();
  f.runtime = 13020, f.driver = 13000;
  EXPECT_EQ(cuda::refusal(f), "");
  f.name = "NVIDIA A100", f.major = 8, f.kernel = Found::Kernel::ptx_too_new;
  EXPECT_EQ(cuda::refusal(f),
            "NVIDIA A100 is sm_80: this program has machine code for sm_90a and PTX of compute_80; compiling that PTX "
            "there needs a driver for CUDA 13.2 or later, has one for CUDA 13.0; for code that does, configure with "
            "-DKDA_CUDA_ARCHS=\"80\" and build again");
}

TEST(CudaRefusal, NoDevice) {
  Found f;
  f.runtime = f.driver = 13000;
  EXPECT_NE(cuda::refusal(f).find("shows no CUDA device"), std::string::npos);
  f.trouble = "system not yet initialized";
  EXPECT_NE(cuda::refusal(f).find("does not answer: system not yet initialized"), std::string::npos);
}

TEST(CudaRefusal, AnArchitectureWithoutCode) {
  Found f = h100();
  f.targets = "100a";
  f.kernel = Found::Kernel::no_code;
  EXPECT_EQ(cuda::refusal(f),
            "NVIDIA H100 is sm_90: this program has machine code for sm_100a, which does not run "
            "there; for code that does, configure with -DKDA_CUDA_ARCHS=\"90a;80-virtual\" and build "
            "again");
  f.name = "Tesla V100", f.major = 7;
  EXPECT_EQ(cuda::refusal(f), "Tesla V100 is sm_70: needs sm_80 or later");
}

TEST(CudaRefusal, AKernelThatFailed) {
  Found f = h100();
  f.kernel = Found::Kernel::failed, f.trouble = "unspecified launch failure";
  EXPECT_EQ(cuda::refusal(f), "NVIDIA H100 does not run a kernel: unspecified launch failure");
}

TEST(CudaRefusal, TargetsInWords) {
  EXPECT_EQ(cuda::targets_in_words("90a 80-virtual"), "machine code for sm_90a and PTX of compute_80");
  EXPECT_EQ(cuda::targets_in_words("80-real 90a"), "machine code for sm_80, sm_90a");
  EXPECT_EQ(cuda::targets_in_words("80-virtual"), "PTX of compute_80");
}

}  // namespace
}  // namespace kda::test
