// kda report as a user types it.
#include <gtest/gtest.h>

#include "tests/cli/run.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

TEST(ReportCommand, TakesFoldersAndFiles) {
  const TempFolder f;
  for (const char* name : {"one", "two"}) {
    std::filesystem::create_directories(f / name);
    write_bytes(f / name / "metrics.jsonl", R"({"kind":"train","stage":"s","step":1,"tokens":2,"seconds":3,"loss":4})"
                                            "\n{\"kind\":\"tr");
  }
  write_bytes(f / "one" / "run.yaml", "project_name: <b>\n");
  const std::string out = (f / "r.html").string();
  const Ran r = run_kda("report " + (f / "one").string() + "/ " + (f / "two/metrics.jsonl").string() + " -o " + out);
  ASSERT_EQ(r.status, 0) << r.err;
  const std::string page = read_bytes(out);
  EXPECT_NE(page.find("<title>one, two</title>"), std::string::npos);
  EXPECT_NE(page.find("project_name: &lt;b&gt;"), std::string::npos);
  EXPECT_EQ(run_kda("report -o - " + (f / "one").string()).out.substr(0, 15), "<!DOCTYPE html>");
}

TEST(ReportCommand, ErrorsNameTheFile) {
  const TempFolder f;
  Ran r = run_kda("report " + f.path().string() + " -o " + (f / "r.html").string());
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("metrics.jsonl"), std::string::npos) << r.err;
  write_bytes(f / "metrics.jsonl", "{\"kind\":\"train\"}\n");
  r = run_kda("report " + f.path().string() + " -o " + (f / "r.html").string());
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("metrics.jsonl line 1"), std::string::npos) << r.err;
  EXPECT_FALSE(std::filesystem::exists(f / "r.html"));
}

}  // namespace
}  // namespace kda::test
