// kda demo: the table of a teacher and its students, and the same numbers as JSON.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli/run.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

using nlohmann::json;

const std::string kNano = KDA_SOURCE_DIR "/assets/nano-teacher", kDemo = KDA_SOURCE_DIR "/assets/demo/";
const std::string kData = " --needles " + kDemo + "needles.jsonl --arithmetic " + kDemo + "arithmetic.jsonl --text " +
                          kDemo + "heldout.jsonl --cut 96 --limit 2 ";

TEST(DemoCommand, TableAndJsonSayTheSame) {
  const TempFolder f;
  // A model beside itself: the comparison has known values.
  const std::string out = (f / "demo.json").string();
  const Ran r = run_kda("demo -m " + kNano + " --after " + kNano + kData +
                        "--precision exact --report some/report.html --json " + out);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.out.find("held-out loss"), std::string::npos) << r.out;
  EXPECT_NE(r.out.find("some/report.html"), std::string::npos);
  EXPECT_NE(r.out.find("student after    right"), std::string::npos) << r.out;
  const json j = json::parse(read_bytes(out));
  ASSERT_EQ(j["models"].size(), 2u);
  EXPECT_EQ(j["models"][0]["name"], "teacher");
  EXPECT_FALSE(j["models"][0].contains("kl"));
  EXPECT_EQ(j["models"][1]["held_out_loss"], j["models"][0]["held_out_loss"]);
  EXPECT_LT(j["models"][1]["kl"], 1e-6);
  EXPECT_EQ(j["models"][1]["top1_agreement"], 1.0);
  EXPECT_EQ(j["models"][1]["needle_1key"], 1.0);
  // Keys and values of 8 layers, 2 heads of 64, fp32.
  EXPECT_EQ(j["models"][0]["memory_bytes"]["32k"], 32768 * 8 * 2 * 2 * 64 * 4);
  EXPECT_EQ(j["needle"]["said"][1]["right"], true);
  EXPECT_EQ(j["asked"], (json{{"documents", 2}, {"tokens", 192}, {"needles", 2}, {"arithmetic", 2}}));
}

TEST(DemoCommand, RefusesMissingModelsAndTheModelsOwnFiles) {
  const TempFolder f;
  const std::string other = (f / "other").string();
  ASSERT_EQ(run_kda("demo -m " + kNano + " --after " + other + kData).status, 1);
  const Ran r = run_kda("demo -m " + kNano + " --after " + kNano + kData + "--json " + kNano + "/config.json");
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("file of the model"), std::string::npos) << r.err;
}

}  // namespace
}  // namespace kda::test
