// cli/convert.cc — `kda convert TEACHER -o DIR`: a full-attention model becomes the start of a KDA student.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>

#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "checkpoint/layer_pattern.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "model/weights.h"
#include "train/convert.h"
#include "train/rows.h"

namespace kda::cli {

namespace {
namespace fs = std::filesystem;

struct Options {
  std::string teacher, out, kda = "all", positions, gate = "softplus", init = "calibrated", data, dtype,
                            precision = "fast";
  double lower_bound = -5, shard_gb = 5;
  int64_t sample_tokens = 8192, sample_length = 1024;
  uint64_t seed = 0;
  int threads = 0;
};

// Documents of a file (.jsonl: each line's `text`; else one), or of all files of a folder, as they lie.
std::vector<std::string> documents(const fs::path& data) {
  constexpr size_t kMost = size_t(256) << 20;
  std::vector<fs::path> files{data};
  if (is_folder(data)) {
    files.clear();
    for (const auto& e : fs::recursive_directory_iterator(data)) {
      const std::string kind = e.path().extension().string();
      if (e.is_regular_file() && (kind == ".jsonl" || kind == ".txt" || kind == ".md")) files.push_back(e.path());
    }
    std::sort(files.begin(), files.end());
    KDA_CHECK(!files.empty(), data.string(), ": holds no .jsonl, .txt or .md file to measure the teacher on");
  }
  std::vector<std::string> out;
  size_t bytes = 0;
  for (const fs::path& file : files) {
    std::string all = read_file(file);
    if (file.extension() != ".jsonl") {
      bytes += all.size();
      out.push_back(std::move(all));
      if (bytes >= kMost) break;
      continue;
    }
    int64_t number = 0;
    for (size_t at = 0; at < all.size() && bytes < kMost;) {
      const size_t end = std::min(all.find('\n', at), all.size());
      const std::string_view line(all.data() + at, end - at);
      at = end + 1;
      ++number;
      if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      const nlohmann::json j = parse_json(line, cat(file.string(), " line ", number));
      KDA_CHECK(j.is_object() && j.contains("text") && j["text"].is_string(), file.string(), " line ", number,
                ": needed an object with a string `text`");
      out.push_back(j["text"].get<std::string>());
      bytes += out.back().size();
    }
  }
  return out;
}

// Pieces of documents drawn by seed until there are enough tokens.
std::vector<std::vector<int32_t>> sample(const Options& o, const fs::path& teacher, int64_t vocabulary) {
  const fs::path file = teacher / "tokenizer.json";
  KDA_CHECK(path_exists(file), file.string(), ": missing; it is needed to read the sample text. Or take --init fla");
  const Tokenizer tokenizer = Tokenizer::load(file);
  const std::vector<std::string> texts = documents(o.data);
  std::vector<std::vector<int32_t>> out;
  int64_t tokens = 0;
  const Permutation order(int64_t(texts.size()), o.seed, 0);
  for (int64_t i = 0; i < int64_t(texts.size()) && tokens < o.sample_tokens; ++i) {
    // Of a long document its beginning is enough.
    const std::string& whole = texts[size_t(order(i))];
    size_t bytes = std::min(whole.size(), size_t(o.sample_tokens) * 16);
    while (bytes > 0 && bytes < whole.size() && (uint8_t(whole[bytes]) & 0xc0) == 0x80) --bytes;
    const std::vector<int32_t> ids = tokenizer.encode(std::string_view(whole).substr(0, bytes), true);
    for (const int32_t id : ids)
      KDA_CHECK(id < vocabulary, file.string(), ": gives id ", id, ", outside the model's vocabulary of ", vocabulary);
    for (size_t at = 0; at < ids.size() && tokens < o.sample_tokens; at += size_t(o.sample_length)) {
      const size_t n = std::min({size_t(o.sample_length), ids.size() - at, size_t(o.sample_tokens - tokens)});
      out.emplace_back(ids.begin() + int64_t(at), ids.begin() + int64_t(at + n));
      tokens += int64_t(n);
    }
  }
  return out;
}

Dtype stored_dtype(const Options& o, const Checkpoint& teacher) {
  if (!o.dtype.empty()) return o.dtype == "f32" ? Dtype::f32 : Dtype::bf16;
  return teacher.at("model.embed_tokens.weight").dtype();
}

void run(const Options& o) {
  const fs::path folder = model_folder(o.teacher);
  check_new_folder(o.out);
  const Checkpoint teacher = load_checkpoint(folder);
  for (const std::string& w : teacher.warnings) std::cerr << "warning: " << w << '\n';
  ConvertOptions options{.kda = o.kda,
                         .keep_positions = o.positions.empty() ? std::nullopt : std::optional(o.positions == "keep"),
                         .bounded_gate = o.gate == "bounded",
                         .lower_bound = o.lower_bound,
                         .init = o.init == "fla" ? StudentInit::fla : StudentInit::calibrated,
                         .seed = o.seed};
  const ModelConfig student = student_config(teacher.config, options);
  std::map<int64_t, LayerCalibration> calibration;
  int64_t tokens = 0;
  if (options.init == StudentInit::calibrated) {
    KDA_CHECK(!o.data.empty(),
              "--init calibrated measures the teacher on sample text: give --data FILE (.jsonl with a ",
              "`text` in each line, or plain text), or take --init fla");
    const auto text = sample(o, folder, teacher.config.vocabulary);
    for (const auto& ids : text) tokens += int64_t(ids.size());
    ThreadPool pool(o.threads);
    Context ctx;
    ctx.backend = &cpu_backend();
    ctx.pool = &pool;
    ctx.precision = o.precision == "fast" ? Precision::fast : Precision::exact;
    Progress progress(std::cerr, progress_style(stderr), "measuring the teacher", 2 * tokens, "tok");
    calibration = calibrate(ctx, arrange_weights(teacher), kda_layers(o.kda, int64_t(student.layers.size())), text,
                            {.bounded_gate = options.bounded_gate,
                             .lower_bound = options.lower_bound,
                             .progress = [&](int64_t n) { progress.advance(n); }});
    progress.set(2 * tokens);
    progress.finish();
  } else {
    KDA_CHECK(o.data.empty(), "--data is for --init calibrated; --init fla measures nothing");
  }
  const Dtype stored = stored_dtype(o, teacher);
  int64_t bytes = 0;
  for (const TensorSpec& t : tensor_table(student))
    bytes += t.shape.size() * int64_t(size_of(t.fp32 ? Dtype::f32 : stored));
  Progress progress(std::cerr, progress_style(stderr), o.out, bytes, "B");
  write_model_folder(o.out, student, student_weights(teacher, student, options, calibration),
                     {.stored = stored,
                      .max_shard_bytes = size_t(o.shard_gb * 1e9),
                      .progress = [&](size_t n) { progress.advance(int64_t(n)); }},
                     folder, student_card(teacher, student, options, tokens));
  progress.finish();
  const auto kda = std::count_if(student.layers.begin(), student.layers.end(),
                                 [](const LayerSpec& s) { return s.mixer == Mixer::kda; });
  std::cerr << o.out << ": " << kda << " of " << student.layers.size() << " layers are KDA, " << student.parameters()
            << " parameters\n";
}
}  // namespace

void add_convert(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("convert", "Make the start of a KDA student from a full-attention model");
  c->add_option("teacher", o->teacher, "Model folder, or owner/name in the local Hugging Face cache")->required();
  c->add_option("-o,--out", o->out, "Folder to write; must not exist or be empty")->required();
  c->add_option("--kda", o->kda,
                "Layers that become KDA: all, hybrid:KDA:FULL (hybrid:3:1 keeps full attention in the last of every "
                "four), or a list such as 0,1,5-9")
      ->capture_default_str();
  c->add_option("--full-positions", o->positions,
                "Layers that stay full attention: nope removes their positions, keep keeps them (without this: nope "
                "with hybrid:.., else keep)")
      ->check(CLI::IsMember({"nope", "keep"}));
  c->add_option("--gate", o->gate, "Decay: softplus (unbounded) or bounded")
      ->check(CLI::IsMember({"softplus", "bounded"}))
      ->capture_default_str();
  c->add_option("--lower-bound", o->lower_bound, "With --gate bounded: the least log decay of a token")
      ->check(CLI::Range(-5.0, -0.001))
      ->capture_default_str();
  c->add_option("--init", o->init,
                "New parts: calibrated on the teacher's attention over --data, or as fla (the reference library) "
                "starts them")
      ->check(CLI::IsMember({"calibrated", "fla"}))
      ->capture_default_str();
  c->add_option(
      "--data", o->data,
      "Sample text for --init calibrated: .jsonl with a `text` in each line, plain text, or a folder of such");
  c->add_option("--sample-tokens", o->sample_tokens, "How much of it is measured")
      ->check(CLI::Range(64, 1 << 24))
      ->capture_default_str();
  c->add_option("--sample-length", o->sample_length, "Documents are cut into pieces of this many tokens")
      ->check(CLI::Range(64, 1 << 20))
      ->capture_default_str();
  c->add_option("--seed", o->seed, "Of the new parts and of the choice of documents")->capture_default_str();
  c->add_option("--dtype", o->dtype, "bf16 or f32; without this as the teacher's")
      ->check(CLI::IsMember({"bf16", "f32"}));
  c->add_option("--shard-gb", o->shard_gb, "Largest file, in GB")->check(CLI::Range(0.001, 1e6))->capture_default_str();
  c->add_option("--precision", o->precision,
                "Of the measurement: fast, bf16 products where the CPU has them; exact, fp32")
      ->check(CLI::IsMember({"fast", "exact"}))
      ->capture_default_str();
  c->add_option("-t,--threads", o->threads, "0: one for each core")->check(CLI::Range(0, 1024))->capture_default_str();
  c->callback([o] { run(*o); });
}

}  // namespace kda::cli
