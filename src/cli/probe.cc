// cli/probe.cc — kda probe: needles, arithmetic and held-out text, for a model alone or beside its teacher.
#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "cli/probes.h"

namespace kda::cli {

namespace {

using nlohmann::ordered_json;

struct Options {
  ModelOptions model;
  std::string teacher, needles, arithmetic, text;
  QuestionFilter filter;
  int64_t limit = 0, cut = 0, new_tokens = 32;
  bool as_json = false, answers = false;
};

using Group = std::tuple<std::string, int64_t, int64_t>;  // haystack, keys, chars
struct Count {
  int64_t asked = 0, found = 0;
};

std::map<Group, Count> grouped(const ProbeScores& s) {
  std::map<Group, Count> groups;
  for (size_t i = 0; i < s.needles.size(); ++i) {
    const Question& q = s.needles[i];
    Count& c = groups[{q.haystack, q.keys, q.chars}];
    ++c.asked;
    c.found += s.needle_answers[i].right;
  }
  return groups;
}

ordered_json answers_json(const std::vector<Answered>& answers, const std::vector<Question>& questions) {
  ordered_json list = ordered_json::array();
  for (size_t i = 0; i < answers.size(); ++i)
    list.push_back({{"answer", questions[i].answer}, {"said", answers[i].text}, {"right", answers[i].right}});
  return list;
}

void print_json(const Options& o, const ProbeScores& s, const ProbeWork& work) {
  ordered_json j{{"model", o.model.model}};
  if (!s.needles.empty()) {
    ordered_json groups = ordered_json::array();
    for (const auto& [g, c] : grouped(s))
      groups.push_back({{"haystack", std::get<0>(g)},
                        {"keys", std::get<1>(g)},
                        {"chars", std::get<2>(g)},
                        {"asked", c.asked},
                        {"found", double(c.found) / double(c.asked)}});
    j["needles"] = {{"asked", s.needles.size()}, {"found", s.needle()}, {"groups", groups}};
    if (o.answers) j["needles"]["answers"] = answers_json(s.needle_answers, s.needles);
  }
  if (s.arithmetic.asked) {
    j["arithmetic"] = {{"asked", s.arithmetic.asked}, {"whole_answer", s.whole()}, {"final_number", s.final_number()}};
    if (o.answers) j["arithmetic"]["answers"] = answers_json(s.arithmetic.answers, work.arithmetic);
  }
  if (s.documents) {
    j["held_out"] = {{"documents", s.documents}, {"tokens", s.tokens}, {"loss", s.held_out.loss}};
    if (!o.teacher.empty())
      j["held_out"].update({{"teacher", o.teacher},
                            {"teacher_loss", s.held_out.other_loss},
                            {"kl", s.held_out.kl},
                            {"top1_agreement", s.held_out.top1}});
  }
  std::cout << j.dump(-1, ' ', false, ordered_json::error_handler_t::replace) << '\n';
}

void print_answers(const char* what, const std::vector<Answered>& answers, const std::vector<Question>& questions) {
  for (size_t i = 0; i < answers.size(); ++i)
    std::printf("  %s %3zu  %-5s  wanted %s  said %s\n", what, i, answers[i].right ? "right" : "wrong",
                quoted(nlohmann::json(questions[i].answer)).c_str(), quoted(nlohmann::json(answers[i].text)).c_str());
}

void print(const Options& o, const ProbeScores& s, const ProbeWork& work) {
  if (!s.needles.empty()) {
    std::printf("needles     %5zu asked  %.3f found\n", s.needles.size(), s.needle());
    for (const auto& [g, c] : grouped(s)) {
      const auto& [haystack, keys, chars] = g;
      std::printf("  %-8s %3lld keys  %6lld characters  %5lld asked  %.3f found\n",
                  haystack.empty() ? "-" : haystack.c_str(), (long long)keys, (long long)chars, (long long)c.asked,
                  double(c.found) / double(c.asked));
    }
    if (o.answers) print_answers("needle", s.needle_answers, s.needles);
  }
  if (s.arithmetic.asked) {
    std::printf("arithmetic  %5lld asked  %.3f whole answers  %.3f right numbers\n", (long long)s.arithmetic.asked,
                s.whole(), s.final_number());
    if (o.answers) print_answers("arithmetic", s.arithmetic.answers, work.arithmetic);
  }
  if (s.documents) {
    std::printf("held-out    %5lld documents, %lld tokens\n  loss        %.4f nats per token\n", (long long)s.documents,
                (long long)s.tokens, s.held_out.loss);
    if (!o.teacher.empty())
      std::printf(
          "  teacher     %.4f nats per token\n  KL          %.4f nats per token\n  top-1       %.4f of positions "
          "agree\n",
          s.held_out.other_loss, s.held_out.kl, s.held_out.top1);
  }
}

void run(const Options& o) {
  ProbeWork work;
  work.new_tokens = o.new_tokens;
  QuestionFilter filter = o.filter;
  filter.limit = o.limit;
  if (!o.needles.empty()) work.needles = read_questions(o.needles, filter);
  if (!o.arithmetic.empty()) work.arithmetic = read_questions(o.arithmetic, {.limit = o.limit});
  const auto engine = open_engine(o.model);
  std::unique_ptr<Engine> teacher;
  if (!o.teacher.empty()) {
    ModelOptions t = o.model;
    t.model = o.teacher;
    t.weights = "stored";
    t.weight_cache.clear();
    teacher = open_engine(t);
  }
  if (!o.text.empty()) {
    KDA_CHECK(engine->tokenizer(), "--text needs tokenizer.json, which this model folder lacks");
    work.documents = tokenize_documents(*engine->tokenizer(), read_text(o.text), o.text, o.cut);
    if (o.limit > 0 && o.limit < int64_t(work.documents.size())) work.documents.resize(size_t(o.limit));
    KDA_CHECK(!work.documents.empty(), o.text, ": no documents");
  }
  const ProbeScores s = probe(*engine, teacher.get(), work, "", progress_style(stderr));
  o.as_json ? print_json(o, s, work) : print(o, s, work);
}

}  // namespace

void add_probe(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c =
      app.add_subcommand("probe", "what a model can do: find needles, do sums, predict text as its teacher does");
  add_model_options(*c, o->model);
  c->add_option("--teacher", o->teacher,
                "with --text: another model to compare with (KL of this model from it, top-1 agreement)");
  c->add_option("--needles", o->needles,
                "JSONL of needle questions: prompt, answer, haystack, keys, chars (`kda needles` makes them); - for "
                "standard input");
  c->add_option("--arithmetic", o->arithmetic, "JSONL of questions with worked answers that end in `#### N`");
  c->add_option("--text", o->text, "JSONL with a `text` in each line: held-out loss");
  c->add_option("--cut", o->cut, "only the first so many tokens of each text; 0: all")->check(whole_number());
  c->add_option("--keys", o->filter.keys, "only needles with so many keys; 0: any")->check(whole_number());
  c->add_option("--max-length-chars", o->filter.max_chars,
                "only needles whose haystack has at most so many characters; 0: any")
      ->check(whole_number());
  c->add_option("--limit", o->limit,
                "at most so many of each (questions spread over their file, the first texts); 0: all")
      ->check(whole_number());
  c->add_option("--new-tokens", o->new_tokens, "tokens a needle's answer may take")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_flag("--answers", o->answers, "list every answer");
  c->add_flag("--json", o->as_json, "print one JSON object");
  c->callback([o] {
    KDA_CHECK(!o->needles.empty() || !o->arithmetic.empty() || !o->text.empty(),
              "nothing to measure: give --needles, --arithmetic or --text");
    KDA_CHECK(o->teacher.empty() || !o->text.empty(), "--teacher needs --text");
    run(*o);
  });
}

}  // namespace kda::cli
