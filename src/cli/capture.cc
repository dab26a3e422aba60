// cli/capture.cc — kda capture: a teacher's likeliest next tokens over a data set, stored for distillation without it.
#include <charconv>
#include <iostream>
#include <sstream>

#include "base/file.h"
#include "base/progress.h"
#include "base/sha256.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "train/capture.h"
#include "train/run_file.h"
#include "train/text_rows.h"

namespace kda::cli {

namespace {

struct Options {
  std::string run_file, model, data, out, precision = "fast", text_key = "text", cache, codec_file;
  int threads = 0;
  int64_t sequence_length = 0, top_k = 0, max_tokens = 0;  // 0: the run file's, else 2048 and 64
  bool resume = false;
  // the codec, with DistillKit's names
  int64_t exact_k = -1;
  std::string exact_dtype = "float32", term_dtype = "float32", polynomial_terms = "0,1,2";
  std::vector<std::string> residual_bins;
  bool no_delta_encoding = false, error_diffusion = false, normalize_t = false;
};

// "float16:8:48" -> {"scale_dtype": "float16", "element_bits": 8, "num_elements": 48}
std::string bin_json(const std::string& text) {
  std::istringstream in(text);
  std::string dtype, bits, elements, rest;
  std::getline(in, dtype, ':');
  std::getline(in, bits, ':');
  std::getline(in, elements, ':');
  const auto number = [](const std::string& s) {
    return !s.empty() && s.size() < 10 && s.find_first_not_of("0123456789") == std::string::npos;
  };
  KDA_CHECK(number(bits) && number(elements) && !std::getline(in, rest),
            "--residual-bins: needed DTYPE:BITS:ELEMENTS, ", "for example float16:8:48, got ", text);
  return cat(R"({"scale_dtype":")", dtype, R"(","element_bits":)", std::stol(bits), R"(,"num_elements":)",
             std::stol(elements), "}");
}

std::string terms_json(const std::string& text) {
  std::string out;
  std::istringstream in(text);
  for (std::string term; std::getline(in, term, ',');) {
    const bool number = !term.empty() && term.size() < 4 && term.find_first_not_of("0123456789") == std::string::npos;
    KDA_CHECK(number || term == "sqrt" || term == "exp", "--polynomial-terms: needed powers, sqrt or exp with commas ",
              "between, got \"", text, "\"");
    out += cat(out.empty() ? "" : ",", number ? cat(std::stol(term)) : cat('"', term, '"'));
  }
  return out;
}

// Unless options say otherwise: the first 16 exactly, of the others a parabola and 8 bits each beside it.
LogprobCodecConfig codec_config(const Options& o, int64_t vocabulary) {
  if (!o.codec_file.empty()) {
    const LogprobCodecConfig c = parse_codec_config(read_text(o.codec_file), o.codec_file);
    KDA_CHECK(c.d == vocabulary, o.codec_file, ": d is ", c.d, ", the model's vocabulary ", vocabulary);
    return c;
  }
  const int64_t k = std::min(o.top_k, vocabulary), exact = o.exact_k >= 0 ? o.exact_k : std::min<int64_t>(16, k);
  std::string bins;
  for (const std::string& b : o.residual_bins) bins += (bins.empty() ? "" : ",") + bin_json(b);
  if (o.residual_bins.empty() && k > exact) bins = bin_json(cat("float16:8:", k - exact));
  const auto flag = [](bool b) { return b ? "true" : "false"; };
  return parse_codec_config(
      cat(R"({"d":)", vocabulary, R"(,"k":)", k, R"(,"exact_k":)", exact, R"(,"exact_dtype":")", o.exact_dtype,
          R"(","polynomial_terms":[)", k > exact ? terms_json(o.polynomial_terms) : "", R"(],"term_dtype":")",
          o.term_dtype, R"(","residual_bins":[)", bins, R"(],"delta_encoding":)", flag(!o.no_delta_encoding),
          R"(,"error_diffusion":)", flag(o.error_diffusion), R"(,"normalize_t":)", flag(o.normalize_t), "}"),
      "codec options");
}

// What a run with a live teacher would take, where no option says otherwise.
void fill_in(Options& o) {
  if (!o.run_file.empty()) {
    std::vector<std::string> notes;
    const RunFile run = read_run_file(read_text(o.run_file), o.run_file, {}, false, notes);
    KDA_CHECK(run.teacher.kind == TeacherKind::live || !o.model.empty(), o.run_file,
              ": its teacher is stored already; capture needs teacher.path, or -m");
    if (o.model.empty()) o.model = run.teacher.path;
    if (o.data.empty()) {
      KDA_CHECK(run.datasets.size() == 1, o.run_file, ": a stored teacher goes with one data set, here are ",
                run.datasets.size(), "; name it with --data");
      o.data = run.datasets[0].path;
      o.text_key = run.datasets[0].text_key;
    }
    for (const StageSpec& s : run.stages)
      if (!o.sequence_length) o.sequence_length = s.sequence_length;
    if (!o.top_k) o.top_k = run.teacher.top_k;
  }
  KDA_CHECK(!o.model.empty() && !o.data.empty(),
            "capture needs a teacher (-m) and text (--data), or a run file (--run)");
  if (!o.sequence_length) o.sequence_length = 2048;
  if (!o.top_k) o.top_k = 64;
}

