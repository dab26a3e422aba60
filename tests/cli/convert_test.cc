// kda convert as a user types it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "tests/cli/run.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class ConvertProgram : public testing::Test {
 protected:
  Ran convert(const std::string& arguments, const std::string& teacher = KDA_SOURCE_DIR "/assets/nano-teacher") const {
    return run_kda("convert '" + teacher + "' -o '" + (temp / "new").string() + "' " + arguments);
  }
  void fails(const std::string& arguments, const std::string& why) const {
    const Ran r = convert(arguments);
    EXPECT_EQ(r.status, 1) << arguments;
    EXPECT_NE(r.err.find(why), std::string::npos) << arguments << "\n" << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_FALSE(fs::exists(temp / "new")) << arguments;
  }
  std::string sample() const {
    std::string text;
    for (int i = 0; i < 60; ++i) text += "The " + std::to_string(i * i) + "th word of the text is not this one. ";
    write_bytes(temp / "sample.jsonl", json{{"text", text}}.dump() + "\n\n" + json{{"text", "short"}}.dump() + "\n");
    return (temp / "sample.jsonl").string();
  }
  TempFolder temp;
};

TEST_F(ConvertProgram, MakesAModelThatRuns) {
  const Ran r = convert("--kda hybrid:3:1 --gate bounded --data '" + sample() + "' --sample-tokens 300 --dtype f32");
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.err.find("6 of 8 layers are KDA"), std::string::npos) << r.err;
  EXPECT_NE(read_bytes(temp / "new/README.md").find("calibrated on 300 tokens"), std::string::npos);
  const json config = json::parse(read_bytes(temp / "new/config.json"));
  EXPECT_EQ(config["lower_bound"], -5);
  EXPECT_EQ(config["dtype"], "float32");
  EXPECT_EQ(config["no_rope_layers"], json(std::vector<int>(8, 0)));

  const std::string text =
      "'" + sample() + "' --cut 256 --max-tokens 512 --json --compare '" KDA_SOURCE_DIR "/assets/nano-teacher'";
  const auto kl = [&](const fs::path& model) {
    const Ran s = run_kda("score -m '" + model.string() + "' --text-file " + text);
    EXPECT_EQ(s.status, 0) << s.err;
    return s.status ? 1e9 : json::parse(s.out)["compare"]["kl"].get<double>();
  };
  const double calibrated = kl(temp / "new");
  fs::remove_all(temp / "new");
  ASSERT_EQ(convert("--kda hybrid:3:1 --init fla").status, 0);
  EXPECT_LT(calibrated, 0.8 * kl(temp / "new"));
}

TEST_F(ConvertProgram, SaysWhatIsWrong) {
  fails("", "give --data FILE");
  fails("--data '" + (temp / "nowhere.jsonl").string() + "'", "nowhere.jsonl: cannot open");
  fails("--init fla --data x", "measures nothing");
  fails("--init fla --kda 0,8", "8-8 is not within the 8 layers 0-7");
  fails("--init fla --kda none", "names no layer");
  fails("--init fla --gate bounded --lower-bound -9", "lower-bound");
  fails("--init best", "best");
  fails("--init fla --dtype int8", "dtype");
  write_bytes(temp / "bad.jsonl", "{\"text\": 3}\n");
  fails("--data '" + (temp / "bad.jsonl").string() + "'", "line 1: needed an object with a string `text`");
  write_bytes(temp / "short.txt", "too little");
  fails("--data '" + (temp / "short.txt").string() + "'", "needed 64 or more");
  fs::create_directory(temp / "empty");
  fails("--data '" + (temp / "empty").string() + "'", "holds no .jsonl");

  fs::create_directory(temp / "new");
  write_bytes(temp / "new/mine", "1");
  const Ran there = convert("--init fla");
  EXPECT_EQ(there.status, 1);
  EXPECT_NE(there.err.find("exists already"), std::string::npos) << there.err;
  EXPECT_EQ(read_bytes(temp / "new/mine"), "1");
  fs::remove_all(temp / "new");

  const Ran nobody = convert("--init fla", (temp / "nobody").string());
  EXPECT_EQ(nobody.status, 1);
  EXPECT_NE(nobody.err.find("no such folder"), std::string::npos) << nobody.err;

  // Twice: what is KDA already cannot become KDA.
  ASSERT_EQ(convert("--init fla --kda 0-2").status, 0);
  fs::rename(temp / "new", temp / "first");
  const Ran again = convert("--init fla --kda all", (temp / "first").string());
  EXPECT_EQ(again.status, 1);
  EXPECT_NE(again.err.find("layer 0 is KDA already; name the layers that are full attention: 3, 4, 5, 6, 7"),
            std::string::npos)
      << again.err;
  EXPECT_EQ(convert("--init fla --kda 3-7", (temp / "first").string()).status, 0);
}

}  // namespace
}  // namespace kda::test
