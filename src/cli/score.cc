// cli/score.cc — kda score: how well a model predicts known text, and everything it computed on the way.
#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/progress.h"
#include "checkpoint/safetensors.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "eval/agreement.h"

namespace kda::cli {

namespace {

using nlohmann::json;

struct Options {
  ModelOptions model;
  std::string text_file, ids_file, out, compare;
  int64_t cut = 0, max_tokens = 0;
  bool hidden = false, as_json = false, no_special = false;
};

std::vector<std::vector<int32_t>> id_lists(const std::string& path) {
  const json all = parse_json(read_text(path), path);
  KDA_CHECK(all.is_array(), path, ": needed a JSON list of lists of token ids");
  if (!all.empty() && all[0].is_number()) return {json_ids(all, path)};  // one sequence, without the outer list
  std::vector<std::vector<int32_t>> out;
  for (const json& list : all) out.push_back(json_ids(list, cat(path, ": sequence ", out.size())));
  return out;
}

// One sequence a file; of a .jsonl file, one for each line's "text".
std::vector<std::vector<int32_t>> texts(const Options& o, const Engine& engine) {
  KDA_CHECK(engine.tokenizer(), "--text-file needs tokenizer.json, which this model folder lacks: give --ids-file");
  const std::string all = read_text(o.text_file);
  std::vector<std::vector<int32_t>> out;
  if (!o.text_file.ends_with(".jsonl")) {
    out.push_back(engine.tokenizer()->encode(all, !o.no_special));
    return out;
  }
  int64_t line_number = 0, tokens = 0;
  for (size_t at = 0; at < all.size() && (o.max_tokens == 0 || tokens < o.max_tokens);) {
    const size_t end = std::min(all.find('\n', at), all.size());
    const std::string_view line(all.data() + at, end - at);
    at = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const json j = parse_json(line, cat(o.text_file, " line ", line_number));
    KDA_CHECK(j.is_object() && j.contains("text") && j["text"].is_string(), o.text_file, " line ", line_number,
              ": needed an object with a string `text`");
    out.push_back(engine.tokenizer()->encode(j["text"].get<std::string>(), !o.no_special));
    tokens += int64_t(out.back().size());
  }
  return out;
}

std::vector<std::vector<int32_t>> sequences(const Options& o, const Engine& engine) {
  auto all = o.ids_file.empty() ? texts(o, engine) : id_lists(o.ids_file);
  if (o.cut > 0) {
    std::vector<std::vector<int32_t>> pieces;
    for (const auto& s : all)
      for (size_t at = 0; at < s.size(); at += size_t(o.cut))
        pieces.emplace_back(s.begin() + int64_t(at), s.begin() + int64_t(std::min(at + size_t(o.cut), s.size())));
    all = std::move(pieces);
  }
  if (o.max_tokens > 0) {
    int64_t left = o.max_tokens;
    std::vector<std::vector<int32_t>> kept;
    for (auto& s : all) {
      if (left <= 0) break;
      if (int64_t(s.size()) > left) s.resize(size_t(left));
      left -= int64_t(s.size());
      kept.push_back(std::move(s));
    }
    all = std::move(kept);
  }
  return all;
}

// Everything --out keeps, in memory until it is written.
class Record {
 public:
  View add(const std::string& name, Shape shape) {
    const Tensor t = host_tensor(Dtype::f32, shape);
    kept_.push_back(t);
    views_[name] = t;
    return t;
  }
  void save(const std::string& path) const { save_safetensors(path, views_, {{"format", "kda score"}}); }