void run(const Options& o) {
  const std::filesystem::path folder = model_folder(o.model), out = o.out;
  const Checkpoint checkpoint = load_checkpoint(folder);
  for (const std::string& w : checkpoint.warnings) std::cerr << "warning: " << w << '\n';
  const Weights weights = arrange_weights(checkpoint);
  const ModelConfig& c = weights.config;
  const LogprobCodec codec(codec_config(o, c.vocabulary));
  ThreadPool pool(o.threads);

  const TextEncoder encoder = TextEncoder::load(folder, c.eos.empty() ? -1 : c.eos.front(), int32_t(c.vocabulary));
  TextOptions text;
  text.text_key = o.text_key;
  text.cache = o.cache.empty() ? out / "tokens" : std::filesystem::path(o.cache);
  std::unique_ptr<Progress> reading;
  std::string now;
  text.progress = [&](const char* what, int64_t done, int64_t all) {
    if (now != what) reading = std::make_unique<Progress>(std::cerr, progress_style(stderr), now = what, all, "B");
    reading->set(done);
    if (done == all) reading->finish();
  };
  const auto rows = open_text(
      o.data, [&]() -> const TextEncoder& { return encoder; }, text, pool);
  const CaptureSizes sizes{.sequence_length = o.sequence_length, .max_tokens = o.max_tokens};
  const int64_t total = capture_tokens(*rows, sizes);
  KDA_CHECK(total > 0, o.data, ": nothing to capture: no document of two tokens or more");

  CaptureWriter writer(out,
                       {.codec = codec.config(),
                        .model = o.model,
                        .teacher = checkpoint.fingerprint,
                        .tokenizer = Sha256().add(read_file(folder / "tokenizer.json")).hex(),
                        .data = rows->fingerprint(),
                        .sequence_length = o.sequence_length,
                        .max_tokens = o.max_tokens},
                       o.resume);
  if (writer.rows()) std::cerr << "going on after " << writer.rows() << " rows, " << writer.tokens() << " tokens\n";
  const int64_t bytes = codec.value_bytes() + codec.index_bytes();
  std::cerr << total << " tokens, " << codec.config().k << " ids each, " << bytes << " bytes a token, "
            << with_prefix(double(total * (bytes + 4)), "B") << " in all\n";
  Context ctx;
  ctx.backend = &cpu_backend();
  ctx.pool = &pool;
  ctx.precision = o.precision == "exact" ? Precision::exact : Precision::fast;
  Progress progress(std::cerr, progress_style(stderr), "capture", total, "tok");
  capture(ctx, weights, *rows, sizes, codec, writer, [&](int64_t tokens) { progress.set(tokens); });
  progress.finish();
  std::printf("%s: %lld rows, %lld tokens\n", o.out.c_str(), (long long)writer.rows(), (long long)writer.tokens());
}

}  // namespace

void add_capture(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("capture", "store a teacher's likeliest next tokens, to distil without running it");
  c->add_option("-m,--model", o->model, "the teacher: a model folder, or owner/name in the local Hugging Face cache");
  c->add_option("--data", o->data, "text: a file or folder of .jsonl, .txt or token shards");
  c->add_option("--run", o->run_file, "a run file with a live teacher: model, data, length and top_k as there");
  c->add_option("-o,--output", o->out, "folder to write")->required();
  c->add_option("--sequence-length", o->sequence_length,
                "documents are cut into pieces of so many tokens (default: 2048)")
      ->check(whole_number(2));
  c->add_option("--max-tokens", o->max_tokens, "take so many tokens at most; 0: all")->check(whole_number());
  c->add_flag("--resume", o->resume, "go on with a capture that was interrupted");
  c->add_option("--text-key", o->text_key, "key of the text in .jsonl lines")->capture_default_str();
  c->add_option("--cache", o->cache, "folder for tokenized text (default: OUTPUT/tokens)");
  c->add_option("--precision", o->precision, "fast: bf16 products where the CPU has them; exact: fp32")
      ->check(CLI::IsMember({"fast", "exact"}))
      ->capture_default_str();
  c->add_option("-t,--threads", o->threads, "threads; 0: one per core")->check(CLI::Range(0, 4096));
  const std::vector<std::string> dtypes{"float16", "bfloat16", "float32", "float64"};
  auto* g = c->add_option_group("codec", "how log-probabilities are stored; names as in DistillKit");
  g->add_option("-k,--top-k,--k", o->top_k, "ids kept of each token (default: 64)")->check(whole_number(1));
  g->add_option("--exact-k", o->exact_k, "values stored as they are (default: 16)")->check(whole_number());
  g->add_option("--exact-dtype", o->exact_dtype)->check(CLI::IsMember(dtypes))->capture_default_str();
  g->add_option("--polynomial-terms", o->polynomial_terms, "powers, sqrt, exp: fitted to the other values")
      ->capture_default_str();
  g->add_option("--term-dtype", o->term_dtype)->check(CLI::IsMember(dtypes))->capture_default_str();
  g->add_option("--residual-bins", o->residual_bins,
                "DTYPE:BITS:ELEMENTS, .. beside the fit (default: float16:8 for all of them)")
      ->delimiter(',');
  g->add_flag("--no-delta-encoding", o->no_delta_encoding, "values instead of differences");
  g->add_flag("--error-diffusion", o->error_diffusion, "as in DistillKit; the best of both ways is taken anyway");
  g->add_flag("--normalize-t", o->normalize_t, "fit over [0,1] instead of 0, 1, 2, ..");
  g->add_option("--codec", o->codec_file, "all of these from a JSON file with DistillKit's keys");
  c->callback([o] {
    fill_in(*o);
    run(*o);
  });
}

}  // namespace kda::cli
