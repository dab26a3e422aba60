#include "train/run_file.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "train/run_keys.h"

namespace kda {

using namespace run_keys;

namespace {
bool needs_temperature(LossFunction f) {
  return f == LossFunction::kl || f == LossFunction::jsd || f == LossFunction::tvd;
}
bool needs_logits(LossFunction f) {
  return needs_temperature(f) || f == LossFunction::hinge || f == LossFunction::logistic_ranking;
}

std::string function_of(const LossSpec& l) { return show_map(l, loss_keys()).find("function")->text; }

// Where a stage stands, for messages that belong to no single value.
std::string place(const Yaml* item, const std::string& name) { return item ? item->where : name; }

void check_losses(const Yaml& y) {
  if (y.kind != Yaml::Kind::list) return;
  for (const Yaml& loss : y.items) {
    const Yaml* f = loss.find("function");
    KDA_CHECK(f, loss.where, ": a loss without `function`");
    for (const auto& [key, functions] : std::vector<std::pair<std::string, std::set<std::string>>>{
             {"temperature", {"kl", "jsd", "tvd"}}, {"margin", {"hinge"}}})
      KDA_CHECK(!functions.count(f->text) || loss.find(key), f->where, ": the loss ", f->text, " needs `", key, "`");
  }
}

// Of a map of a stage's keys, wherever it stands.
void check_losses_below(const Yaml& map) {
  for (const char* name : {"losses", "loss_functions"})
    if (const Yaml* y = map.find(name)) check_losses(*y);
}

StageSpec read_stage(const Draft& draft, const Yaml& item, size_t number, Notes& notes) {
  StageSpec s = draft.base;
  s.name = cat("stage", number + 1);
  KDA_CHECK(item.kind == Yaml::Kind::map, item.where, ": a stage must be keys and values, is ", show(item));
  const auto says = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return item.find(n); });
  };
  // What a stage says of its length replaces all that was said outside.
  if (says({"tokens", "max_steps", "steps", "num_train_epochs", "epochs"})) s.tokens = s.steps = 0, s.epochs = 0;
  if (says({"warmup_steps", "warmup_ratio"})) s.schedule.warmup_steps = 0, s.schedule.warmup_ratio = 0;
  if (says({"frozen_res", "frozen", "frozen_modules"})) s.frozen.clear();
  check_losses_below(item);
  read_map(s, item, stage_keys(), "stages", notes);
  return s;
}

void check_stage(StageSpec& s, const RunFile& run, const std::string& where, bool only_text, bool whole_file,
                 const std::map<std::string, std::string>& given) {
  const auto needs = [&](const char* key, bool there) {
    KDA_CHECK(there, where, ": stage '", s.name, "' needs `", key, "`");
  };
  if (s.losses.empty() && only_text) s.losses = {{.function = LossFunction::cross_entropy}};
  if (s.losses.empty() && whole_file)  // DistillKit's own default
    s.losses = {{.function = LossFunction::cross_entropy, .weight = 0.5},
                {.function = LossFunction::kl, .weight = 0.5}};
  needs("losses", !s.losses.empty());
  needs("sequence_length", s.sequence_length > 0);
  needs("learning_rate", given.count("learning_rate"));
  needs("batch_size", given.count("batch_size"));
  KDA_CHECK(s.tokens == 0 || s.steps == 0, where, ": stage '", s.name, "' has `tokens` and `max_steps`; give one");
  KDA_CHECK(s.tokens > 0 || s.steps > 0 || s.epochs > 0, where, ": stage '", s.name,
            "' needs a length: `tokens`, `max_steps` or `num_train_epochs`");
  int64_t step_tokens = 0;
  KDA_CHECK(!__builtin_mul_overflow(s.batch_size, s.sequence_length, &step_tokens) && step_tokens <= INT32_MAX, where,
            ": stage '", s.name, "': a batch of ", s.batch_size, " x ", s.sequence_length, " tokens is more than ",
            INT32_MAX);
  double sum = 0;
  for (const LossSpec& l : s.losses) {
    sum += l.weight;
    KDA_CHECK(!only_text || l.function == LossFunction::cross_entropy, where, ": stage '", s.name, "': the loss ",
              function_of(l), " needs a teacher; kda train takes cross_entropy alone (kda distill has teachers)");
    KDA_CHECK(l.function == LossFunction::cross_entropy || run.teacher.kind != TeacherKind::none, where, ": stage '",
              s.name, "': the loss ", function_of(l), " needs a `teacher`");
    KDA_CHECK(l.function == LossFunction::cross_entropy || needs_logits(l.function) ||
                  run.teacher.kind != TeacherKind::stored,
              where, ": stage '", s.name, "': the loss ", function_of(l),
              " compares inner states, which a stored teacher does not have (teacher.kind: hf does)");
  }
  KDA_CHECK(sum > 0, where, ": stage '", s.name, "': the weights of its losses are all 0");
  for (const RateSpec& r : s.rates)
    KDA_CHECK(!r.match.empty() && (r.lr >= 0 || r.decay >= 0), where, ": stage '", s.name,
              "': a rate needs `match` and `learning_rate` or `weight_decay`");
}

