// Machines with fewer instructions: every test of this program again, with Highway and oneDNN held to what such a
// machine has. A process for each, since oneDNN reads its cap once.
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

std::ostream& operator<<(std::ostream& o, const Cap& cap) { return o << cap.name; }

const std::string kFilter = "-Each/Targets.*";  // all but this file's own

// Before each test, since one may choose targets of its own.
class HoldsToCap : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo&) override {
    const char* name = std::getenv("KDA_TEST_CAP");
    for (const Cap& cap : kCaps)
      if (name && std::string(name) == cap.name) {
        hwy::SetSupportedTargetsForTest(cap.highway);
        hwy::GetChosenTarget().DeInit();
        EXPECT_EQ(hwy::SupportedTargets() & ~cap.highway, 0);
      }
  }
};
[[maybe_unused]] const bool listens = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new HoldsToCap);
  return true;
}();

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
