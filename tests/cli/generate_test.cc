// kda generate and kda score as a user types them.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tests/cli/run.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

class Program : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::path(testing::TempDir()) / cat("kda_cli_", ::getpid());
    fs::remove_all(folder);
    fs::create_directories(folder);
    kda_model = golden_path("tiny-kda");
    if (kda_model.empty()) GTEST_SKIP() << "needs golden/tiny-kda";
  }
  void TearDown() override { fs::remove_all(folder); }
  std::string file(const std::string& name, const std::string& text) const {
    std::ofstream(folder / name, std::ios::binary) << text;
    return (folder / name).string();
  }
  // A copy of the KDA model that a test may break.
  fs::path copy_model() const {
    const fs::path to = folder / "model";
    fs::create_directories(to);
    for (const char* name : {"config.json", "model.safetensors"}) fs::copy_file(kda_model / name, to / name, fs::copy_options::overwrite_existing);
    return to;
  }
  fs::path folder, kda_model;
  const std::string nano = KDA_SOURCE_DIR "/assets/nano-teacher";
};

json greedy_ids(const fs::path& model) {
  return GoldenFile(model / "expected.safetensors")["greedy"].ids();
}

std::string list(const json& ids, size_t from, size_t to) {
  std::string s;
  for (size_t i = from; i < to; ++i) {
    if (i > from) s += ',';
    s += ids[i].dump();
  }
  return s;
}

TEST_F(Program, GeneratesByIdsWithoutATokenizer) {
  const json ids = greedy_ids(kda_model);
  const Ran r = run_kda(cat("generate -m ", kda_model, " --precision exact --ignore-eos --json -n 24 --prompt-ids ", list(ids, 0, 16)));
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  ASSERT_EQ(j["sequences"].size(), 1u);
  EXPECT_EQ(j["sequences"][0]["tokens"], json(std::vector<json>(ids.begin() + 16, ids.end())));
  EXPECT_TRUE(j["sequences"][0]["text"].is_null());
  EXPECT_EQ(j["sequences"][0]["finish_reason"], "length");
  EXPECT_EQ(j["timings"]["generated_tokens"], 24);
}

TEST_F(Program, BatchEqualsOneByOneAndSamplesAreReproducible) {
  const std::string prompts = file("p.jsonl", "[1,2,3]\n{\"prompt_ids\": [9,8,7,6,5]}\n[44]\n");
  const std::string options = " --json -n 8 --ignore-eos --temperature 0.9 --seed 5 --logprobs 2 -m " + kda_model.string();
  const Ran batch = run_kda("generate --prompts-file " + prompts + options + " --num-samples 2 -t 2");
  const Ran again = run_kda("generate --prompts-file " + prompts + options + " --num-samples 2 -t 1");
  ASSERT_EQ(batch.status, 0) << batch.err;
  const json a = json::parse(batch.out)["sequences"], b = json::parse(again.out)["sequences"];
  ASSERT_EQ(a.size(), 6u);
  EXPECT_EQ(a, b);
  EXPECT_NE(a[0]["tokens"], a[1]["tokens"]);
  const Ran alone = run_kda("generate --prompt-ids 1,2,3" + options);
  EXPECT_EQ(json::parse(alone.out)["sequences"][0], a[0]);
  EXPECT_EQ(a[0]["logprobs"].size(), 8u);
  EXPECT_EQ(a[0]["logprobs"][0]["top"].size(), 2u);
}

TEST_F(Program, SavesAndContinues) {
  const std::string state = (folder / "s.safetensors").string(), m = " -m " + kda_model.string() + " --json --ignore-eos ";
  const json whole = json::parse(run_kda("generate --prompt-ids 5,6,7 -n 20" + m).out);
  const json begin = json::parse(run_kda("generate --prompt-ids 5,6,7 -n 9 --save-state " + state + m).out);
  const json rest = json::parse(run_kda("generate -n 11 --load-state " + state + m).out);
  json both = begin["sequences"][0]["tokens"];
  for (const json& t : rest["sequences"][0]["tokens"]) both.push_back(t);
  EXPECT_EQ(both, whole["sequences"][0]["tokens"]);
  // Another model's state is refused.
  const auto other = golden_path("tiny-hybrid");
  if (other.empty()) return;
  const Ran r = run_kda("generate -n 1 --load-state " + state + " -m " + other.string());
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("another model"), std::string::npos) << r.err;
}

