// eval/questions.h — questions with known answers: needles in haystacks, worked arithmetic. Read from JSONL, or made
// here.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

struct Question {
  std::string prompt;
  std::string answer;    // as it follows the prompt, leading space included
  std::string haystack;  // needles: "noise", "essay", "needles"; else empty
  int64_t keys = 0;      // needles hidden; 0: not said
  int64_t chars = 0;     // length of the haystack that was asked for; 0: not said
};

// Which questions of a file are asked, in the file's order.
struct QuestionFilter {
  int64_t keys = 0;       // exactly so many; 0: any
  int64_t max_chars = 0;  // `chars` (where it is not said: the prompt's characters) at most this; 0: any
  int64_t limit = 0;      // this many at most, spread evenly over the file; 0: all
};

// One object a line: prompt and answer, and for needles haystack, keys, chars. Unknown fields are left alone. Throws
// Error naming `where` and the line; also when no line passes the filter.
std::vector<Question> parse_questions(std::string_view jsonl, const std::string& where, const QuestionFilter& = {});

// One line for a file that parse_questions reads, with its newline.
std::string question_line(const Question&);

enum class Haystack { noise, essay, needles };
enum class NeedleValue { number, uuid };
const char* name_of(Haystack);

struct NeedleSpec {
  Haystack haystack = Haystack::noise;
  NeedleValue value = NeedleValue::number;
  int64_t keys = 1;      // needles, each under its own key; one is asked for. Haystack::needles: as many as fill it
  int64_t chars = 3000;  // of haystack; lines are added until it is reached
};

// Sentences of a text, for Haystack::essay: cut after `.`, `!`, `?` before white space, and at empty lines; white space
// runs become one space. Too short or too long ones (20 to 400 bytes) are left out.
std::vector<std::string> sentences_of(std::string_view text);

// A needle question in RULER's wording. It depends on (spec, sentences, seed, index) alone: the same on every machine.
// sentences are drawn in runs from a random place; needed for Haystack::essay only. Throws Error for a spec that cannot
// be met (keys below 1, no sentences).
// Source: RULER's niah tasks (NVIDIA/RULER scripts/data/synthetic/niah.py): wording and value kinds.
Question make_needle(const NeedleSpec&, const std::vector<std::string>& sentences, uint64_t seed, uint64_t index);

}  // namespace kda