// YAML that the parser above reads back: two spaces a level, flow lists for pairs.
void emit(const Yaml& y, int indent, std::string& out) {
  const auto inline_value = [](const Yaml& v) { return v.quoted ? quote_yaml(v.text) : v.text; };
  const std::string pad(size_t(indent) * 2, ' ');
  if (y.kind == Yaml::Kind::map) {
    for (const auto& [key, v] : y.fields) {
      if (v.kind == Yaml::Kind::scalar)
        out += pad + key + ": " + inline_value(v) + "\n";
      else if (!v.fields.empty() || !v.items.empty())
        out += pad + key + ":\n", emit(v, indent + 1, out);
    }
    return;
  }
  for (const Yaml& item : y.items) {
    if (item.kind == Yaml::Kind::scalar) {
      out += pad + "- " + inline_value(item) + "\n";
    } else if (item.kind == Yaml::Kind::list) {
      out += pad + "- [";
      for (size_t i = 0; i < item.items.size(); ++i) out += cat(i ? ", " : "", inline_value(item.items[i]));
      out += "]\n";
    } else {
      std::string block;
      emit(item, indent + 1, block);
      if (block.size() > pad.size() + 2) block[pad.size()] = '-';
      out += block;
    }
  }
}

template <class T>
void describe(const char* title, const char* path, const Keys<T>& keys, const T& defaults, std::string& out) {
  out += cat("\n## ", title, "\n", path, "\n\n| key | also | default | meaning |\n|---|---|---|---|\n");
  for (const auto& k : keys) {
    std::string others, value;
    for (const auto& o : k.others) others += cat(others.empty() ? "`" : ", `", o, "`");
    if (k.show)
      if (const Yaml v = k.show(defaults); v.kind == Yaml::Kind::scalar) value = cat("`", v.text, "`");
    out += cat("| `", k.name, "` | ", others, " | ", value, " | ", k.what, " |\n");
  }
}
}  // namespace

namespace run_keys {
void unknown_key(const std::string& where, const std::string& key, const std::string& section,
                 const std::vector<std::string>& known) {
  using Names = std::vector<std::string>;
  struct Place {
    const char* path;
    Names names;
  };
  const auto names = [](const auto& keys) {
    Names out;
    for (const auto& k : keys) {
      out.push_back(k.name);
      out.insert(out.end(), k.others.begin(), k.others.end());
    }
    return out;
  };
  if (const std::string near = nearest(key, known); !near.empty())
    throw Error(cat(where, ": unknown key '", key, "' in ", section, "; did you mean '", near, "'?"));
  for (const Place& p : {Place{"the file's top", names(top_keys())}, Place{"dataset", names(dataset_keys())},
                         Place{"dataset.train_dataset", names(one_dataset_keys())},
                         Place{"teacher", names(teacher_keys())}, Place{"a stage", names(stage_keys())},
                         Place{"training_args", names(training_args_keys())}, Place{"eval", names(eval_keys())},
                         Place{"eval.probes", names(probe_keys())}, Place{"checkpoints", names(checkpoint_keys())},
                         Place{"losses", names(loss_keys())}, Place{"rates", names(rate_keys())}})
    if (const std::string near = nearest(key, p.names); near == key)
      throw Error(cat(where, ": key '", key, "' does not belong into ", section, ", but into ", p.path));
  std::string all;
  for (const auto& k : known) all += cat(all.empty() ? "" : ", ", k);
  throw Error(cat(where, ": unknown key '", key, "' in ", section, "; known are ", all));
}
}  // namespace run_keys

