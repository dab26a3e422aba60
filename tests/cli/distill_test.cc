// kda distill and kda train as a user has them: killed, interrupted, resumed.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>
#include <thread>

#include "tests/cli/run.h"
#include "tests/train/tiny_run.h"

namespace kda {
namespace {
namespace fs = std::filesystem;
using test::run_kda;
using test::TinyRun;

// `kda ARGUMENTS` in the background, its output dropped.
class Background {
 public:
  explicit Background(const std::vector<std::string>& arguments) {
    std::vector<char*> argv{const_cast<char*>(KDA_PROGRAM)};
    for (const auto& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    posix_spawn_file_actions_t quiet;
    posix_spawn_file_actions_init(&quiet);
    for (const int fd : {1, 2}) posix_spawn_file_actions_addopen(&quiet, fd, "/dev/null", O_WRONLY, 0);
    if (posix_spawn(&pid_, KDA_PROGRAM, &quiet, nullptr, argv.data(), environ) != 0) pid_ = -1;
    posix_spawn_file_actions_destroy(&quiet);
  }
  bool started() const { return pid_ > 0; }
  bool running() {
    if (ended_) return false;
    ended_ = waitpid(pid_, &status_, WNOHANG) == pid_;
    return !ended_;
  }
  void tell(int signal) {
    if (running()) ::kill(pid_, signal);
  }
  int end(int signal) {  // its wait status
    if (signal) tell(signal);
    if (!ended_) waitpid(pid_, &status_, 0);
    ended_ = true;
    return status_;
  }
  ~Background() { end(SIGKILL); }

 private:
  pid_t pid_ = -1;
  int status_ = 0;
  bool ended_ = false;
};

std::string command(const char* name, const std::string& file, const char* more = "") {
  std::string line = name;
  line.append(" '").append(file).append("' ").append(more);
  return line;
}

std::string with_file(const TinyRun& t, const std::string& out) {
  const fs::path file = t.dir / (out + ".yaml");
  test::write_bytes(file, t.yaml(out));
  return file.string();
}

TEST(DistillProgram, KilledAtRandomMomentsItEndsWithTheSameBits) {
  TinyRun t;
  const auto began = std::chrono::steady_clock::now();
  const auto whole = run_kda(command("distill", with_file(t, "whole")));
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  ASSERT_EQ(whole.status, 0) << whole.err;
  const std::string want = t.final_bytes("whole"), file = with_file(t, "killed");
  std::mt19937 random(std::random_device{}());
  int kills = 0;
  for (int i = 0; i < 6 && !fs::exists(t.dir / "killed/final"); ++i) {
    Background run({"distill", file, "--resume"});
    ASSERT_TRUE(run.started());
    std::this_thread::sleep_for(
        std::chrono::duration<double>(seconds * std::uniform_real_distribution<>(0.05, 0.6)(random)));
    kills += run.running();
    run.end(SIGKILL);
  }
  EXPECT_GT(kills, 0);
  if (!fs::exists(t.dir / "killed/final")) {
    const auto last = run_kda(command("distill", file, "--resume"));
    ASSERT_EQ(last.status, 0) << last.err;
  }
  EXPECT_EQ(t.final_bytes("killed") == want, true) << "after " << kills << " kills";
  EXPECT_EQ(t.metrics("killed", "train").size(), 12u);
}

TEST(DistillProgram, InterruptedItSavesAndLeaves) {
  TinyRun t;
  const std::string file = with_file(t, "out");
  Background run({"distill", file, "--set", "stages.1.max_steps=100000"});
  ASSERT_TRUE(run.started());
  while (run.running() && test::read_bytes(t.dir / "out/metrics.jsonl").find("\"match\"") == std::string::npos)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ASSERT_TRUE(run.running());
  run.tell(SIGINT);  // twice at once, as `timeout` tells a program and then its group
  const int status = run.end(SIGINT);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  const auto last = t.metrics("out", "train").back()["step"].get<int64_t>();
  EXPECT_TRUE(fs::exists(t.dir / ("out/checkpoint-" + std::to_string(last)))) << last;  // of the very last step
  const auto refused = run_kda(command("distill", file));
  EXPECT_EQ(refused.status, 1);
  EXPECT_NE(refused.err.find("go on with --resume"), std::string::npos);
}

TEST(DistillProgram, SaysWhatIsWrong) {
  TinyRun t;
  EXPECT_NE(run_kda("distill").err.find("needed a run file"), std::string::npos);
  EXPECT_NE(run_kda("distill /nowhere.yaml").err.find("/nowhere.yaml"), std::string::npos);
  const auto wrong = run_kda(command("distill", with_file(t, "out"), "--set sede=1"));
  EXPECT_EQ(wrong.status, 1);
  EXPECT_NE(wrong.err.find("did you mean 'seed'?"), std::string::npos);
  EXPECT_FALSE(fs::exists(t.dir / "out"));
  EXPECT_NE(run_kda(command("train", with_file(t, "out"))).err.find("run it with kda distill"), std::string::npos);
  EXPECT_NE(run_kda("train --keys").out.find("# Keys of a run file"), std::string::npos);
}

TEST(DistillProgram, LeavesAfterItsMinutes) {
  TinyRun t;
  const auto r = run_kda(command("distill", with_file(t, "out"), "--set stages.1.max_steps=100000 --minutes 0.02"));
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.err.find("saved; go on with --resume"), std::string::npos);
}

}  // namespace
}  // namespace kda
