// cli/needles.cc — kda needles: makes needle questions, for probes or, with their answers, as training text.
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "eval/questions.h"

namespace kda::cli {

namespace {

struct Options {
  std::string haystack = "noise", value = "number", text, out;
  NeedleSpec spec;
  int64_t count = 10;
  uint64_t seed = 0;
  bool as_text = false;
};

// Sentences of a text file, or of every `text` of a .jsonl.
std::vector<std::string> sentences(const std::string& path) {
  const std::string all = read_text(path);
  if (!path.ends_with(".jsonl")) return sentences_of(all);
  std::vector<std::string> out;
  int64_t line_number = 0;
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find('\n', at), all.size());
    const std::string_view line(all.data() + at, end - at);
    at = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto j = parse_json(line, cat(path, " line ", line_number));
    KDA_CHECK(j.is_object() && j.contains("text") && j["text"].is_string(), path, " line ", line_number,
              ": needed an object with a string `text`");
    for (std::string& s : sentences_of(j["text"].get<std::string>())) out.push_back(std::move(s));
  }
  return out;
}

void run(Options o) {
  o.spec.haystack = o.haystack == "noise"   ? Haystack::noise
                    : o.haystack == "essay" ? Haystack::essay
                                            : Haystack::needles;
  o.spec.value = o.value == "uuid" ? NeedleValue::uuid : NeedleValue::number;
  KDA_CHECK((o.spec.haystack == Haystack::essay) == !o.text.empty(),
            "--text is the haystack of --haystack essay: give both or neither");
  const auto lines = o.text.empty() ? std::vector<std::string>() : sentences(o.text);
  KDA_CHECK(o.text.empty() || !lines.empty(), o.text, ": no sentence of 20 to 400 characters");
  std::string all;
  for (int64_t i = 0; i < o.count; ++i) {
    const Question q = make_needle(o.spec, lines, o.seed, uint64_t(i));
    all += o.as_text ? json_line({{"source", "needle"}, {"text", q.prompt + q.answer}}) : question_line(q);
  }
  if (o.out.empty() || o.out == "-") {
    std::cout << all;
    return;
  }
  AtomicFile file{o.out};
  file.write(all);
  file.commit();
}

}  // namespace

void add_needles(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(
      "needles", "make needle-in-a-haystack questions in RULER's wording, the same for the same seed");
  c->add_option("--haystack", o->haystack,
                "noise: one sentence over and over; essay: sentences of --text; needles: other needles")
      ->check(CLI::IsMember({"noise", "essay", "needles"}))
      ->capture_default_str();
  c->add_option("--text", o->text, "the text of --haystack essay: a text file, or .jsonl with a `text` in each line");
  c->add_option("--keys", o->spec.keys, "needles hidden in each; one is asked for")
      ->check(whole_number(1))
      ->capture_default_str();
  c->add_option("--value", o->value, "number: 7 digits; uuid")
      ->check(CLI::IsMember({"number", "uuid"}))
      ->capture_default_str();
  c->add_option("--chars", o->spec.chars, "characters of haystack")->check(whole_number(1))->capture_default_str();
  c->add_option("--count", o->count, "questions")->check(whole_number(1))->capture_default_str();
  c->add_option("--seed", o->seed, "another seed, other questions")->capture_default_str();
  c->add_flag("--as-text", o->as_text, "training text instead: {\"text\": prompt and answer}");
  c->add_option("-o,--out", o->out, "file to write; default: standard output");
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
