#include "eval/probes.h"

#include <algorithm>

#include "checkpoint/json.h"
#include "runtime/generate.h"

namespace kda {

namespace {

std::string trimmed(const std::string& s) {
  const char* space = " \t\r\n";
  const size_t from = s.find_first_not_of(space), to = s.find_last_not_of(space);
  return from == std::string::npos ? "" : s.substr(from, to - from + 1);
}

std::string lower(std::string s) {
  for (char& c : s)
    if (c >= 'A' && c <= 'Z') c = char(c - 'A' + 'a');
  return s;
}

const Tokenizer& tokenizer_of(const Engine& engine, const char* what) {
  KDA_CHECK(engine.tokenizer(), what, " need a tokenizer, and this model has none");
  return *engine.tokenizer();
}

void check_going_on(const ProbeOptions& o) { KDA_CHECK(!o.cancelled || !o.cancelled(), "the probe was stopped"); }

// Greedy continuations, as many together as their states leave room for: sequences of one set, so that the pool is
// sized once, for the longest.
std::vector<Generated> continue_all(Engine& engine, std::vector<GenerationRequest> requests, const ProbeOptions& o) {
  int64_t longest = 1;
  for (const GenerationRequest& r : requests)
    longest = std::max(longest, int64_t(r.prompt.size()) + r.params.max_new_tokens);
  const int64_t each = engine.config().state_bytes() + engine.config().kv_bytes_per_token(Dtype::f32) * longest;
  const size_t batch = size_t(std::clamp<int64_t>(o.batch_bytes / std::max<int64_t>(each, 1), 1, 64));
  std::vector<Generated> all;
  for (size_t at = 0; at < requests.size(); at += batch) {
    check_going_on(o);
    const auto from = requests.begin() + int64_t(at),
               to = requests.begin() + int64_t(std::min(at + batch, requests.size()));
    std::vector<GenerationRequest> some(std::make_move_iterator(from), std::make_move_iterator(to));
    for (Generated& g : generate(engine, some)) all.push_back(std::move(g));
    if (o.progress) o.progress(int64_t(all.size()));
  }
  return all;
}

GenerationRequest greedy_request(std::vector<int32_t> prompt, int64_t new_tokens, std::vector<std::string> stop) {
  GenerationRequest r;
  r.prompt = std::move(prompt);
  r.params.max_new_tokens = new_tokens;
  r.params.stop = std::move(stop);
  return r;
}

}  // namespace

std::vector<Answered> ask_needles(Engine& engine, std::span<const Question> questions, const ProbeOptions& o) {
  const Tokenizer& tokenizer = tokenizer_of(engine, "needles");
  std::vector<GenerationRequest> requests;
  for (const Question& q : questions)
    requests.push_back(greedy_request(tokenizer.encode(q.prompt), o.new_tokens, {trimmed(q.answer)}));
  std::vector<Answered> out;
  for (const Generated& g : continue_all(engine, std::move(requests), o)) {
    const std::string answer = trimmed(questions[out.size()].answer);
    // A stop text is cut off what is shown; it belongs to the answer.
    const std::string text = g.text + g.stop;
    out.push_back({text, lower(text).find(lower(answer)) != std::string::npos});
  }
  return out;
}

std::string final_number(const std::string& text) {
  const size_t mark = text.find("#### ");
  if (mark == std::string::npos) return "";
  std::string out;
  for (size_t i = mark + 5; i < text.size(); ++i) {
    const char c = text[i];
    if ((c == '-' && i == mark + 5) || (c >= '0' && c <= '9') || c == '.')
      out += c;
    else if (c != ',')
      break;
  }
  while (!out.empty() && out.back() == '.') out.pop_back();
  return out == "-" ? "" : out;
}

namespace {

// Whether the likeliest token after `prompt` and each beginning of `answer` is the answer's next one.
bool says_whole(Engine& engine, const std::vector<int32_t>& prompt, const std::vector<int32_t>& answer) {
  std::vector<int32_t> ids = prompt;
  ids.insert(ids.end(), answer.begin(), answer.end());
  ids.pop_back();  // nothing is asked of what follows the last one
  bool right = true;
  Session session(engine);
  engine.score(session, ids, [&](int64_t first, ConstView logits) {
    const int64_t R = logits.dim(0), V = logits.dim(1);
    for (int64_t r = std::max<int64_t>(0, int64_t(prompt.size()) - 1 - first); r < R && right; ++r) {
      const float* row = logits.as<float>() + r * V;
      right = std::max_element(row, row + V) - row == answer[size_t(first + r + 1) - prompt.size()];
    }
  });
  return right;
}

}  // namespace

ArithmeticScore ask_arithmetic(Engine& engine, std::span<const Question> questions, bool generate_too,
                               const ProbeOptions& o) {
  const Tokenizer& tokenizer = tokenizer_of(engine, "arithmetic questions");
  ArithmeticScore score;
  score.asked = int64_t(questions.size());
  std::vector<GenerationRequest> requests;
  int64_t done = 0;
  for (const Question& q : questions) {
    check_going_on(o);
    const std::vector<int32_t> prompt = tokenizer.encode(q.prompt), answer = tokenizer.encode(q.answer, false);
    KDA_CHECK(!prompt.empty() && !answer.empty(), "arithmetic: a question without tokens: \"", q.prompt, "\"");
    score.whole += says_whole(engine, prompt, answer);
    // Room for a wrong way of working it out to come to its end.
    if (generate_too)
      requests.push_back(greedy_request(prompt, 2 * int64_t(answer.size()) + 16, {"\n\n", "Question:"}));
    if (o.progress && !generate_too) o.progress(++done);
  }
  if (!generate_too) return score;
  for (const Generated& g : continue_all(engine, std::move(requests), o)) {
    const std::string want = final_number(questions[score.answers.size()].answer), got = final_number(g.text);
    score.answers.push_back({g.text, !got.empty() && got == want});
    score.final_number += score.answers.back().right;
  }
  return score;
}

Agreement::Result held_out(Engine& model, Engine* teacher, std::span<const std::vector<int32_t>> sequences,
                           const ProbeOptions& o) {
  const int64_t V = model.config().vocabulary;
  KDA_CHECK(!teacher || teacher->config().vocabulary == V, "the models' vocabularies differ: ", V, " and ",
            teacher->config().vocabulary);
  constexpr int64_t kPiece = 512;  // tokens whose logits are held at once, for one of the models
  Agreement agreement;
  std::vector<float> theirs;
  int64_t done = 0;
  for (const std::vector<int32_t>& ids : sequences) {
    Session session(model), other(teacher ? *teacher : model);
    for (int64_t at = 0; at < int64_t(ids.size()); at += kPiece) {
      check_going_on(o);
      const auto rest = std::span(ids).subspan(size_t(at));
      const auto piece = rest.first(size_t(std::min(kPiece, int64_t(rest.size()))));
      theirs.clear();
      if (teacher)
        teacher->score(other, piece, [&](int64_t, ConstView rows) {
          const float* p = rows.as<float>();
          theirs.insert(theirs.end(), p, p + rows.size());
        });
      model.score(session, piece, [&](int64_t first, ConstView rows) {
        const ConstView same = teacher ? view(std::as_const(theirs).data() + first * V, rows.shape) : ConstView{};
        agreement.add(rows, same, rest.subspan(size_t(first)), model.threads());
      });
      done += int64_t(piece.size());
      if (o.progress) o.progress(done);
    }
  }
  const Agreement::Result r = agreement.result();
  KDA_CHECK(r.predicted > 0, "held-out text: needed a sequence of two tokens or more, got ", done, " tokens in ",
            sequences.size(), " sequences");
  return r;
}

std::vector<std::vector<int32_t>> tokenize_documents(const Tokenizer& tokenizer, std::string_view jsonl,
                                                     const std::string& where, int64_t first) {
  std::vector<std::vector<int32_t>> out;
  int64_t line_number = 0;
  for (size_t at = 0; at < jsonl.size();) {
    const size_t end = std::min(jsonl.find('\n', at), jsonl.size());
    const std::string_view line = jsonl.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string place = cat(where, " line ", line_number);
    const nlohmann::json object = parse_json_object(line, place);
    const auto text = Fields(object, place).string("text");
    KDA_CHECK(text, place, ": needed an object with a string `text`");
    out.push_back(tokenizer.encode(*text));
    if (first > 0 && int64_t(out.back().size()) > first) out.back().resize(size_t(first));
  }
  return out;
}

}  // namespace kda