RunFile read_run_file(std::string_view text, const std::string& name, const std::vector<std::string>& settings,
                      bool only_text, std::vector<std::string>& notes) {
  Yaml root = parse_yaml(text, name);
  for (const std::string& s : settings) set_yaml(root, s);
  KDA_CHECK(root.kind == Yaml::Kind::map, name, ": needed keys and values, is ", show(root));
  Draft draft;
  check_losses_below(root);
  if (const Yaml* args = root.find("training_args")) check_losses_below(*args);
  read_map(draft, root, top_keys(), "the run file", notes);
  RunFile& run = draft.run;
  KDA_CHECK(!run.model.empty(), name, ": `model` is not given: the student's folder");
  KDA_CHECK(!run.output.empty(), name, ": `output_path` is not given: the folder that the run writes");
  KDA_CHECK(!run.datasets.empty(), name, ": `dataset.train_dataset` is not given");
  for (const DatasetSpec& d : run.datasets)
    KDA_CHECK(!d.path.empty(), root.find("dataset")->where, ": a data set without `path`");
  KDA_CHECK(!run.eval.dataset || !run.eval.dataset->path.empty(), name, ": dataset.eval_dataset has no `path`");
  KDA_CHECK(!only_text || run.teacher.kind == TeacherKind::none, name,
            ": `teacher` is given, but kda train learns from the text alone; run it with kda distill");
  KDA_CHECK(only_text || run.teacher.kind != TeacherKind::none, name,
            ": no `teacher`; kda distill needs one (kda train learns from the text alone)");
  KDA_CHECK(run.teacher.kind != TeacherKind::live || !run.teacher.path.empty(), name, ": teacher.path is not given");
  KDA_CHECK(run.teacher.kind != TeacherKind::stored || run.datasets.size() == 1, name,
            ": a stored teacher (teacher.kind: dataset) goes with one data set, here are ", run.datasets.size());

  const Yaml whole_file;
  if (draft.stages.empty()) draft.base.name = only_text ? "train" : "distill";
  for (size_t i = 0; i < std::max<size_t>(1, draft.stages.size()); ++i) {
    const Yaml* item = draft.stages.empty() ? nullptr : &draft.stages[i];
    auto given = draft.given;
    for (const auto& k : stage_keys()) {
      if (!item) break;
      if (item->find(k.name)) given[k.name] = item->where;
      for (const auto& o : k.others)
        if (item->find(o)) given[k.name] = item->where;
    }
    StageSpec s = item ? read_stage(draft, *item, i, notes) : draft.base;
    check_stage(s, run, place(item, name), only_text, !item, given);
    for (const StageSpec& before : run.stages)
      KDA_CHECK(before.name != s.name, place(item, name), ": two stages are named '", s.name, "'");
    run.stages.push_back(std::move(s));
  }
  return run;
}

std::string write_run_file(const RunFile& run) {
  Draft draft;
  draft.run = run;
  std::string out;
  emit(show_map(draft, top_keys()), 0, out);
  return out;
}

std::string describe_run_keys() {
  std::string out =
      "# Keys of a run file\n"
      "Made by `kda distill --keys` from the table that reads them (src/train/run_keys.cc); DistillKit's names where "
      "it has them.\n"
      "An unknown key is an error, and so is one that cannot be honoured. `--set a.b=c` on the command line replaces a "
      "value;\n"
      "`--set stages.1.tokens=1e6` one in the second stage.\n";
  describe(
      "The run",
      "At the top of the file. Keys of a stage may stand here too: they hold for every stage that does not say its "
      "own.",
      [] {
        Keys<Draft> own;
        for (const auto& k : top_keys()) {
          bool of_stage = false;
          for (const auto& s : stage_keys()) of_stage |= s.name == k.name;
          if (!of_stage) own.push_back(k);
        }
        return own;
      }(),
      Draft{}, out);
  describe("Data", "`dataset`", dataset_keys(), Draft{}, out);
  describe("One data set", "`dataset.train_dataset`, `dataset.eval_dataset`", one_dataset_keys(), DatasetSpec{}, out);
  describe("Teacher", "`teacher`", teacher_keys(), TeacherSpec{.kind = TeacherKind::live}, out);
  describe("Stages", "`stages`, a list; or once, outside", stage_keys(), StageSpec{}, out);
  describe("Losses", "`losses`, a list", loss_keys(), LossSpec{.function = LossFunction::kl}, out);
  describe("Rates", "`rates`, a list", rate_keys(), RateSpec{}, out);
  describe("Evaluation", "`eval`", eval_keys(), RunFile{}, out);
  describe("Probes", "`eval.probes`", probe_keys(), ProbeSpec{}, out);
  describe("Checkpoints", "`checkpoints`", checkpoint_keys(), RunFile{}, out);
  describe(
      "Training arguments", "`training_args`: keys of a stage, of checkpoints, and these",
      [] {
        Keys<Draft> own;
        for (const auto& k : training_args_keys()) {
          bool known = false;
          for (const auto& s : stage_keys()) known |= s.name == k.name;
          for (const auto& s : checkpoint_keys()) known |= s.name == k.name;
          if (!known) own.push_back(k);
        }
        return own;
      }(),
      Draft{}, out);
  return out;
}

std::vector<ParameterRule> parameter_rules(const StageSpec& s) {
  std::vector<ParameterRule> rules;
  for (const std::string& f : s.frozen) rules.push_back({.regex = f, .trainable = false});
  std::string any;
  for (const std::string& t : s.trainable) any += cat(any.empty() ? "(?:" : "|(?:", t, ")");
  for (const RateSpec& r : s.rates)
    rules.push_back({.regex = any.empty() ? r.match : cat("^(?=.*?(?:", any, "))(?=.*?(?:", r.match, "))"),
                     .trainable = true,
                     .lr = r.lr,
                     .decay = r.decay});
  for (const std::string& t : s.trainable) rules.push_back({.regex = t});
  rules.push_back({.regex = ".", .trainable = s.trainable.empty()});
  return rules;
}

int64_t steps_of(const StageSpec& s, int64_t epoch_tokens) {
  if (s.steps > 0) return s.steps;
  const double tokens = s.tokens > 0 ? double(s.tokens) : s.epochs * double(epoch_tokens);
  return std::max<int64_t>(1, int64_t(std::ceil(tokens / double(s.step_tokens()))));
}

}  // namespace kda
