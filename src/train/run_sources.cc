#include "train/run_sources.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/error.h"
#include "base/file.h"
#include "base/sha256.h"
#include "train/stored_teacher.h"
#include "train/text_rows.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

// The same ids must mean the same text, or every loss compares different things.
void check_tokenizers(const fs::path& student, const fs::path& teacher) {
  const fs::path a = student / "tokenizer.json", b = teacher / "tokenizer.json";
  if (!path_exists(a) || !path_exists(b) || read_file(a) == read_file(b)) return;
  const Tokenizer s = Tokenizer::load(a), t = Tokenizer::load(b);
  for (int32_t id = 0; id < std::max(s.vocabulary(), t.vocabulary()); ++id)
    KDA_CHECK(s.has_token(id) == t.has_token(id) && s.id_to_token(id) == t.id_to_token(id), a.string(), " and ",
              b.string(), ": token ", id, " is '", s.id_to_token(id), "' and '", t.id_to_token(id),
              "'; student and teacher need the same tokenizer");
}

class DataOpener {
 public:
  DataOpener(const DistillInput& in, const DistillHooks& hooks, const ModelConfig& config, ThreadPool& pool)
      : in_(in), pool_(pool), config_(config) {
    options_.cache = in.cache;
    options_.progress = [&](const char* what, int64_t done, int64_t total) {
      KDA_CHECK(!hooks.stop || !hooks.stop(), "stopped while reading the data; nothing was begun");
      if (hooks.reading) hooks.reading(what, done, total);
    };
  }

  std::shared_ptr<const Rows> open(const DatasetSpec& d) {
    if (is_stored_logprobs(d.path)) return stored_rows(open_stored_logprobs(d.path));  // its ids alone
    TextOptions options = options_;
    options.text_key = d.text_key;
    return open_text(
        d.path, [this]() -> const TextEncoder& { return encoder(); }, options, pool_);
  }

 private:
  const TextEncoder& encoder() {
    if (!encoder_)
      encoder_ = std::make_unique<TextEncoder>(
          TextEncoder::load(in_.student, config_.eos.empty() ? -1 : config_.eos.front(), int32_t(config_.vocabulary)));
    return *encoder_;
  }

  const DistillInput& in_;
  ThreadPool& pool_;
  const ModelConfig& config_;
  TextOptions options_;
  std::unique_ptr<TextEncoder> encoder_;
};

std::shared_ptr<const StoredLogprobs> open_stored(const DistillInput& in, const ModelConfig& student) {
  const std::string& path = in.run.datasets.at(0).path;
  KDA_CHECK(is_stored_logprobs(path), path,
            ": teacher.kind is dataset, but this is neither a folder of kda capture nor "
            "Parquet with a teacher's log-probabilities");
  std::optional<LogprobCodecConfig> codec;
  if (!in.run.teacher.codec.empty()) codec = parse_codec_config(in.run.teacher.codec, "teacher.logprob_compressor");
  auto stored = open_stored_logprobs(path, codec);
  KDA_CHECK(stored->vocabulary() == student.vocabulary, path, ": the stored teacher has ", stored->vocabulary(),
            " tokens, the student ", student.vocabulary);
  const fs::path tokenizer = in.student / "tokenizer.json";
  KDA_CHECK(stored->tokenizer().empty() || !path_exists(tokenizer) ||
                Sha256().add(read_file(tokenizer)).hex() == stored->tokenizer(),
            path, ": was captured with another tokenizer than ", tokenizer.string());
  return stored;
}
}  // namespace

