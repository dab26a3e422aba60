// Machines with fewer instructions: every test of this program again, with Highway and oneDNN held to what such a
// machine has. The cap has to stand before the first kernel runs, hence a process of its own for each.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <hwy/targets.h>
#include <cstdlib>
#include <string>

namespace {

struct Cap {
  const char* name;
  int64_t highway;     // what is left of Highway's targets
  const char* onednn;  // DNNL_MAX_CPU_ISA
};
constexpr Cap kCaps[] = {{"avx2", HWY_AVX2 | HWY_SSE4 | HWY_SCALAR, "AVX2"}, {"scalar", HWY_SCALAR, "SSE41"}};

// Left out: this program's own, and a test of so many shapes that oneDNN's older code would take minutes to make.
const std::string kFilter = "-Each/Targets.*:Matmul.ARowDoesNotDependOnItsNeighboursNorOnThreads";

class CappedTargets : public testing::Environment {
  void SetUp() override {
    const char* name = std::getenv("KDA_TEST_CAP");
    for (const Cap& cap : kCaps)
      if (name && std::string(name) == cap.name) {
        hwy::SetSupportedTargetsForTest(cap.highway);
        ASSERT_EQ(hwy::SupportedTargets() & ~cap.highway, 0);
      }
  }
};
[[maybe_unused]] const auto* const environment = testing::AddGlobalTestEnvironment(new CappedTargets);

std::ostream& operator<<(std::ostream& o, const Cap& cap) { return o << cap.name; }

class Targets : public testing::TestWithParam<Cap> {};

TEST_P(Targets, EveryKernelTestPassesWithFewerInstructions) {
  const Cap& cap = GetParam();
  if ((hwy::SupportedTargets() & cap.highway) == 0) GTEST_SKIP() << "this machine has no " << cap.name;
  const std::string command = std::string("KDA_TEST_CAP=") + cap.name + " DNNL_MAX_CPU_ISA=" + cap.onednn + " /proc/" +
                              std::to_string(getpid()) + "/exe --gtest_brief=1 --gtest_color=no " + "--gtest_filter='" +
                              kFilter + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string output;
  char part[4096];
  for (size_t n; (n = fread(part, 1, sizeof part, pipe)) > 0;) output.append(part, n);
  const int status = pclose(pipe);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << output;
  EXPECT_NE(output.find("[  PASSED  ]"), std::string::npos) << output;
}

INSTANTIATE_TEST_SUITE_P(Each, Targets, testing::ValuesIn(kCaps),
                         [](const auto& each) { return std::string(each.param.name); });

}  // namespace
