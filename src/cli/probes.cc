#include "cli/probes.h"

#include <algorithm>
#include <iostream>

#include "base/file.h"
#include "cli/options.h"

namespace kda::cli {

namespace {

double part(int64_t n, int64_t of) { return of > 0 ? double(n) / double(of) : 0; }

int64_t found(const std::vector<Answered>& answers) {
  return std::count_if(answers.begin(), answers.end(), [](const Answered& a) { return a.right; });
}

}  // namespace

std::vector<Question> read_questions(const std::string& path, const QuestionFilter& filter) {
  return parse_questions(read_text(path), path, filter);
}

Probes make_probes(const ProbeFiles& files, const std::filesystem::path& model_folder, const EngineOptions& options) {
  const auto tokenizer = std::make_shared<const Tokenizer>(Tokenizer::load(model_folder / "tokenizer.json"));
  GenerationDefaults generation;
  if (const auto path = model_folder / "generation_config.json"; path_exists(path)) {
    std::vector<std::string> ignored;
    generation = parse_generation_config(read_file(path), ignored, path.string());
  }
  std::vector<Question> needles, arithmetic;
  if (!files.needles.empty()) needles = read_questions(files.needles, files.needle_filter);
  if (!files.arithmetic.empty()) arithmetic = read_questions(files.arithmetic, {.limit = files.arithmetic_limit});
  const int64_t keys = files.needle_filter.keys;
  const std::string needle_name = keys > 0 ? cat("needle_", keys, "key") : "needle";
  return [=](const Weights& weights) {
    std::map<std::string, double> scores;
    Engine engine(weights, tokenizer.get(), generation, options);
    if (!needles.empty()) scores[needle_name] = part(found(ask_needles(engine, needles)), int64_t(needles.size()));
    if (!arithmetic.empty()) {
      const ArithmeticScore s = ask_arithmetic(engine, arithmetic, false);
      scores["arithmetic"] = part(s.whole, s.asked);
    }
    return scores;
  };
}

double ProbeScores::needle() const { return part(found(needle_answers), int64_t(needle_answers.size())); }
double ProbeScores::whole() const { return part(arithmetic.whole, arithmetic.asked); }
double ProbeScores::final_number() const { return part(arithmetic.final_number, arithmetic.asked); }

ProbeScores probe(Engine& engine, Engine* teacher, const ProbeWork& work, const std::string& label,
                  ProgressStyle style) {
  ProbeScores out;
  ProbeOptions o;
  o.new_tokens = work.new_tokens;
  const auto measure = [&](const char* what, int64_t total, const char* unit, auto&& run) {
    if (!total) return;
    Progress progress(std::cerr, style, cat(label, what), total, unit);
    o.progress = [&](int64_t done) { progress.set(done); };
    run();
    progress.finish();
  };
  for (const auto& d : work.documents) out.tokens += int64_t(d.size());
  out.documents = int64_t(work.documents.size());
  measure("held-out text", out.tokens, "tok", [&] { out.held_out = held_out(engine, teacher, work.documents, o); });
  out.needles = work.needles;
  measure("needles", int64_t(work.needles.size()), "questions",
          [&] { out.needle_answers = ask_needles(engine, work.needles, o); });
  measure("arithmetic", int64_t(work.arithmetic.size()), "questions",
          [&] { out.arithmetic = ask_arithmetic(engine, work.arithmetic, work.arithmetic_texts, o); });
  return out;
}

}  // namespace kda::cli
