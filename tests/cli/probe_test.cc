// kda probe and kda needles as a user types them, and the probes that a training run calls.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli/run.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

using nlohmann::json;

const std::string kNano = KDA_SOURCE_DIR "/assets/nano-teacher", kDemo = KDA_SOURCE_DIR "/assets/demo/";

TEST(ProbeCommand, MeasuresAModelBesideItsTeacher) {
  const Ran r =
      run_kda("probe -m " + kNano + " --teacher " + kNano + " --needles " + kDemo + "needles.jsonl --arithmetic " +
              kDemo + "arithmetic.jsonl --text " + kDemo +
              "heldout.jsonl --cut 128 --limit 4 --max-length-chars 800 --keys 1 --json --answers --precision exact");
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_EQ(j["needles"]["asked"], 4);
  EXPECT_EQ(j["needles"]["found"], 1.0);
  EXPECT_EQ(j["needles"]["groups"].size(), 2u);
  EXPECT_EQ(j["needles"]["answers"][0]["said"], j["needles"]["answers"][0]["answer"]);
  EXPECT_EQ(j["arithmetic"]["asked"], 4);
  EXPECT_EQ(j["held_out"]["documents"], 4);
  EXPECT_EQ(j["held_out"]["tokens"], 4 * 128);
  EXPECT_EQ(j["held_out"]["loss"], j["held_out"]["teacher_loss"]);
  EXPECT_LT(j["held_out"]["kl"], 1e-6);
  EXPECT_EQ(j["held_out"]["top1_agreement"], 1.0);
  const Ran text = run_kda("probe -m " + kNano + " --arithmetic " + kDemo + "arithmetic.jsonl --limit 2 --answers");
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_NE(text.out.find("whole answers"), std::string::npos) << text.out;
}

TEST(ProbeCommand, ErrorsSayWhatIsMissing) {
  Ran r = run_kda("probe -m " + kNano);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("nothing to measure"), std::string::npos) << r.err;
  const TempFolder f;
  write_bytes(f / "q.jsonl", "{\"prompt\":\"a\",\"answer\":\" b\"}\n{]\n");
  r = run_kda("probe -m " + kNano + " --needles " + (f / "q.jsonl").string());
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("q.jsonl line 2"), std::string::npos) << r.err;
  r = run_kda("probe -m " + kNano + " --needles " + kDemo + "needles.jsonl --keys 7");
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("keys must be 7"), std::string::npos) << r.err;
}

TEST(NeedlesCommand, MakesQuestionsThatProbeReads) {
  const TempFolder f;
  const std::string file = (f / "n.jsonl").string();
  ASSERT_EQ(run_kda("needles --count 3 --chars 400 --seed 4 -o " + file).status, 0);
  const std::string first = read_bytes(file);
  ASSERT_EQ(run_kda("needles --count 3 --chars 400 --seed 4 -o " + file).status, 0);
  EXPECT_EQ(read_bytes(file), first);
  EXPECT_NE(run_kda("needles --count 3 --chars 400 --seed 5").out, first);
  const Ran r = run_kda("probe --json -m " + kNano + " --needles " + file);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(json::parse(r.out)["needles"]["found"], 1.0);
  const Ran essay =
      run_kda("needles --haystack essay --count 2 --as-text --chars 300 --text " + kDemo + "heldout.jsonl");
  ASSERT_EQ(essay.status, 0) << essay.err;
  const std::string text = json::parse(essay.out.substr(0, essay.out.find('\n')))["text"];
  EXPECT_NE(text.find("mentioned in the provided text is "), std::string::npos);
  EXPECT_EQ(run_kda("needles --haystack essay").status, 1);
}

}  // namespace
}  // namespace kda::test
