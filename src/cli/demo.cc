// cli/demo.cc — kda demo: a teacher and its students side by side, as one table. `make demo` ends with it.
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "cli/probes.h"

namespace kda::cli {

namespace {

using nlohmann::ordered_json;

struct Options {
  ModelOptions model;  // its folder is the teacher's
  std::string before, after, trained, needles, arithmetic, text, report, out;
  QuestionFilter filter{.keys = 1, .max_chars = 3000, .limit = 0};
  int64_t cut = 1024, limit = 0;
};

struct Row {
  std::string name, folder;
  bool teacher = false;
  ProbeScores scores;
  int64_t state_bytes = 0, token_bytes = 0;
  int64_t bytes(int64_t tokens) const { return state_bytes + token_bytes * tokens; }
};

constexpr std::pair<const char*, int64_t> kLengths[] = {{"1k", 1024}, {"32k", 32 * 1024}, {"1M", 1024 * 1024}};

std::string binary(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double v = double(bytes);
  int u = 0;
  for (; v >= 1024 && u < 4; ++u) v /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, v < 10 ? "%.2f %s" : "%.0f %s", v, units[u]);
  return text;
}

std::string fixed(double v, int digits) {
  char text[32];
  std::snprintf(text, sizeof text, "%.*f", digits, v);
  return text;
}

void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> width(rows.at(0).size(), 0);
  for (const auto& r : rows)
    for (size_t c = 0; c < r.size(); ++c) width[c] = std::max(width[c], r[c].size());
  for (const auto& r : rows) {
    for (size_t c = 0; c < r.size(); ++c) std::printf(c ? "  %*s" : "%-*s", int(width[c]), r[c].c_str());
    std::printf("\n");
  }
}

// The question that is shown: the first of the longest, chosen before any model has seen it.
size_t shown_question(const std::vector<Question>& questions) {
  size_t best = 0;
  for (size_t i = 0; i < questions.size(); ++i)
    if (questions[i].chars > questions[best].chars) best = i;
  return best;
}

// What comes before an answer, in one line: the beginning of the text, the needle, the question.
void print_question(const Question& q) {
  const size_t end = q.prompt.rfind('\n');
  const std::string answer = q.answer.substr(q.answer.find_first_not_of(' '));
  const size_t at = q.prompt.find(answer);
  std::printf("A needle, %lld characters of %s%s:\n", (long long)q.chars, q.haystack.c_str(),
              q.haystack == "noise" ? "" : " text");
  if (at != std::string::npos) {
    size_t from = q.prompt.rfind("One of", at);
    if (from == std::string::npos) from = at;
    std::printf("  ... %s. ...   (at character %zu of %zu)\n", q.prompt.substr(from, at + answer.size() - from).c_str(),
                from, q.prompt.size());
  }
  if (end != std::string::npos) std::printf("  %s ..\n", q.prompt.substr(end + 1).c_str());
}

ordered_json row_json(const Row& r, int64_t keys) {
  ordered_json j{{"name", r.name}, {"folder", r.folder}, {"held_out_loss", r.scores.held_out.loss}};
  if (!r.teacher) j.update({{"kl", r.scores.held_out.kl}, {"top1_agreement", r.scores.held_out.top1}});
  j[cat("needle_", keys, "key")] = r.scores.needle();
  j["arithmetic"] = r.scores.whole();
  j["arithmetic_final_number"] = r.scores.final_number();
  for (const auto& [name, tokens] : kLengths) j["memory_bytes"][name] = r.bytes(tokens);
  return j;
}

