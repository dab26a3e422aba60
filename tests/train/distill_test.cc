#include "train/distill.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <set>

#include "base/error.h"
#include "tests/train/tiny_run.h"
#include "train/stored_teacher.h"

namespace kda {
namespace {
namespace fs = std::filesystem;
using test::TinyRun;

std::string error_of(const DistillInput& in, const DistillHooks& hooks = {}) {
  try {
    distill(in, hooks);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Distill, RunsToItsEnd) {
  TinyRun t;
  std::vector<std::string> notes;
  int64_t steps = 0;
  std::vector<double> probed;
  DistillHooks hooks;
  hooks.note = [&](const std::string& line) { notes.push_back(line); };
  hooks.step = [&](const DistillHooks::Progress& p) {
    EXPECT_EQ(p.step, ++steps);
    EXPECT_EQ(p.steps, 12);
    EXPECT_EQ(p.all_tokens, 5 * 96 + 7 * 128);
  };
  hooks.probes = [&](const Weights& w) {
    probed.push_back(double(w.embedding.v.as<float>()[5]));
    return std::map<std::string, double>{{"p", 0.5}};
  };
  ASSERT_EQ(distill(t.input(t.yaml("out")), hooks), RunEnd::finished);
  EXPECT_EQ(steps, 12);

  const auto train = t.metrics("out", "train"), eval = t.metrics("out", "eval");
  ASSERT_EQ(train.size(), 12u);
  EXPECT_EQ(train[0]["stage"], "align");
  EXPECT_EQ(train[0]["layers"]["mixer_mse"].size(), 4u);
  EXPECT_EQ(train[4]["tokens"], 5 * 96);
  EXPECT_EQ(train[5]["stage"], "match");
  EXPECT_EQ(train[5]["layers"]["hs_cosine"].size(), 4u);
  EXPECT_EQ(train[11]["tokens"], 5 * 96 + 7 * 128);
  EXPECT_EQ(train[5]["lr"], 0.01);
  EXPECT_NEAR(train[11]["lr"].get<double>(), 0.01 / 7, 1e-12);
  EXPECT_LT(train[4]["loss"].get<double>(), train[0]["loss"].get<double>());
  for (const auto& line : train) EXPECT_GT(line["grad_norm"].get<double>(), 0);
  // At the start, every 4 steps, at the ends of both stages.
  std::vector<int64_t> at;
  for (const auto& line : eval) at.push_back(line["step"]);
  EXPECT_EQ(at, (std::vector<int64_t>{0, 4, 5, 8, 12}));
  for (const auto& line : eval)
    for (const char* term : {"kl", "cross_entropy", "loss"}) EXPECT_GT(line["terms"][term].get<double>(), 0) << line;
  EXPECT_TRUE(eval[0]["terms"].contains("mixer_mse"));
  EXPECT_LT(eval.back()["terms"]["kl"].get<double>(), eval[0]["terms"]["kl"].get<double>());
  EXPECT_GE(eval.back()["top1"].get<double>(), 0);
  EXPECT_EQ(eval[0]["probes"]["p"], 0.5);
  EXPECT_FALSE(eval[1].contains("probes"));
  ASSERT_EQ(probed.size(), 3u);
  EXPECT_EQ(probed[0], probed[1]);  // mixers alone were trained
  EXPECT_NE(probed[1], probed[2]);

  // Checkpoints: the last two; the models can be read.
  std::set<std::string> names;
  for (const auto& e : fs::directory_iterator(t.dir / "out")) names.insert(e.path().filename().string());
  EXPECT_EQ(names, (std::set<std::string>{".lock", "best", "checkpoint-10", "checkpoint-12", "final", "metrics.jsonl",
                                          "run.yaml"}));
  const Checkpoint final_model = load_checkpoint(t.dir / "out/final"), student = load_checkpoint(t.dir / "student");
  EXPECT_EQ(final_model.config.parameters(), student.config.parameters());
  EXPECT_NE(t.final_bytes("out"), test::read_bytes(t.dir / "student/model.safetensors"));
  EXPECT_EQ(load_checkpoint(t.dir / "out/best").config.parameters(), student.config.parameters());
  bool plan = false;
  for (const auto& n : notes) plan |= n.find("activations: ") != std::string::npos;
  EXPECT_TRUE(plan);

  // It is not run again.
  for (const bool resume : {false, true})
    EXPECT_NE(error_of(t.input(t.yaml("out"), {}, resume)).find("holds a finished run"), std::string::npos);
}

TEST(Distill, LeavingAnywhereAndResumingGivesTheSameBits) {
  TinyRun t;
  ASSERT_EQ(distill(t.input(t.yaml("whole")), {}), RunEnd::finished);
  const std::string want = t.final_bytes("whole");
  int64_t asked = 0;
  {  // how often a whole run asks
    DistillHooks count;
    count.stop = [&] { return ++asked, false; };
    ASSERT_EQ(distill(t.input(t.yaml("counted")), count), RunEnd::finished);
    EXPECT_EQ(t.final_bytes("counted"), want);
  }
  for (int64_t every = 3; every < asked; every = every * 2 + 1) {
    const std::string out = "left" + std::to_string(every);
    int64_t left = 0;
    for (bool resume = false;; resume = true) {
      int64_t n = 0;
      DistillHooks hooks;
      hooks.stop = [&] { return ++n > every; };
      const RunEnd end = distill(t.input(t.yaml(out), {"threads=" + std::to_string(1 + left % 3)}, resume), hooks);
      if (end == RunEnd::finished) break;
      ASSERT_LT(++left, 100);
      EXPECT_NE(error_of(t.input(t.yaml(out))).find("go on with --resume"), std::string::npos);
    }
    EXPECT_GT(left, 0);
    EXPECT_EQ(t.final_bytes(out) == want, true) << "left every " << every << " questions, " << left << " times";
    EXPECT_EQ(t.metrics(out, "train").size(), 12u);
    EXPECT_EQ(t.metrics(out, "train").back()["tokens"], t.metrics("whole", "train").back()["tokens"]);
    EXPECT_EQ(t.metrics(out, "train").back()["loss"], t.metrics("whole", "train").back()["loss"]);
  }
}

TEST(Distill, ResumesOnlyTheSameRun) {
  TinyRun t;
  int64_t n = 0;
  DistillHooks hooks;
  hooks.stop = [&] { return ++n > 20; };
  ASSERT_EQ(distill(t.input(t.yaml("out")), hooks), RunEnd::left);
  const auto resume = [&](const std::vector<std::string>& settings) {
    return error_of(t.input(t.yaml("out"), settings, true));
  };
  EXPECT_NE(
      resume({"stages.1.max_steps=8"}).find("begun with `    max_steps: 7`, the run file now says `    max_steps: 8`"),
      std::string::npos)
      << resume({"stages.1.max_steps=8"});
  EXPECT_NE(resume({"seed=1"}).find("begun with `seed: 42`"), std::string::npos);
  EXPECT_NE(resume({"model=" + (t.dir / "teacher").string()}).find("the student is not the one this run began with"),
            std::string::npos);
  write_shard(t.dir / "other.safetensors", std::vector<int32_t>(300, 1),
              std::vector<int64_t>{0, 60, 120, 180, 240, 300});
  EXPECT_NE(resume({"dataset.train_dataset.path=" + (t.dir / "other.safetensors").string()})
                .find("the training data is not the one this run began with"),
            std::string::npos);
  EXPECT_EQ(resume({"threads=1", "eval.every=3", "logging_steps=2", "checkpoints.save_total_limit=1"}), "no error");
}

TEST(Distill, NaNStopsNamingTheRow) {
  TinyRun t;
  t.break_teacher(259);
  const auto in = t.input(t.yaml("out", "    # one row is bad\n"), {"dataset.num_eval_samples=0"});
  const std::string error = error_of(in);
  EXPECT_NE(error.find("the loss is nan; rows of the data: "), std::string::npos) << error;
  EXPECT_NE(error.find("17"), std::string::npos) << error;
  const auto events = t.metrics("out", "event");
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["what"], "stopped");
  std::set<int64_t> rows = events[0]["rows"];
  EXPECT_TRUE(rows.count(17));
  // Skipping goes on to the end; what was skipped is said, and the weights are numbers.
  ASSERT_EQ(distill(t.input(t.yaml("out"), {"dataset.num_eval_samples=0", "on_nan=skip"}, true), {}), RunEnd::finished);
  EXPECT_EQ(load_checkpoint(t.dir / "out/final").config.layers.size(), 4u);
  const auto skipped = t.metrics("out", "event");
  ASSERT_GE(skipped.size(), 1u);
  for (const auto& e : skipped) EXPECT_EQ(e["why"], "the loss is nan");
  EXPECT_EQ(t.metrics("out", "train").size() + skipped.size(), 12u + (skipped[0]["what"] == "stopped"));
}

TEST(Distill, EverythingNaNEnds) {
  TinyRun t;
  t.break_teacher(0);
  std::string all = t.yaml("out");
  const std::string error =
      error_of(t.input(all, {"on_nan=skip", "dataset.num_eval_samples=0", "stages.0.max_steps=60", "batch_size=40"}));
  EXPECT_NE(error.find("20 steps in a row were skipped"), std::string::npos) << error;
}

TEST(Distill, SpikesAreSkippedOrStopTheRun) {
  TinyRun t;
  const std::vector<std::string> settings = {"stages.0.max_steps=40", "stages.0.learning_rate=0", "spike_factor=1",
                                             "stages.0.tokens=0"};
  auto with = [&](const std::string& what) {
    auto s = settings;
    s.push_back("on_spike=" + what);
    return s;
  };
  ASSERT_EQ(distill(t.input(t.yaml("skip"), with("skip")), {}), RunEnd::finished);
  const auto events = t.metrics("skip", "event");
  ASSERT_GT(events.size(), 2u);  // about half of the losses lie above their mean
  for (const auto& e : events) {
    EXPECT_GT(e["step"].get<int64_t>(), 20);
    EXPECT_NE(e["why"].get<std::string>().find(" is a spike over "), std::string::npos);
    EXPECT_FALSE(e["rows"].empty());
  }
  EXPECT_NE(error_of(t.input(t.yaml("stop"), with("stop"))).find(" is a spike over "), std::string::npos);
  ASSERT_EQ(distill(t.input(t.yaml("ignore"), with("ignore")), {}), RunEnd::finished);
  EXPECT_TRUE(t.metrics("ignore", "event").empty());
}

TEST(Distill, SurvivesAFullDisk) {
  TinyRun t;
  ASSERT_EQ(distill(t.input(t.yaml("whole")), {}), RunEnd::finished);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  struct rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  DistillHooks hooks;
  int warnings = 0;
  hooks.note = [&](const std::string& line) { warnings += line.find("warning: ") == 0; };
  hooks.step = [&](const DistillHooks::Progress& p) {
    if (p.step != 5) return;
    struct rlimit now = old;
    now.rlim_cur = 20000;  // room for metrics, none for weights
    setrlimit(RLIMIT_FSIZE, &now);
  };
  const std::string error = error_of(t.input(t.yaml("out")), hooks);
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  EXPECT_NE(error.find("final"), std::string::npos) << error;
  EXPECT_GT(warnings, 2);
  std::set<std::string> names;
  for (const auto& e : fs::directory_iterator(t.dir / "out")) names.insert(e.path().filename().string());
  EXPECT_TRUE(names.count("checkpoint-4"));
  EXPECT_FALSE(names.count("checkpoint-12") || names.count("final"));
  EXPECT_EQ(t.metrics("out", "train").size(), 12u);
  EXPECT_GE(t.metrics("out", "event").size(), 3u);
  ASSERT_EQ(distill(t.input(t.yaml("out"), {}, true), {}), RunEnd::finished);
  EXPECT_EQ(t.final_bytes("out") == t.final_bytes("whole"), true);
}

TEST(Distill, TrainsOnTextAlone) {
  TinyRun t;
  std::string yaml = t.yaml("out");
  yaml.erase(yaml.find("teacher:"), yaml.find("output_path") - yaml.find("teacher:"));
  yaml.erase(yaml.find("stages:"));
  yaml += "max_steps: 30\nlr_scheduler_type: constant\n";
  ASSERT_EQ(distill(t.input(yaml), {}), RunEnd::finished);
  const auto eval = t.metrics("out", "eval");
  EXPECT_LT(eval.back()["terms"]["cross_entropy"].get<double>(), 0.8 * eval[0]["terms"]["cross_entropy"].get<double>());
  EXPECT_FALSE(eval[0].contains("top1"));
  EXPECT_TRUE(fs::exists(t.dir / "out/best"));
}

TEST(Distill, LearnsFromAStoredTeacher) {
  TinyRun t;
  // Rows of the usual data; the teacher thinks the same of what follows a token wherever it stands.
  LogprobCodecConfig config;
  config.d = 260, config.k = config.exact_k = 4, config.delta_encoding = false;
  const LogprobCodec codec(config);
  const auto rows = open_shards({t.dir / "data.safetensors"});
  CaptureWriter writer(t.dir / "captured", {.codec = config, .model = "x", .teacher = {}, .tokenizer = {}, .data = {}},
                       false);
  for (int64_t r = 0; r < rows->count(); ++r) {
    std::vector<int32_t> ids(size_t(rows->length(r)));
    rows->read(r, 0, ids);
    std::vector<uint8_t> values, indices;
    for (const int32_t id : ids) {
      const std::vector<int32_t> next = {(id + 1) % 260, (id + 2) % 260, (id + 3) % 260, (id + 4) % 260};
      const std::vector<float> logprobs = {-0.4f, -1.5f, -3.0f, -4.0f};
      values.resize(values.size() + size_t(codec.value_bytes()));
      indices.resize(indices.size() + size_t(codec.index_bytes()));
      codec.encode(next, logprobs, std::span(values).last(size_t(codec.value_bytes())),
                   std::span(indices).last(size_t(codec.index_bytes())));
    }
    writer.add(ids, values, indices);
  }
  writer.finish();
  std::string yaml = t.yaml("out");
  yaml.erase(yaml.find("stages:"));
  yaml +=
      "losses: [{function: kl, temperature: 1}, {function: cross_entropy}]\nmax_steps: 30\nlr_scheduler_type: "
      "constant\n";
  const auto in = [&](const std::string& data, bool resume = false) {
    return t.input(yaml, {"teacher={kind: dataset}", "dataset.train_dataset.path=" + (t.dir / data).string()}, resume);
  };
  EXPECT_NE(error_of(in("data.safetensors")).find("neither a folder of kda capture nor"), std::string::npos);
  fs::remove_all(t.dir / "out");
  int64_t n = 0;
  DistillHooks hooks;
  hooks.stop = [&] { return ++n > 30; };
  ASSERT_EQ(distill(in("captured"), hooks), RunEnd::left);
  ASSERT_EQ(distill(in("captured", true), {}), RunEnd::finished);
  const auto eval = t.metrics("out", "eval");
  EXPECT_LT(eval.back()["terms"]["kl"].get<double>(), 0.7 * eval[0]["terms"]["kl"].get<double>());
  EXPECT_GT(eval.back()["top1"].get<double>(), eval[0]["top1"].get<double>());
  EXPECT_EQ(t.metrics("out", "train").size(), 30u);
}

TEST(Distill, SharesEqualTensors) {
  TinyRun t;
  ThreadPool pool(2);
  Checkpoint a = load_checkpoint(t.dir / "teacher");
  const Checkpoint b = load_checkpoint(t.dir / "teacher"), other = load_checkpoint(t.dir / "student");
  ASSERT_NE(a.at("lm_head.weight").v.data, b.at("lm_head.weight").v.data);
  int64_t bytes = 0;
  for (const auto& [name, x] : b.tensors) bytes += int64_t(x.v.bytes());
  EXPECT_EQ(share_tensors(a, b, pool), bytes);
  EXPECT_EQ(a.at("lm_head.weight").v.data, b.at("lm_head.weight").v.data);
  const auto before = a.at("lm_head.weight").v.data;
  share_tensors(a, other, pool);
  EXPECT_EQ(a.at("lm_head.weight").v.data, before);
}

TEST(Distill, RefusesWhatDoesNotFit) {
  TinyRun t;
  ThreadPool pool(1);
  EXPECT_NE(error_of(t.input(t.yaml("a"), {"checkpoints.best_by=jsd"})).find("has no held-out term 'jsd'"),
            std::string::npos);
  EXPECT_NE(error_of(t.input(t.yaml("b"), {"stages.0.trainable=[nonsense]"})).find("nonsense"), std::string::npos);
  EXPECT_NE(error_of(t.input(t.yaml("c"), {"stages.1.layer_mapping=[9]"})).find("layer mapping"), std::string::npos);
  EXPECT_NE(error_of(t.input(t.yaml("d"), {"dataset.num_eval_samples=40"})).find("held-out rows"), std::string::npos);
  write_random_checkpoint(t.dir / "wide", named_model("nano", 1), {.seed = 1, .dtype = Dtype::bf16}, pool);
  EXPECT_NE(error_of(t.input(t.yaml("e"), {"teacher.path=" + (t.dir / "wide").string()}))
                .find("the teacher has 4096 tokens, the student 260"),
            std::string::npos);
}

}  // namespace
}  // namespace kda