TEST_F(Program, TextInTextOut) {
  if (!fs::exists(nano)) GTEST_SKIP() << "needs assets/nano-teacher";
  const std::string text = file("prompt.txt", "The file system is mounted");
  const Ran by_file = run_kda("generate -n 12 -m " + nano + " -f " + text);
  const Ran by_argument = run_kda("generate -n 12 -m " + nano + " -p 'The file system is mounted'");
  ASSERT_EQ(by_file.status, 0) << by_file.err;
  EXPECT_FALSE(by_file.out.empty());
  EXPECT_EQ(by_file.out, by_argument.out);
  EXPECT_NE(by_file.err.find("tok/s"), std::string::npos);
  const json j = json::parse(run_kda("generate --json -n 12 -m " + nano + " -f " + text).out);
  EXPECT_EQ(j["sequences"][0]["text"].get<std::string>() + "\n", by_file.out);
  // A stop string taken from the middle of that text ends it there and is left out.
  const std::string all = j["sequences"][0]["text"], stop = all.substr(all.size() / 2, 3);
  const json stopped = json::parse(run_kda("generate --json -n 12 -m " + nano + " -f " + text + " --stop '" + stop + "'").out);
  EXPECT_EQ(stopped["sequences"][0]["finish_reason"], "stop");
  EXPECT_EQ(stopped["sequences"][0]["text"].get<std::string>(), all.substr(0, all.find(stop)));
}

TEST_F(Program, ScoresAndKeepsWhatItComputed) {
  const GoldenFile expected(kda_model / "expected.safetensors");
  const auto ids = expected["input_ids"].ids();
  const size_t T = ids.size() / 2;
  json lists{std::vector<int32_t>(ids.begin(), ids.begin() + int64_t(T)), std::vector<int32_t>(ids.begin() + int64_t(T), ids.end())};
  const std::string in = file("ids.json", lists.dump()), out = (folder / "out.safetensors").string();
  const Ran r = run_kda("score --precision exact --json --hidden --out " + out + " --ids-file " + in + " -m " + kda_model.string());
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_NEAR(j["loss"].get<double>(), expected["loss"].values()[0], 2e-5);
  EXPECT_NEAR(j["perplexity"].get<double>(), std::exp(expected["loss"].values()[0]), 1e-2);
  const GoldenFile kept(out);
  EXPECT_EQ(kept["logits.1"].shape, (std::vector<int64_t>{int64_t(T), 260}));
  EXPECT_TRUE(kept.has("hidden.0.4"));
  EXPECT_TRUE(kept.has("state.1.3"));
  const auto want = expected["logits"].values(), got = kept["logits.1"].values();
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want[got.size() + i]));
  EXPECT_LT(worst, 1e-3);
  // Sequences too short to predict anything are no reason to refuse the others, nor to keep their logits.
  EXPECT_EQ(run_kda("score --ids-file " + file("short.json", "[[1,2],[],[3]]") + " -m " + kda_model.string()).status, 0);
  EXPECT_EQ(run_kda("score --out " + out + " --ids-file " + file("one.json", "[[5]]") + " -m " + kda_model.string()).status, 0);
  const json compared = json::parse(run_kda("score --json --compare int8 --ids-file " + in + " -m " + kda_model.string()).out);
  EXPECT_NEAR(compared["compare"]["difference"].get<double>(), 0, 0.2);
  EXPECT_GT(compared["compare"]["kl"].get<double>(), 0);
}

TEST_F(Program, Int8CacheIsUsedAndChecked) {
  const std::string cache = (folder / "int8.safetensors").string(),
                    line = "generate --prompt-ids 3,4 -n 8 --json --weights int8 --weight-cache " + cache + " -m ";
  const Ran made = run_kda(line + kda_model.string());
  ASSERT_EQ(made.status, 0) << made.err;
  EXPECT_TRUE(fs::exists(cache));
  const Ran used = run_kda(line + kda_model.string());
  EXPECT_EQ(used.err.find("kept"), std::string::npos);
  EXPECT_EQ(json::parse(used.out)["sequences"], json::parse(made.out)["sequences"]);
  file("int8.safetensors", "junk");
  EXPECT_EQ(run_kda(line + kda_model.string()).status, 1);
}

