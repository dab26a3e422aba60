// eval/probes.h — small measurements of what a model can do: find a needle, work out a sum, predict text as another
// model does. Greedy throughout; results do not depend on how questions are batched.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "eval/agreement.h"
#include "eval/questions.h"
#include "runtime/engine.h"

namespace kda {

struct ProbeOptions {
  int64_t new_tokens = 32;                     // generated for a needle at most
  int64_t batch_bytes = int64_t(512) << 20;    // of states: how many questions run together (at most 64)
  std::function<void(int64_t done)> progress;  // questions, or tokens for held_out, done so far
  std::function<bool()> cancelled;             // asked between batches; then an Error says so
};

struct Answered {
  std::string text;  // what the model said; cut where the answer was complete
  bool right = false;
};

// Needles: right when the answer (without white space around it) stands in the generated text, case ignored, as RULER
// counts. A text ends with the answer, the model's own end or new_tokens. One result a question. Throws Error without a
// tokenizer.
std::vector<Answered> ask_needles(Engine&, std::span<const Question>, const ProbeOptions& = {});

// Worked answers. `whole`: with the right answer given, the likeliest token is the right one at every place of it, so
// greedy decoding says exactly this answer: the headline, since it costs one pass and is what nano-teacher's
// scores.json holds. `final_number`: greedy text up to a blank line or the next "Question:" has the right number after
// its first
// "#### ", as lm-evaluation-harness takes GSM8K's strict match.
struct ArithmeticScore {
  int64_t asked = 0, whole = 0, final_number = 0;
  std::vector<Answered> answers;  // greedy texts with final_number's verdict; empty when only `whole` was asked for
};
ArithmeticScore ask_arithmetic(Engine&, std::span<const Question>, bool generate_too, const ProbeOptions& = {});

// The number right after the first "#### " of a worked answer, without `,` and a final `.`; empty: none.
std::string final_number(const std::string& text);

// Loss of the model over token sequences, each from an empty state; with a teacher also the teacher's loss, mean
// KL(teacher || model) at temperature 1 and top-1 agreement, over every position. Both run in pieces, so that a few MB
// of logits are held whatever the lengths. Throws Error when the vocabularies differ or nothing can be predicted.
Agreement::Result held_out(Engine& model, Engine* teacher, std::span<const std::vector<int32_t>> sequences,
                           const ProbeOptions& = {});

// The `text` of each line of a JSONL file as token ids, each cut to its first `first` tokens (0: whole). Throws Error
// naming `where` and the line.
std::vector<std::vector<int32_t>> tokenize_documents(const Tokenizer&, std::string_view jsonl, const std::string& where,
                                                     int64_t first);

}  // namespace kda
