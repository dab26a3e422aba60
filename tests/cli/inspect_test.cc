// `kda init` and `kda inspect` as a user runs them.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/run.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

// Standard output and error together.
struct Result {
  int status;
  std::string out;
};

Result kda(const std::string& arguments) {
  const Ran r = run_kda(arguments);
  return {r.status, r.out + r.err};
}

TEST(Inspect, WhatInitWrote) {
  TempFolder folder;
  const std::string model = (folder / "m").string();
  ASSERT_EQ(kda("init --like nano-hybrid --layers 6 -o " + model).status, 0);
  const Result text = kda("inspect --check " + model);
  EXPECT_EQ(text.status, 0) << text.out;
  EXPECT_NE(text.out.find("layers 0-2,4-5"), std::string::npos) << text.out;
  EXPECT_NE(kda("init --like nano-hybrid -o " + model).status, 0);  // there is a model already

  const auto j = nlohmann::json::parse(run_kda("inspect --json " + model).out);
  EXPECT_TRUE(j["complete"].get<bool>());
  ASSERT_EQ(j["layers"].size(), 6u);
  EXPECT_EQ(j["layers"][3]["mixer"], "full");
  EXPECT_EQ(j["layers"][4]["mixer"], "kda");
  EXPECT_EQ(j["layers"][4]["K"], 64);
  EXPECT_EQ(j["memory"]["state_bytes_per_sequence"], 5 * 4 * 4 * 64 * 64);
  EXPECT_EQ(j["memory"]["kv_bytes_per_token_bf16"], 2 * 2 * 64 * 2);
  int64_t bytes = 0;
  for (const auto& t : j["tensors"]) {
    EXPECT_EQ(t["status"], "ok");
    bytes += t["bytes"].get<int64_t>();
  }
  EXPECT_EQ(j["memory"]["weight_bytes"], bytes);
}

TEST(Inspect, BrokenModelsShowWhereAndEndWithOne) {
  KDA_NEED(golden, "tiny-kda");
  TempFolder folder;
  std::filesystem::copy(golden, folder / "m");
  const auto config = folder / "m" / "config.json", weights = folder / "m" / "model.safetensors";
  auto j = nlohmann::json::parse(read_bytes(config));
  j["intermediate_size"] = 161;
  std::filesystem::remove(config);
  write_bytes(config, j.dump());
  const Result wrong = kda("inspect " + (folder / "m").string());
  EXPECT_EQ(wrong.status, 1);
  EXPECT_NE(wrong.out.find("wrong: shape [160,64], needed [161,64]"), std::string::npos) << wrong.out;

  std::string bytes = read_bytes(weights);
  std::filesystem::remove(weights);
  write_bytes(weights, bytes.substr(0, bytes.size() / 2));
  const Result cut = kda("inspect " + (folder / "m").string());
  EXPECT_EQ(cut.status, 1);
  EXPECT_NE(cut.out.find("reach outside"), std::string::npos) << cut.out;

  EXPECT_EQ(kda("inspect " + folder.path().string()).status, 1);
  EXPECT_EQ(kda("inspect no-such-owner/no-such-model").status, 1);
  EXPECT_EQ(kda("init --like nothing -o " + (folder / "x").string()).status, 1);
}

TEST(Inspect, CheckFindsANaNInALargeWeight) {
  TempFolder folder;
  const std::string model = (folder / "m").string();
  ASSERT_EQ(kda("init --like tiny-kda -o " + model).status, 0);
  const auto file = folder / "m" / "model.safetensors";
  std::string bytes = read_bytes(file);
  bytes[bytes.size() - 1] = '\x7f';  // the last value of a bf16 matrix: the largest dtype comes first in the file
  bytes[bytes.size() - 2] = '\xc0';
  write_bytes(file, bytes);
  EXPECT_EQ(kda("inspect " + model).status, 0);
  const Result r = kda("inspect --check " + model);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.out.find("not finite"), std::string::npos) << r.out;
}

}  // namespace
}  // namespace kda::test
