#include "train/run_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "tests/temp_folder.h"
#include "train/schedule.h"
#include "train/yaml.h"

namespace kda {
namespace {

RunFile read(const std::string& text, const std::vector<std::string>& settings = {}, bool only_text = false) {
  std::vector<std::string> notes;
  return read_run_file(text, "run.yaml", settings, only_text, notes);
}

std::string error_of(const std::string& text, const std::vector<std::string>& settings = {}, bool only_text = false) {
  try {
    read(text, settings, only_text);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

// As users of DistillKit have it.
const std::string kDistillKit = R"(project_name: distillkit-afm
model: student
output_path: out
sequence_length: 2048
use_flash_attention: true
dataset:
  train_dataset:
    disk_path: data
  seed: 7
  num_samples: 1000
  num_eval_samples: 10
teacher:
  kind: hf
  path: teacher
loss_functions:
  - function: cross_entropy
    weight: 0.2
  - function: kl
    weight: 0.2
    temperature: 2.0
    missing_probability_handling: zero
    sparse_chunk_length: 1024
  - function: hs_cosine
    weight: 0.6
layer_mapping: all
frozen_modules: [model.embed_tokens, lm_head]
frozen_res: ['.*norm.*', '\.mlp\.']
training_args:
  num_train_epochs: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-3
  lr_scheduler_type: cosine
  warmup_ratio: 0.025
  weight_decay: 0.05
  max_grad_norm: 0.5
  optim: adamw_torch
  bf16: true
  gradient_checkpointing: true
  logging_steps: 5
  save_steps: 100
  save_total_limit: 3
  resume_from_checkpoint: null
)";

// Ours.
const std::string kStages = R"(model: student
output_path: out
dataset: {train_dataset: [{path: a, weight: 3}, {path: b, weight: 1, excess_length_strategy: drop}], eval_dataset: {path: c}}
teacher: {path: teacher}
batch_size: 8
learning_rate: 1e-3
sequence_length: 512
eval: {every: 50, probes: {needles: n.jsonl}}
stages:
  - name: align
    losses: [{function: mixer_mse}]
    tokens: 1_000_000
    schedule: wsd
    min_lr_ratio: 0.01
  - name: match
    losses: [{function: kl, temperature: 1}]
    layer_mapping: [1, [2, 4]]
    trainable: ['self_attn']
    frozen_res: 'o_norm'
    rates: [{match: A_log, lr: 1e-2, weight_decay: 0}]
    max_steps: 30
    learning_rate: 1e-4
)";

TEST(RunFile, ReadsDistillKits) {
  std::vector<std::string> notes;
  const RunFile r = read_run_file(kDistillKit, "run.yaml", {}, false, notes);
  EXPECT_EQ(r.project_name, "distillkit-afm");
  EXPECT_EQ(r.datasets.at(0).path, "data");
  EXPECT_EQ(r.seed, 7u);
  EXPECT_EQ(r.dataset_rows, 1000);
  EXPECT_EQ(r.eval.rows, 10);
  EXPECT_EQ(r.teacher.kind, TeacherKind::live);
  EXPECT_EQ(r.save_every, 100);
  EXPECT_EQ(r.keep_last, 3);
  EXPECT_EQ(r.log_every, 5);
  ASSERT_EQ(r.stages.size(), 1u);
  const StageSpec& s = r.stages[0];
  ASSERT_EQ(s.losses.size(), 3u);
  EXPECT_EQ(s.losses[1].function, LossFunction::kl);
  EXPECT_EQ(s.losses[1].temperature, 2);
  EXPECT_EQ(s.losses[2].weight, 0.6);
  EXPECT_TRUE(s.all_layers);
  EXPECT_EQ(s.sequence_length, 2048);
  EXPECT_EQ(s.step_tokens(), 2048 * 8);
  EXPECT_EQ(s.lr, 1e-3);
  EXPECT_EQ(s.schedule.kind, ScheduleKind::cosine);
  EXPECT_EQ(s.schedule.warmup_ratio, 0.025);
  EXPECT_EQ(s.decay, 0.05);
  EXPECT_EQ(s.clip, 0.5);
  EXPECT_TRUE(s.recompute);
  EXPECT_EQ(steps_of(s, 1'000'000), 62);  // 61.04 steps of 16,384 tokens
  // What has no effect is said, with its line.
  ASSERT_EQ(notes.size(), 3u);
  EXPECT_NE(notes[0].find("run.yaml:5: use_flash_attention has no effect here"), std::string::npos);
  EXPECT_NE(notes[1].find("run.yaml:22: sparse_chunk_length"), std::string::npos);
  EXPECT_NE(notes[2].find("run.yaml:38: bf16"), std::string::npos);
}

TEST(RunFile, FrozenModulesAndRegexesBothHold) {
  for (const bool modules_first : {true, false}) {
    std::string text = kDistillKit;
    if (!modules_first) {
      const std::string line = "frozen_modules: [model.embed_tokens, lm_head]\n";
      text.erase(text.find(line), line.size());
      text += line;
    }
    const auto frozen = read(text).stages[0].frozen;
    EXPECT_EQ(std::set<std::string>(frozen.begin(), frozen.end()),
              (std::set<std::string>{"^model\\.embed_tokens(\\.|$)", "^lm_head(\\.|$)", ".*norm.*", "\\.mlp\\."}));
  }
}

TEST(RunFile, ReadsStages) {
  const RunFile r = read(kStages);
  ASSERT_EQ(r.stages.size(), 2u);
  EXPECT_EQ(r.datasets[1].weight, 1);
  EXPECT_FALSE(r.datasets[0].drop_long);
  EXPECT_TRUE(r.datasets[1].drop_long);
  EXPECT_EQ(r.eval.dataset->path, "c");
  EXPECT_EQ(r.eval.every, 50);
  EXPECT_EQ(r.eval.probes.needles, "n.jsonl");
  EXPECT_EQ(r.stages[0].name, "align");
  EXPECT_EQ(r.stages[0].tokens, 1'000'000);
  EXPECT_EQ(r.stages[0].schedule.kind, ScheduleKind::wsd);
  EXPECT_EQ(r.stages[0].lr, 1e-3);
  const StageSpec& s = r.stages[1];
  EXPECT_EQ(s.lr, 1e-4);
  EXPECT_EQ(s.batch_size, 8);
  EXPECT_FALSE(s.all_layers);
  ASSERT_EQ(s.layers.size(), 2u);
  EXPECT_EQ(s.layers[0].teacher, 1);
  EXPECT_EQ(s.layers[1].teacher, 4);
  EXPECT_EQ(s.steps, 30);
  EXPECT_EQ(s.tokens, 0);
  EXPECT_EQ(s.rates.at(0).lr, 1e-2);
  const auto rules = parameter_rules(s);
  ASSERT_EQ(rules.size(), 4u);
  EXPECT_EQ(rules[0].regex, "o_norm");
  EXPECT_FALSE(rules[0].trainable);
  EXPECT_EQ(rules[1].regex, "^(?=.*?(?:(?:self_attn)))(?=.*?(?:A_log))");
  EXPECT_EQ(rules[1].lr, 1e-2);
  EXPECT_EQ(rules[2].regex, "self_attn");
  EXPECT_TRUE(rules[2].trainable);
  EXPECT_FALSE(rules[3].trainable);
}

TEST(RunFile, WrittenAndReadAgainItIsTheSame) {
  for (const std::string& text : {kDistillKit, kStages}) {
    const std::string once = write_run_file(read(text));
    EXPECT_EQ(write_run_file(read(once)), once) << once;
    EXPECT_EQ(read(once).stages.size(), read(text).stages.size());
    EXPECT_EQ(read(once).stages.back().frozen, read(text).stages.back().frozen);
  }
  RunFile r = read(kStages, {"model=\"a: b # \\\" \\\\ c\\x01\\n\""});
  EXPECT_EQ(r.model, "a: b # \" \\ c\x01\n");
  EXPECT_EQ(read(write_run_file(r)).model, r.model);
}

TEST(RunFile, SettingsReplace) {
  const RunFile r = read(kStages, {"stages.1.learning_rate=2e-4", "seed=9", "eval.tokens=128",
                                   "checkpoints.save_steps=5", "dataset.eval_dataset.path=d"});
  EXPECT_EQ(r.stages[1].lr, 2e-4);
  EXPECT_EQ(r.seed, 9u);
  EXPECT_EQ(r.eval.tokens, 128);
  EXPECT_EQ(r.save_every, 5);
  EXPECT_EQ(r.eval.dataset->path, "d");
  EXPECT_EQ(error_of(kStages, {"stages.2.lr=1"}),
            "--set stages.2.lr=1: '2' is no place in a list of 2 (they count from 0)");
  EXPECT_EQ(error_of(kStages, {"seed"}), "--set seed: needed KEY=VALUE");
  EXPECT_EQ(error_of(kStages, {"model.x=1"}),
            "--set model.x=1: 'x' lies below 'student' (run.yaml:1), which is a single value");
  EXPECT_EQ(error_of(kStages, {"sead=1"}), "--set sead=1: unknown key 'sead' in the run file; did you mean 'seed'?");
  EXPECT_EQ(error_of(kStages, {"seed=[1"}).find("--set seed=[1: "), 0u) << error_of(kStages, {"seed=[1"});
}

TEST(RunFile, ErrorsNameTheLine) {
  const auto with = [](const std::string& line) { return kStages + line + "\n"; };  // line 23 of the file
  const std::vector<std::pair<std::string, std::string>> cases = {
      {with("learning_rat: 1"),
       "run.yaml:23: unknown key 'learning_rat' in the run file; did you mean 'learning_rate'?"},
      {with("disk_path: x"),
       "run.yaml:23: key 'disk_path' does not belong into the run file, but into dataset.train_dataset"},
      {with("zzzzzz: x"), "run.yaml:23: unknown key 'zzzzzz' in the run file; known are project_name, model,"},
      {with("seed: x"), "run.yaml:23: seed must be a whole number from 0 up, is \"x\""},
      {with("seed: '5'"), "run.yaml:23: seed must be a whole number"},
      {with("threads: -1"), "run.yaml:23: threads must be a whole number from 0 to 4096, is \"-1\""},
      {with("weight_decay: nan"), "run.yaml:23: weight_decay must be a number from 0 to 1000, is \"nan\""},
      {with("precision: half"), "run.yaml:23: precision is \"half\", known are fast, exact"},
      {with("recompute: 1"), "run.yaml:23: gradient_checkpointing must be true or false, is \"1\""},
      {with("model: x"), "run.yaml:23: key 'model' is given twice"},
      {with("lr: 1"), "run.yaml:23: 'lr' is the same as 'learning_rate' (run.yaml:6); give one"},
      {with("training_args: {learning_rate: 1}"),
       "run.yaml:23: 'learning_rate' was given before, at run.yaml:6; give it once"},
      {with("training_args: {fsdp: full}"), "run.yaml:23: fsdp cannot be honoured: one process trains"},
      {with("training_args: {optim: lion}"), "run.yaml:23: optim \"lion\" cannot be honoured"},
      {with("training_args: {label_smoothing_factor: 0.1}"), "run.yaml:23: label_smoothing_factor cannot be honoured"},
      {with("training_args: 5"), "run.yaml:23: training_args must be keys and values, is \"5\""},
      {with("functionary_packing: true"), "run.yaml:23: functionary_packing cannot be honoured"},
      {with("a: &x 1"), "run.yaml:23: anchors (&name) are not read in a run file"},
      {with("a: !!int 1"), "run.yaml:23: tags"},
      {with("a: [1"), "not valid YAML"},
      {with("---\na: 1"), "more than one document"},
      {"", "run.yaml: needed keys and values, is empty"},
      {"- 1", "run.yaml: needed keys and values, is a list of 1"},
      {"model: x", "run.yaml: `output_path` is not given"},
      {"model: x\noutput_path: y", "run.yaml: `dataset.train_dataset` is not given"},
      {"model: x\noutput_path: y\ndataset: {train_dataset: {repo_id: a/b}}",
       "run.yaml:3: repo_id cannot be honoured: export it once"},
      {"model: x\noutput_path: y\ndataset: {train_dataset: {text_key: b}}", "run.yaml:3: a data set without `path`"},
      {"model: x\noutput_path: y\ndataset: {train_dataset: {path: b}}", "no `teacher`; kda distill needs one"},
      {"a: " + std::string(40, '[') + std::string(40, ']'), "nested deeper than 32 levels"},
  };
  for (const auto& [text, want] : cases)
    EXPECT_NE(error_of(text).find(want), std::string::npos) << error_of(text) << "\nfor " << want;
}

TEST(RunFile, StagesAreChecked) {
  const std::string head =
      "model: s\noutput_path: o\nteacher: {path: t}\ndataset: {train_dataset: {path: d}}\nsequence_length: 8\n"
      "batch_size: 1\nlearning_rate: 1\n";
  const auto stage = [&](const std::string& s) { return head + "stages:\n  - {" + s + "}\n"; };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {stage("tokens: 8"), "run.yaml:9: stage 'stage1' needs `losses`"},
      {stage("losses: [{function: kl}], tokens: 8"), "run.yaml:9: the loss kl needs `temperature`"},
      {stage("losses: [{function: hinge}], tokens: 8"), "run.yaml:9: the loss hinge needs `margin`"},
      {stage("losses: [{weight: 1}], tokens: 8"), "run.yaml:9: a loss without `function`"},
      {stage("losses: [{function: ce}], tokens: 8"), "run.yaml:9: function is \"ce\", known are cross_entropy, kl,"},
      {stage("losses: [{function: hs_mse, weight: 0}], tokens: 8"), "the weights of its losses are all 0"},
      {stage("losses: [{function: hs_mse}]"), "needs a length: `tokens`, `max_steps` or `num_train_epochs`"},
      {stage("losses: [{function: hs_mse}], tokens: 8, max_steps: 1"), "has `tokens` and `max_steps`; give one"},
      {stage("losses: [{function: hs_mse}], tokens: 8, rates: [{match: x}]"),
       "a rate needs `match` and `learning_rate`"},
      {stage("losses: [{function: hs_mse}], tokens: 8, batch_size: 1000000, sequence_length: 1000000"),
       "is more than 2147483647"},
      {stage("losses: [{function: hs_mse}], tokens: 8, layer_mapping: [[1, 2, 3]]"),
       "must be one number or [student, teacher]"},
      {stage("losses: [{function: hs_mse}], tokens: 8, output_path: x"),
       "run.yaml:9: key 'output_path' does not belong into stages, but into the file's top"},
      {stage("name: a, losses: [{function: hs_mse}], tokens: 8") +
           "  - {name: a, losses: [{function: hs_mse}], tokens: 8}\n",
       "run.yaml:10: two stages are named 'a'"},
      {head + "stages: 3\n", "run.yaml:8: stages must be a list"},
      {head + "stages: [3]\n", "run.yaml:8: a stage must be keys and values"},
  };
  for (const auto& [text, want] : cases)
    EXPECT_NE(error_of(text).find(want), std::string::npos) << error_of(text) << "\nfor " << want;
  // Stored teachers have logits only, and one data set.
  std::string stored = stage("losses: [{function: hs_mse}], tokens: 8");
  stored.replace(stored.find("{path: t}"), 9, "{kind: dataset}");
  EXPECT_NE(error_of(stored).find("hs_mse compares inner states, which a stored teacher does not have"),
            std::string::npos);
  // kda train.
  EXPECT_NE(error_of(stage("tokens: 8"), {}, true).find("`teacher` is given, but kda train"), std::string::npos);
  EXPECT_NE(error_of(stage("losses: [{function: hs_mse}], tokens: 8"), {"teacher="}, true).find("needs a teacher"),
            std::string::npos);
}

TEST(RunFile, TrainTakesCrossEntropyAlone) {
  const RunFile r = read(
      "model: s\noutput_path: o\ndataset: {train_dataset: {path: d}}\nsequence_length: 8\nbatch_size: 2\n"
      "learning_rate: 1e-3\nmax_steps: 4\n",
      {}, true);
  ASSERT_EQ(r.stages.size(), 1u);
  EXPECT_EQ(r.stages[0].name, "train");
  EXPECT_EQ(r.stages[0].losses.at(0).function, LossFunction::cross_entropy);
}

TEST(RunFile, TheCodecIsKeptAsJson) {
  const std::string text =
      "model: s\noutput_path: o\nteacher: {kind: dataset, logprob_compressor: {d: 260, k: 4, exact_dtype: bfloat16, "
      "polynomial_terms: [0, 1, sqrt], delta_encoding: false}}\ndataset: {train_dataset: {path: d}}\n"
      "losses: [{function: kl, temperature: 1}]\nsequence_length: 8\nbatch_size: 2\nlearning_rate: 1e-3\nmax_steps: "
      "4\n";
  const RunFile r = read(text);
  EXPECT_EQ(
      r.teacher.codec,
      "{\"d\":260,\"k\":4,\"exact_dtype\":\"bfloat16\",\"polynomial_terms\":[0,1,\"sqrt\"],\"delta_encoding\":false}");
  EXPECT_EQ(read(write_run_file(r)).teacher.codec, r.teacher.codec);
  EXPECT_EQ(r.teacher.kind, TeacherKind::stored);
}

TEST(RunFile, DocsAreMadeFromTheTable) {
  const std::string want = describe_run_keys(),
                    file = test::read_bytes(std::filesystem::path(KDA_SOURCE_DIR) / "docs/RUN_FILE.md");
  EXPECT_EQ(file == want, true) << "write it again:  kda distill --keys > docs/RUN_FILE.md";
}

TEST(Yaml, QuotesReadBack) {
  for (const std::string text : {"", "a", "a: b", "- x", "\"", "\\", "\n\t\x7f", "\xc3\xa9", "null", "'x'", "# x"}) {
    const Yaml y = parse_yaml("k: " + quote_yaml(text), "t");
    EXPECT_EQ(y.find("k")->text, text);
    EXPECT_EQ(y.find("k")->kind, Yaml::Kind::scalar);
  }
}

TEST(Schedule, Courses) {
  ScheduleSpec s{
      .kind = ScheduleKind::linear, .min_ratio = 0.1, .decay_ratio = 0.25, .warmup_ratio = 0, .warmup_steps = 4};
  EXPECT_DOUBLE_EQ(schedule_factor(s, 0, 20), 0.25);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 3, 20), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 4, 20), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 12, 20), 0.1 + 0.9 * 0.5);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 19, 20), 0.1 + 0.9 / 16);
  s.kind = ScheduleKind::cosine;
  EXPECT_DOUBLE_EQ(schedule_factor(s, 12, 20), 0.1 + 0.9 * 0.5);
  EXPECT_NEAR(schedule_factor(s, 8, 20), 0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);
  s.kind = ScheduleKind::wsd;
  EXPECT_DOUBLE_EQ(schedule_factor(s, 15, 20), 1);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 16, 20), 0.1 + 0.9 * 0.8);
  EXPECT_DOUBLE_EQ(schedule_factor(s, 19, 20), 0.1 + 0.9 * 0.2);
  s.kind = ScheduleKind::constant;
  EXPECT_DOUBLE_EQ(schedule_factor(s, 19, 20), 1);
  s = {.kind = ScheduleKind::linear, .min_ratio = 0, .decay_ratio = 0.2, .warmup_ratio = 0.025, .warmup_steps = 0};
  EXPECT_EQ(warmup_steps(s, 1000), 25);
  EXPECT_EQ(warmup_steps(s, 10), 1);
  s.warmup_steps = 50;
  EXPECT_EQ(warmup_steps(s, 10), 10);  // all of a short stage
  EXPECT_DOUBLE_EQ(schedule_factor(s, 9, 10), 1);
  EXPECT_THROW(schedule_factor(s, 10, 10), Error);
}

}  // namespace
}  // namespace kda
