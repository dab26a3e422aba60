// cli/probes.h — the probes of a model in training: what the training loop calls without knowing what they are.
#pragma once
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "base/progress.h"
#include "eval/probes.h"
#include "model/weights.h"
#include "runtime/engine.h"

namespace kda::cli {

// Files of questions; an empty path: not asked.
struct ProbeFiles {
  std::string needles, arithmetic;
  QuestionFilter needle_filter{.keys = 1, .max_chars = 3000, .limit = 0};
  int64_t arithmetic_limit = 0;  // 0: all questions
};

// name -> score from 0 to 1, for metrics.jsonl: "needle_1key" ("needle_Nkey" for N keys, "needle" for any),
// "arithmetic" (whole answers, see ArithmeticScore). The files and the folder's tokenizer are read at once, so that a
// mistake in them is found before a run begins; each call builds an engine over the weights it is given, which shares
// their tensors, and leaves nothing behind. Throws Error naming the file.
using Probes = std::function<std::map<std::string, double>(const Weights&)>;
Probes make_probes(const ProbeFiles&, const std::filesystem::path& model_folder, const EngineOptions&);

// The same for one engine, with counts and what was said; used by `kda probe` and `kda demo`.
struct ProbeScores {
  std::vector<Question> needles;
  std::vector<Answered> needle_answers;
  ArithmeticScore arithmetic;
  Agreement::Result held_out;
  int64_t documents = 0, tokens = 0;
  double needle() const;  // share found; 0 when none was asked
  double whole() const;   // share of whole answers
  double final_number() const;
};

// What to measure one model on. `teacher`, for held-out text, may be null.
struct ProbeWork {
  std::vector<Question> needles, arithmetic;
  std::vector<std::vector<int32_t>> documents;
  int64_t new_tokens = 32;
  bool arithmetic_texts = true;  // greedy answers too, not whole answers alone
};
ProbeScores probe(Engine&, Engine* teacher, const ProbeWork&, const std::string& label, ProgressStyle);

// A file of questions, or standard input for "-".
std::vector<Question> read_questions(const std::string& path, const QuestionFilter&);

}  // namespace kda::cli
