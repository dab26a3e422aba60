// Asking for a device: a message where it cannot be had, and the CPU where any will do.
#include <gtest/gtest.h>

#include "tests/cli/run.h"
#include "tests/cuda.h"

namespace kda::test {
namespace {

const std::string kModel = "'" KDA_SOURCE_DIR "/assets/nano-teacher'";

TEST(Device, CudaWithoutADeviceSaysWhy) {
  const std::string why = no_cuda();
  if (why.empty()) GTEST_SKIP() << "a CUDA device answers";
  const Ran r = run_kda("generate -m " + kModel + " --device cuda -n 1 -p hi");
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_NE(r.err.find("device cuda: "), std::string::npos) << r.err;
  EXPECT_NE(r.err.find(cuda_backend() ? why : "preset `cuda`"), std::string::npos) << r.err;
}

TEST(Device, AnOldDriverIsToldWithWhatIsNeeded) {
#ifdef KDA_FAKE_DRIVER
  const std::string old = "FAKE_DRIVER_VERSION=11040 LD_LIBRARY_PATH='" KDA_FAKE_DRIVER "':$LD_LIBRARY_PATH";
  const std::string arguments = "generate -m " + kModel + " --temperature 0 -n 4 -p hi --device ";
  const Ran r = run_kda(arguments + "cuda", old);
  EXPECT_EQ(r.status, 1);
  EXPECT_EQ(r.out, "");
  EXPECT_NE(r.err.find("device cuda: the NVIDIA driver is too old: needs a driver for CUDA 1"), std::string::npos)
      << r.err;
  EXPECT_NE(r.err.find("has one for CUDA 11.4"), std::string::npos) << r.err;
  const Ran automatic = run_kda(arguments + "auto", old), cpu = run_kda(arguments + "cpu");
  EXPECT_EQ(automatic.status, 0) << automatic.err;
  EXPECT_EQ(automatic.out, cpu.out);
#else
  GTEST_SKIP() << "built without CUDA";
#endif
}

TEST(Device, AutoTakesTheCpuWhereNothingElseAnswers) {
  if (no_cuda().empty()) GTEST_SKIP() << "a CUDA device answers";
  const std::string arguments = "generate -m " + kModel + " --temperature 0 -n 4 -p hi --device ";
  const Ran automatic = run_kda(arguments + "auto"), cpu = run_kda(arguments + "cpu");
  EXPECT_EQ(automatic.status, 0) << automatic.err;
  EXPECT_EQ(automatic.out, cpu.out);
}

TEST(Device, CudaAndExactProductsExcludeEachOther) {
  const Ran r = run_kda("generate -m " + kModel + " --device cuda --precision exact -n 1 -p hi");
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("device cuda: "), std::string::npos) << r.err;
}

TEST(Device, AnotherNameIsRefused) { EXPECT_NE(run_kda("generate -m " + kModel + " --device tpu -p hi").status, 0); }

}  // namespace
}  // namespace kda::test