void run(const Options& o) {
  if (!o.out.empty()) check_output(o.out, model_folder(o.model.model));
  ProbeWork work;
  QuestionFilter filter = o.filter;
  filter.limit = o.limit;
  work.needles = read_questions(o.needles, filter);
  work.arithmetic = read_questions(o.arithmetic, {.limit = o.limit});
  const auto teacher = open_engine(o.model);
  KDA_CHECK(teacher->tokenizer(), o.model.model, ": has no tokenizer.json, which questions need");
  work.documents = tokenize_documents(*teacher->tokenizer(), read_text(o.text), o.text, o.cut);
  if (o.limit > 0 && o.limit < int64_t(work.documents.size())) work.documents.resize(size_t(o.limit));
  std::vector<Row> rows{{.name = "teacher", .folder = o.model.model, .teacher = true, .scores = {}}};
  const std::pair<const char*, const std::string*> students[] = {
      {"student before", &o.before}, {"student after", &o.after}, {"longer-trained", &o.trained}};
  for (const auto& [name, folder] : students)
    if (!folder->empty()) rows.push_back({.name = name, .folder = *folder, .scores = {}});
  for (Row& r : rows) {
    ModelOptions m = o.model;
    m.model = r.folder;
    const auto own = r.teacher ? nullptr : open_engine(m);
    Engine& engine = own ? *own : *teacher;
    r.state_bytes = engine.config().state_bytes();
    r.token_bytes = engine.config().kv_bytes_per_token(Dtype::f32);
    r.scores = probe(engine, r.teacher ? nullptr : teacher.get(), work, r.name + ": ", progress_style(stderr));
  }

  const std::string needle_name = cat("needle, ", o.filter.keys, o.filter.keys == 1 ? " key" : " keys");
  std::vector<std::vector<std::string>> table{{"", "held-out loss", "KL", "top-1", needle_name, "arithmetic"}};
  for (const Row& r : rows) {
    const Agreement::Result& h = r.scores.held_out;
    table.push_back({r.name, fixed(h.loss, 3), r.teacher ? "-" : fixed(h.kl, 3), r.teacher ? "-" : fixed(h.top1, 3),
                     fixed(r.scores.needle(), 2), fixed(r.scores.whole(), 2)});
  }
  std::printf("\n");
  print_table(table);
  std::printf(
      "(%zu texts of at most %lld tokens, %zu needles, %zu sums; loss and KL from the teacher in nats per token; "
      "top-1: share of\n"
      " positions with the teacher's likeliest token; needle: share found; arithmetic: share of answers that are right "
      "word for word)\n\n",
      work.documents.size(), (long long)o.cut, work.needles.size(), work.arithmetic.size());

  const size_t q = shown_question(work.needles);
  print_question(work.needles[q]);
  for (const Row& r : rows) {
    const Answered& a = r.scores.needle_answers[q];
    std::printf("  %-16s %s  %s\n", r.name.c_str(), a.right ? "right" : "WRONG",
                quoted(nlohmann::json(a.text)).c_str());
  }

  std::printf("\nMemory of one sequence (fp32, as kda keeps it on the CPU):\n");
  std::vector<std::vector<std::string>> sizes{{"tokens"}};
  for (const auto& [name, tokens] : kLengths) sizes[0].push_back(name);
  for (const Row& r : rows) {
    if (&r != &rows.front() && &r != &rows.back() && r.bytes(1024) == rows.back().bytes(1024))
      continue;  // students alike
    sizes.push_back({r.teacher ? "teacher, keys and values" : "student, state"});
    for (const auto& [name, tokens] : kLengths) sizes.back().push_back(binary(r.bytes(tokens)));
  }
  print_table(sizes);
  if (!o.report.empty()) std::printf("\nCurves of the training run: %s\n", o.report.c_str());

  if (o.out.empty()) return;
  ordered_json j;
  for (const Row& r : rows) j["models"].push_back(row_json(r, o.filter.keys));
  j["asked"] = {{"documents", work.documents.size()},
                {"tokens", rows[0].scores.tokens},
                {"needles", work.needles.size()},
                {"arithmetic", work.arithmetic.size()}};
  ordered_json& shown = j["needle"] = {{"prompt", work.needles[q].prompt}, {"answer", work.needles[q].answer}};
  for (const Row& r : rows)
    shown["said"].push_back(
        {{"name", r.name}, {"text", r.scores.needle_answers[q].text}, {"right", r.scores.needle_answers[q].right}});
  if (!o.report.empty()) j["report"] = o.report;
  AtomicFile file{o.out};
  file.write(j.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n");
  file.commit();
  std::printf("These numbers as JSON: %s\n", o.out.c_str());
}

}  // namespace

void add_demo(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("demo", "a teacher and its students side by side (-m: the teacher)");
  add_model_options(*c, o->model);
  c->add_option("--before", o->before, "the student before training");
  c->add_option("--after", o->after, "the student after training")->required();
  c->add_option("--trained", o->trained, "a student that was trained for longer");
  c->add_option("--needles", o->needles, "JSONL of needle questions")->required();
  c->add_option("--arithmetic", o->arithmetic, "JSONL of questions with worked answers")->required();
  c->add_option("--text", o->text, "JSONL with a `text` in each line: held-out text")->required();
  c->add_option("--cut", o->cut, "only the first so many tokens of each text; 0: all")
      ->check(whole_number())
      ->capture_default_str();
  c->add_option("--limit", o->limit, "at most so many of each; 0: all")->check(whole_number());
  c->add_option("--keys", o->filter.keys, "only needles with so many keys")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--max-length-chars", o->filter.max_chars,
                "only needles whose haystack has at most so many characters; 0: any")
      ->check(whole_number())
      ->capture_default_str();
  c->add_option("--report", o->report, "the report's path, to be named at the end");
  c->add_option("--json", o->out, "write the numbers to this file");
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