TEST_F(Program, BadInputIsAnErrorThatSaysWhat) {
  const std::string m = " -m " + kda_model.string();
  const auto fails = [&](const std::string& line, const std::string& needle) {
    const Ran r = run_kda(line);
    EXPECT_EQ(r.status, 1) << line << "\n" << r.out << r.err;
    EXPECT_NE(r.err.find(needle), std::string::npos) << line << "\n" << r.err;
  };
  fails("generate --prompt-ids 1,2,999999" + m, "vocabulary");
  fails("generate --prompt-ids 1,x" + m, "numbers");
  fails("generate -p text" + m, "tokenizer.json");
  fails("generate --prompt-ids 1 --temperature -1" + m, "temperature");
  fails("generate --prompt-ids 1 --top-p 2" + m, "top-p");
  fails("generate --prompt-ids 1 --device cuda" + m, "device");
  fails("generate --prompt-ids 1 --bogus" + m, "bogus");
  fails("generate --prompt-ids 1 -m " + (folder / "nowhere").string(), "nowhere");
  fails("generate --prompt-ids 1 -m some-owner/some-model", "hf download some-owner/some-model");
  fails("generate --prompts-file " + file("bad.jsonl", "[1]\n{oops\n") + m, "line 2");
  fails("generate --prompt-ids 1 --load-state " + file("state.safetensors", "not a state at all") + m, "state.safetensors");
  fails("score --ids-file " + file("ids.json", "[[1,2],[3,\"a\"]]") + m, "sequence 1");
  fails("score --ids-file " + file("one.json", "[[1]]") + m, "nothing to score");
  fails("score --ids-file " + file("ok.json", "[[1,2]]") + " --hidden" + m, "--out");
  const std::string deep = file("deep.json", std::string(200000, '[') + std::string(200000, ']'));
  fails("generate --prompts-file " + deep + m, "nested deeper");
  fails("score --ids-file " + deep + m, "nested deeper");
  fails("generate --prompts-file " + file("empty.jsonl", "[1]\n[]\n") + m, "line 2");
  fails("generate --prompts-file " + file("outside.jsonl", "[1]\n[1,99999]\n") + m, "line 2");
  fails("generate --prompt-ids 1 --temperature nan" + m, "temperature");
  fails("generate --prompt-ids 1 -n 99999999999999999999" + m, "max-new-tokens");
  fails("generate --prompt-ids 1 --logit-bias 1,2:5" + m, "logit-bias");
  fails("generate --prompt-ids 1 --prompt-ids ''" + m, "prompt-ids");
  fails("generate --prompt-ids 1 --save-state " + folder.string() + m, "folder");
  fails("generate --prompt-ids 1 --save-state " + (copy_model() / "config.json").string() + " -m " + copy_model().string(),
        "file of the model");
  fails("generate --prompt-ids 1 --save-state /nonexistent-folder/s" + m, "nonexistent-folder");
}

TEST_F(Program, BrokenModelsAreErrors) {
  const fs::path model = copy_model();
  const std::string line = "generate --prompt-ids 1,2 -n 4 -m " + model.string();
  ASSERT_EQ(run_kda(line).status, 0);
  const auto size = fs::file_size(model / "model.safetensors");
  // A NaN in the last matrix of the file: nothing sensible can be generated, and nothing is.
  {
    std::fstream f(model / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    uint64_t header = 0;
    f.read(reinterpret_cast<char*>(&header), 8);
    std::string text(header, 0);
    f.read(text.data(), int64_t(header));
    const auto at = json::parse(text)["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0].get<uint64_t>();
    const float nan = std::nanf("");
    f.seekp(int64_t(8 + header + at));
    f.write(reinterpret_cast<const char*>(&nan), 4);
  }
  Ran r = run_kda(line);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("NaN"), std::string::npos) << r.err;
  fs::resize_file(model / "model.safetensors", size / 2);
  r = run_kda(line);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("model.safetensors"), std::string::npos) << r.err;
  copy_model();
  file("model/config.json", "{\"model_type\": \"martian\"}");
  r = run_kda(line);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("martian"), std::string::npos) << r.err;
}

TEST_F(Program, AFullDiskLeavesNoHalfWrittenState) {
  const std::string state = (folder / "s.safetensors").string(), m = " -m " + kda_model.string();
  ASSERT_EQ(run_kda("generate --prompt-ids 5,6 -n 2 --save-state " + state + m).status, 0);
  const auto before = fs::file_size(state);
  const Ran r = run_kda("generate --prompt-ids 5,6,7,8 -n 2 --save-state " + state + m, "trap '' XFSZ; ulimit -f 8; ");
  EXPECT_EQ(r.status, 1) << r.err;
  EXPECT_EQ(fs::file_size(state), before);
  for (const auto& e : fs::directory_iterator(folder)) EXPECT_EQ(e.path().string().find(".tmp-"), std::string::npos) << e.path();
}

TEST(ProgramWords, AnUnknownCommandIsNamedAndAFullOutputShows) {
  const Ran r = run_kda("genrate -m x");
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("'genrate'"), std::string::npos) << r.err;
  EXPECT_NE(r.err.find("generate"), std::string::npos) << r.err;
  EXPECT_EQ(run_kda("--help >/dev/full").status, 1);
  EXPECT_EQ(run_kda("--help").status, 0);
}

TEST_F(Program, AStopStringThatIsNotUtf8IsRefused) {
  const Ran r = run_kda("generate -n 2 -p hello --stop $(printf 'ab\\377') -m " + nano);
  EXPECT_EQ(r.status, 1);
  EXPECT_NE(r.err.find("UTF-8"), std::string::npos) << r.err;
}

}  // namespace
}  // namespace kda::test