 private:
  std::vector<Tensor> kept_;
  std::map<std::string, ConstView> views_;
};

ModelOptions other_model(const Options& o) {
  ModelOptions m = o.model;
  m.weights = "stored";
  m.weight_cache.clear();
  if (o.compare == "exact" && m.device == "cuda") m.device = "cpu";  // the only place that has it
  if (o.compare == "fast" || o.compare == "exact") m.precision = o.compare;
  else if (o.compare == "int8" || o.compare == "fp8") m.weights = o.compare;
  else if (o.compare == "cpu" || o.compare == "cuda") m.device = o.compare;
  else if (o.compare != "stored") m.model = o.compare;
  return m;
}

void run(const Options& o) {
  const auto engine = open_engine(o.model);
  const auto all = sequences(o, *engine);
  int64_t total = 0, predicted = 0;
  for (size_t n = 0; n < all.size(); ++n) {
    total += int64_t(all[n].size());
    predicted += std::max<int64_t>(0, int64_t(all[n].size()) - 1);
    for (const int32_t id : all[n])
      KDA_CHECK(id < engine->config().vocabulary, o.ids_file.empty() ? o.text_file : o.ids_file, ": sequence ", n, ": id ", id,
                " outside the model's vocabulary of ", engine->config().vocabulary);
  }
  KDA_CHECK(predicted > 0 || (!o.out.empty() && total > 0), "nothing to score: needed a sequence of two tokens or more, got ",
            total, " tokens in ", all.size(), " sequences");
  if (!o.out.empty()) check_output(o.out, engine->folder());
  std::unique_ptr<Engine> other;
  if (!o.compare.empty()) {
    other = open_engine(other_model(o));
    KDA_CHECK(other->config().vocabulary == engine->config().vocabulary, "--compare: vocabularies differ: ",
              engine->config().vocabulary, " and ", other->config().vocabulary);
  }

  const int64_t L = int64_t(engine->config().layers.size()), D = engine->config().width, V = engine->config().vocabulary;
  Record record;
  Agreement agreement;
  Progress progress(std::cerr, progress_style(stderr), "score", total, "tok");
  for (size_t n = 0; n < all.size(); ++n) {
    const std::vector<int32_t>& ids = all[n];
    const int64_t T = int64_t(ids.size());
    if (T == 0) continue;
    View logits;
    std::vector<View> hidden;
    if (!o.out.empty()) {
      logits = record.add(cat("logits.", n), {T, V});
      for (int64_t l = 0; o.hidden && l <= L; ++l) hidden.push_back(record.add(cat("hidden.", n, ".", l), {T, D}));
    }
    const auto keep = [&](View to, int64_t first, ConstView rows) {
      const float* p = rows.as<float>();
      std::copy(p, p + rows.size(), to.as<float>() + first * rows.dim(1));
    };
    Engine::OnHidden on_hidden;
    if (!hidden.empty()) on_hidden = [&](int64_t first, int64_t l, ConstView rows) { keep(hidden[size_t(l)], first, rows); };
    Session session(*engine), other_session(other ? *other : *engine);
    // Both models see the same pieces, so that only one piece's logits are held of each.
    constexpr int64_t kPiece = 512;
    for (int64_t at = 0; at < T; at += other ? kPiece : T) {
      const auto piece = std::span(ids).subspan(size_t(at), size_t(std::min(other ? kPiece : T, T - at)));
      std::vector<float> theirs;
      if (other)
        other->score(other_session, piece, [&](int64_t, ConstView rows) {
          const float* p = rows.as<float>();
          theirs.insert(theirs.end(), p, p + rows.size());
        });
      engine->score(
          session, piece,
          [&](int64_t first, ConstView rows) {
            if (logits.data) keep(logits, at + first, rows);
            const int64_t R = rows.dim(0);
            agreement.add(rows, other ? view(std::as_const(theirs).data() + first * V, {R, V}) : ConstView{},
                          std::span(ids).subspan(size_t(at + first)), engine->threads());
            progress.advance(R);
          },
          !on_hidden ? on_hidden
                     : [&](int64_t first, int64_t l, ConstView rows) { on_hidden(at + first, l, rows); });
    }
    for (int64_t l = 0; !o.out.empty() && o.hidden && l < L; ++l) {
      const LayerSpec& s = engine->config().layers[size_t(l)];
      if (s.mixer != Mixer::kda) continue;
      const auto S = session.kda_state(l);
      std::copy(S.begin(), S.end(), record.add(cat("state.", n, ".", l), {s.kda_heads, s.V, s.K}).as<float>());
    }
  }
  progress.finish();
  if (!o.out.empty()) record.save(o.out);

  const Agreement::Result r = agreement.result();
  if (o.as_json) {
    json j{{"sequences", all.size()}, {"tokens", total}, {"predicted", r.predicted}, {"loss", r.loss}, {"perplexity", std::exp(r.loss)}};
    if (other)
      j["compare"] = {{"with", o.compare},       {"loss", r.other_loss},          {"difference", r.loss - r.other_loss},
                      {"positions", r.positions}, {"kl", r.kl}, {"top1_agreement", r.top1}};
    std::cout << json_line(j);
    return;
  }
  std::printf("%zu sequences, %lld tokens, %lld predicted\nloss        %.6f nats per token\nperplexity  %.4f\n", all.size(),
              (long long)total, (long long)r.predicted, r.loss, std::exp(r.loss));
  if (other)
    std::printf("against %s: loss %.6f, difference %+.6f; KL %.3e nats per token; same top token at %.3f %% of %lld positions\n",
                o.compare.c_str(), r.other_loss, r.loss - r.other_loss, r.kl, 100 * r.top1, (long long)r.positions);
}

}  // namespace

void add_score(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("score", "loss and perplexity of known text, and the logits behind them");
  add_model_options(*c, o->model);
  auto* source = c->add_option_group("input");
  source->add_option("--text-file", o->text_file, "text, or .jsonl with a `text` in each line; - for standard input");
  source->add_option("--ids-file", o->ids_file, "a JSON list of lists of token ids");
  source->require_option(1);
  c->add_option("--cut", o->cut, "cut sequences into pieces of this many tokens, each from an empty state; 0: whole")
      ->check(whole_number());
  c->add_option("--max-tokens", o->max_tokens, "take this many tokens at most; 0: all")->check(whole_number());
  c->add_option("--compare", o->compare,
                "score again and print the difference: `stored`, `int8` or `fp8` weights, `fast` or `exact` products, on the `cpu` or with `cuda`, or another model folder");
  c->add_option("--out", o->out, "write logits.N [T,vocabulary] of each sequence N to this safetensors file (held in memory until then)");
  c->add_flag("--hidden", o->hidden,
              "with --out: also hidden.N.L [T,D] (0: embedding, L: after layer L, before the final norm) and state.N.L [H,V,K]");
  c->add_flag("--no-special", o->no_special, "do not put the begin-of-text token before texts");
  c->add_flag("--json", o->as_json, "print one JSON object");
  c->callback([o] {
    KDA_CHECK(!o->hidden || !o->out.empty(), "--hidden needs --out");
    run(*o);
  });
}

}  // namespace kda::cli
