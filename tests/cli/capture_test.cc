#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/cli/run.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

const std::string kTeacher = std::string(KDA_SOURCE_DIR) + "/assets/nano-teacher";

std::string text() {
  std::string lines;
  for (int i = 0; i < 6; ++i) {
    nlohmann::json j{{"text", ""}};
    for (int n = 0; n < 12; ++n)
      j["text"] = j["text"].get<std::string>() + "Line " + std::to_string(i * n) + " of a small text about nothing. ";
    lines += j.dump() + "\n";
  }
  return lines;
}

TEST(CaptureCommand, StoresResumesAndRefuses) {
  TempFolder temp;
  write_bytes(temp / "t.jsonl", text());
  const std::string folder = (temp / "c").string();
  const std::string line = "capture -m '" + kTeacher + "' --data '" + (temp / "t.jsonl").string() +
                           "' --sequence-length 64 --top-k 16 -o '" + folder + "'";
  const Ran first = run_kda(line);
  ASSERT_EQ(first.status, 0) << first.err;
  EXPECT_NE(first.out.find(" tokens"), std::string::npos);
  const auto header = nlohmann::json::parse(read_bytes(temp / "c/capture.json"));
  EXPECT_EQ(header["codec"]["k"], 16);
  EXPECT_EQ(header["codec"]["delta_encoding"], true);
  EXPECT_EQ(header["sequence_length"], 64);
  const Ran again = run_kda(line);
  EXPECT_EQ(again.status, 1);
  EXPECT_NE(again.err.find("holds a finished capture"), std::string::npos) << again.err;

  // As a kill leaves it: no capture.json, rows cut off.
  const std::string whole = read_bytes(temp / "c/rows.bin");
  auto partial = header;
  partial["rows"] = partial["tokens"] = 0;
  write_bytes(temp / "c/capture.partial.json", partial.dump());
  std::filesystem::remove(temp / "c/capture.json");
  std::filesystem::resize_file(temp / "c/rows.bin", whole.size() / 2);
  const Ran refused = run_kda(line);
  EXPECT_EQ(refused.status, 1);
  EXPECT_NE(refused.err.find("--resume"), std::string::npos) << refused.err;
  const Ran other = run_kda(line + " --resume --exact-k 3");
  EXPECT_EQ(other.status, 1);
  EXPECT_NE(other.err.find("other settings"), std::string::npos) << other.err;
  const Ran resumed = run_kda(line + " --resume");
  EXPECT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(read_bytes(temp / "c/rows.bin"), whole);
}

TEST(CaptureCommand, SaysWhatItNeeds) {
  TempFolder temp;
  write_bytes(temp / "t.jsonl", text());
  const std::string data = " --data '" + (temp / "t.jsonl").string() + "' -o '" + (temp / "c").string() + "'";
  EXPECT_NE(run_kda("capture" + data).err.find("needs a teacher (-m)"), std::string::npos);
  const std::string line = "capture -m '" + kTeacher + "'" + data;
  EXPECT_NE(run_kda(line + " --polynomial-terms 0,log").err.find("needed powers, sqrt or exp"), std::string::npos);
  EXPECT_NE(run_kda(line + " --residual-bins float16:8").err.find("DTYPE:BITS:ELEMENTS"), std::string::npos);
  EXPECT_NE(run_kda(line + " --residual-bins float16:8:99").err.find("residual_bins hold more"), std::string::npos);
  EXPECT_EQ(run_kda(line + " --exact-dtype int8").status, 1);
}

}  // namespace
}  // namespace kda::test
