#include "train/train_state.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <fstream>

#include "base/error.h"
#include "tests/temp_folder.h"

namespace kda {
namespace {
namespace fs = std::filesystem;
using test::TempFolder;

TrainState some_state() {
  TrainState s;
  s.step = 12, s.tokens = 4096, s.stage = 1, s.stage_step = 3, s.optimizer_step = 2;
  s.seconds = 0.1 + 0.2, s.usual_loss = 1.0 / 3;
  s.usual_count = 12, s.skipped_in_a_row = 1, s.best = 0.7000000000000001, s.best_step = 10, s.metrics_bytes = 99;
  s.cursor = {{1, 2, 3, 4}, {5, 6, 7, int64_t(1) << 60}};
  s.data = "of the data", s.model = "of the model", s.teacher = "of the teacher";
  return s;
}

TEST(TrainState, ReadsBackBitByBit) {
  const TrainState s = some_state();
  EXPECT_EQ(read_state(write_state(s), "x"), s);
  TrainState none = s;
  none.best.reset();
  EXPECT_EQ(read_state(write_state(none), "x"), none);
  EXPECT_FALSE(read_state(write_state(none), "x") == s);  // the comparison can fail
}

TEST(TrainState, RefusesWhatIsMissingOrWrong) {
  const std::string good = write_state(some_state());
  const auto error = [](std::string text) -> std::string {
    try {
      read_state(text, "state.json");
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string s = good;
    s.replace(s.find(from), from.size(), to);
    return error(s);
  };
  EXPECT_NE(changed("\"version\": 1", "\"version\": 2").find("another version of kda (2"), std::string::npos);
  EXPECT_EQ(changed("\"step\"", "\"stop\""), "state.json: step is missing");
  EXPECT_NE(changed("\"step\": 12", "\"step\": -1").find("step is -1"), std::string::npos);
  EXPECT_EQ(changed("\"offset\"", "\"ofset\""), "state.json: cursor: offset is missing");
  EXPECT_NE(error("{"), "no error");
}

TEST(LineLog, AppendsCutsAndSurvivesAFullDisk) {
  TempFolder dir;
  const fs::path file = dir / "m.jsonl";
  int64_t after_one = 0;
  {
    LineLog log(file);
    EXPECT_TRUE(log.append("one"));
    after_one = log.bytes();
    EXPECT_TRUE(log.append("two"));
  }
  LineLog log(file);
  EXPECT_EQ(log.bytes(), 8);
  EXPECT_THROW(log.cut(9), Error);
  log.cut(after_one);
  {
    // No file may grow beyond 10 bytes: as a disk that is full.
    const auto handler = signal(SIGXFSZ, SIG_IGN);
    struct rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    struct rlimit now = old;
    now.rlim_cur = 10;
    setrlimit(RLIMIT_FSIZE, &now);
    EXPECT_FALSE(log.append("a line that is too long"));
    EXPECT_EQ(test::read_bytes(file), "one\n");
    EXPECT_FALSE(log.append("x"));
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
  }
  EXPECT_TRUE(log.append("last"));
  EXPECT_EQ(test::read_bytes(file), "one\na line that is too long\nx\nlast\n");
}

TEST(RunFolder, RefusesWhatIsThere) {
  TempFolder dir;
  const auto error = [&](bool resume) -> std::string {
    try {
      RunFolder folder(dir / "run", resume);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  {
    RunFolder first(dir / "run", false);
    EXPECT_NE(error(false).find("another run is writing there now"), std::string::npos);
    EXPECT_FALSE(first.last_checkpoint());
  }
  EXPECT_EQ(error(false), "no error");  // nothing was begun yet
  test::write_bytes(dir / "run/metrics.jsonl", "");
  EXPECT_NE(error(false).find("go on with --resume"), std::string::npos);
  EXPECT_EQ(error(true), "no error");
  fs::create_directories(dir / "run/final");
  for (const bool resume : {false, true}) EXPECT_NE(error(resume).find("holds a finished run"), std::string::npos);
  test::write_bytes(dir / "file", "");
  EXPECT_THROW(RunFolder(dir / "file", false), Error);
}

TEST(RunFolder, RemovesWhatWasHalfWritten) {
  TempFolder dir;
  fs::create_directories(dir / "run/.draft-checkpoint-7");
  fs::create_directories(dir / "run/checkpoint-5");
  fs::create_directories(dir / "run/checkpoint-40");
  fs::create_directories(dir / "run/checkpoint-x");
  RunFolder folder(dir / "run", true);
  EXPECT_FALSE(fs::exists(dir / "run/.draft-checkpoint-7"));
  EXPECT_EQ(folder.last_checkpoint()->filename(), "checkpoint-40");
}

TEST(RunFolder, KeepsTheBestInOneGo) {
  TempFolder dir;
  RunFolder folder(dir / "run", false);
  for (const char* text : {"1", "2", "3"}) {
    const fs::path draft = folder.best_draft();
    fs::create_directories(draft);
    test::write_bytes(draft / "w", text);
    folder.keep_best();
    EXPECT_EQ(test::read_bytes(folder.best_model() / "w"), text);
    EXPECT_FALSE(fs::exists(draft));
  }
}

}  // namespace
}  // namespace kda