int64_t share_tensors(Checkpoint& student, const Checkpoint& teacher, ThreadPool& pool) {
  constexpr size_t kPiece = size_t(4) << 20;
  int64_t shared = 0;
  for (auto& entry : student.tensors) {
    Tensor& mine = entry.second;
    const auto it = teacher.tensors.find(entry.first);
    if (it == teacher.tensors.end()) continue;
    const Tensor& theirs = it->second;
    if (theirs.dtype() != mine.dtype() || !(theirs.shape() == mine.shape())) continue;
    const size_t bytes = mine.v.bytes();
    std::atomic<bool> same{true};
    pool.run(int64_t((bytes + kPiece - 1) / kPiece), [&](int64_t task, int) {
      if (!same.load(std::memory_order_relaxed)) return;
      const size_t at = size_t(task) * kPiece, n = std::min(kPiece, bytes - at);
      const auto* a = static_cast<const std::byte*>(mine.v.data) + at;
      const auto* b = static_cast<const std::byte*>(theirs.v.data) + at;
      if (std::memcmp(a, b, n) != 0) same = false;
    });
    if (!same) continue;
    mine = theirs;
    shared += int64_t(bytes);
  }
  return shared;
}

RunSources open_sources(const DistillInput& in, const DistillHooks& hooks, ThreadPool& pool) {
  const RunFile& run = in.run;
  const auto note = [&](const std::string& line) {
    if (hooks.note) hooks.note(line);
  };
  RunSources s;
  s.student = load_checkpoint(in.student);
  for (const std::string& w : s.student.warnings) note(cat("warning: student: ", w));
  if (run.teacher.kind == TeacherKind::live) {
    s.teacher = std::make_unique<Checkpoint>(load_checkpoint(in.teacher));
    for (const std::string& w : s.teacher->warnings) note(cat("warning: teacher: ", w));
    KDA_CHECK(s.teacher->config.vocabulary == s.student.config.vocabulary, in.teacher.string(), ": the teacher has ",
              s.teacher->config.vocabulary, " tokens, the student ", s.student.config.vocabulary);
    check_tokenizers(in.student, in.teacher);
    if (const int64_t bytes = share_tensors(s.student, *s.teacher, pool))
      note(cat("student and teacher share ", bytes, " bytes of equal weights"));
    s.teacher_weights = std::make_unique<Weights>(arrange_weights(*s.teacher));
  }

  std::shared_ptr<const StoredLogprobs> stored;
  if (run.teacher.kind == TeacherKind::stored) stored = open_stored(in, s.student.config);
  DataOpener opener(in, hooks, s.student.config, pool);
  Sha256 fingerprint;
  for (const DatasetSpec& d : run.datasets) {
    s.data.push_back({stored ? stored_rows(stored) : opener.open(d), d.weight, d.drop_long});
    fingerprint.add(s.data.back().rows->fingerprint());
  }
  KDA_CHECK(run.dataset_rows == 0 || s.data.size() == 1, "dataset.num_samples goes with one data set, here are ",
            s.data.size());
  if (run.dataset_rows) s.data[0].rows = sample_rows(s.data[0].rows, run.dataset_rows, run.seed);
  if (run.eval.dataset) {
    KDA_CHECK(run.teacher.kind != TeacherKind::stored,
              "dataset.eval_dataset: a stored teacher knows its own rows only; hold some of them out with "
              "dataset.num_eval_samples");
    KDA_CHECK(!run.eval.dataset->drop_long,
              "dataset.eval_dataset: excess_length_strategy is for training data; eval.only_first keeps the start of "
              "each held-out row");
    s.held_out = opener.open(*run.eval.dataset);
  } else if (run.eval.rows) {
    KDA_CHECK(s.data.size() == 1, "dataset.num_eval_samples goes with one data set, here are ", s.data.size(),
              "; give dataset.eval_dataset");
    const SplitRows split = split_rows(s.data[0].rows, run.eval.rows, run.seed);
    s.data[0].rows = split.train;
    s.held_out = split.held_out;
  }
  if (stored) s.stored = [stored](Context& ctx, int64_t rows) { return stored_teacher(ctx, stored, rows); };
  for (const DataPart& p : s.data) fingerprint.add(p.rows->fingerprint());
  s.data_fingerprint = fingerprint.hex();
  return s;
}

}  // namespace kda
