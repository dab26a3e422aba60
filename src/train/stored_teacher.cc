#include "train/stored_teacher.h"

#include <algorithm>

#include "base/file.h"
#include "base/sha256.h"
#include "train/stored_format.h"

namespace kda {

namespace {
namespace fs = std::filesystem;
using namespace stored;

class CaptureFolder : public StoredLogprobs {
 public:
  explicit CaptureFolder(const fs::path& folder) {
    const fs::path header = folder / kHeaderName;
    KDA_CHECK(path_exists(header), folder.string(), ": is an unfinished capture: finish it with kda capture --resume");
    const std::string text = read_file(header, 1 << 20);
    Counts counts;
    header_ = read_header(text, header.string(), &counts);
    codec_ = std::make_unique<LogprobCodec>(header_.codec);
    file_ = MappedFile::open(folder / kRowsName);
    where_ = file_->path().string();
    const auto index = MappedFile::open(folder / kIndexName);
    read_index(*index, counts);
    fingerprint_ = Sha256().add(text).add(index->data(), index->size()).hex();
  }

  int64_t vocabulary() const override { return header_.codec.d; }
  int64_t k() const override { return header_.codec.k; }
  int64_t count() const override { return int64_t(offsets_.size()) - 1; }
  int64_t length(int64_t row) const override {
    check_number(row);
    const uint64_t bytes = offsets_[size_t(row) + 1] - offsets_[size_t(row)];
    return (int64_t(bytes) - kRowHead - kRowTail) / (4 + codec_->value_bytes() + codec_->index_bytes());
  }
  void read_ids(int64_t row, int64_t from, std::span<int32_t> out) const override {
    const Row r = find(row, from, int64_t(out.size()));
    copy_ids(r, row, from, out);
  }
  void read(int64_t row, int64_t from, std::span<int32_t> tokens, std::span<int32_t> ids,
            std::span<float> logprobs) const override {
    const int64_t n = int64_t(tokens.size()), k = codec_->config().k;
    KDA_CHECK(int64_t(ids.size()) == n * k && int64_t(logprobs.size()) == n * k, "stored log-probabilities: room for ",
              n * k, " needed, got ", ids.size(), " and ", logprobs.size());
    const Row r = find(row, from, n);
    copy_ids(r, row, from, tokens);
    const auto vb = size_t(codec_->value_bytes()), ib = size_t(codec_->index_bytes());
    for (int64_t t = 0; t < n; ++t) {
      const uint8_t *v = r.values + size_t(from + t) * vb, *i = r.indices + size_t(from + t) * ib;
      try {
        codec_->decode({v, vb}, {i, ib}, ids.subspan(size_t(t * k), size_t(k)),
                       logprobs.subspan(size_t(t * k), size_t(k)));
      } catch (const Error& e) {
        throw Error(cat(where_, ": offset ", v - bytes(), ": row ", row, ", token ", from + t, ": ", e.what()));
      }
    }
  }
  std::string fingerprint() const override { return fingerprint_; }
  std::string teacher() const override { return header_.teacher; }
  std::string tokenizer() const override { return header_.tokenizer; }

 private:
  struct Row {
    const uint8_t *ids, *values, *indices;
    uint64_t offset;
  };
  const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(file_->data()); }

  void read_index(const MappedFile& f, const Counts& counts) {
    const std::string at = f.path().string();
    const auto* p = reinterpret_cast<const uint8_t*>(f.data());
    const size_t fixed = kIndexMark.size() + 3 * 8;
    KDA_CHECK(f.size() >= fixed && std::memcmp(p, kIndexMark.data(), kIndexMark.size()) == 0, at,
              ": offset 0: does not begin with ", kIndexMark);
    const auto rows = load<uint64_t>(p + 8);
    KDA_CHECK(rows == uint64_t(counts.rows) && (f.size() - fixed) / 8 == rows && (f.size() - fixed) % 8 == 0, at,
              ": offset 8: ", rows, " rows in ", f.size(), " bytes, ", kHeaderName, " says ", counts.rows);
    KDA_CHECK(load<uint64_t>(p + f.size() - 8) == fnv1a(p, f.size() - 8), at, ": offset ", f.size() - 8,
              ": its checksum is wrong: the file is damaged");
    KDA_CHECK(file_->size() >= kRowsMark.size() && std::memcmp(bytes(), kRowsMark.data(), kRowsMark.size()) == 0,
              where_, ": offset 0: does not begin with ", kRowsMark);
    offsets_.resize(size_t(rows) + 1);
    std::memcpy(offsets_.data(), p + 16, offsets_.size() * 8);
    const uint64_t each = uint64_t(4 + codec_->value_bytes() + codec_->index_bytes()), around = kRowHead + kRowTail;
    KDA_CHECK(offsets_[0] == kRowsMark.size(), at, ": offset 16: row 0 must begin at ", kRowsMark.size(), ", got ",
              offsets_[0]);
    uint64_t tokens = 0;
    for (size_t r = 0; r < rows; ++r) {
      const uint64_t from = offsets_[r], to = offsets_[r + 1];
      KDA_CHECK(to > from && to - from > around && (to - from - around) % each == 0 && to <= file_->size(), at,
                ": offset ", 16 + 8 * (r + 1), ": row ", r, " from ", from, " to ", to, " is no row of ", where_,
                " with ", file_->size(), " bytes");
      tokens += (to - from - around) / each;
    }
    KDA_CHECK(offsets_.back() == file_->size(), where_, ": offset ", std::min<uint64_t>(offsets_.back(), file_->size()),
              ": has ", file_->size(), " bytes, ", kIndexName, " says ", offsets_.back());
    KDA_CHECK(tokens == uint64_t(counts.tokens), at, ": holds ", tokens, " tokens, ", kHeaderName, " says ",
              counts.tokens);
  }

  void check_number(int64_t row) const {
    KDA_CHECK(row >= 0 && row < count(), where_, ": no row ", row, ", it has ", count());
  }

  Row find(int64_t row, int64_t from, int64_t n) const {
    const int64_t tokens = length(row);
    KDA_CHECK(from >= 0 && n >= 0 && from <= tokens - n, where_, ": row ", row, ": tokens ", from, " to ", from + n,
              " asked for, it has ", tokens);
    const uint64_t at = offsets_[size_t(row)];
    const uint8_t* p = bytes() + at;
    const int64_t there = check_row(*codec_, where_, p, at, offsets_[size_t(row) + 1] - at, row);
    KDA_CHECK(there == tokens, where_, ": offset ", at, ": row ", row, " holds ", there, " tokens, ", kIndexName,
              " says ", tokens);
    const uint8_t* ids = p + kRowHead;
    const uint8_t* values = ids + 4 * tokens;
    return {ids, values, values + tokens * codec_->value_bytes(), at};
  }

  void copy_ids(const Row& r, int64_t row, int64_t from, std::span<int32_t> out) const {
    if (!out.empty()) std::memcpy(out.data(), r.ids + 4 * from, out.size_bytes());
    for (size_t i = 0; i < out.size(); ++i)
      KDA_CHECK(out[i] >= 0 && out[i] < header_.codec.d, where_, ": offset ", r.offset, ": row ", row, ": id ", out[i],
                " outside the vocabulary of ", header_.codec.d);
  }

  CaptureHeader header_;
  std::unique_ptr<LogprobCodec> codec_;
  std::shared_ptr<const MappedFile> file_;
  std::string where_, fingerprint_;
  std::vector<uint64_t> offsets_;
};

bool is_parquet(const fs::path& path) {
  if (path.extension() == ".parquet") return true;
  if (!is_folder(path)) return false;
  std::error_code error;
  for (const auto& e : fs::directory_iterator(path, error))
    if (e.path().extension() == ".parquet") return true;
  return false;
}

class StoredRows : public Rows {
 public:
  explicit StoredRows(std::shared_ptr<const StoredLogprobs> s) : stored_(std::move(s)) {}
  int64_t count() const override { return stored_->count(); }
  int64_t length(int64_t row) const override { return stored_->length(row); }
  void read(int64_t row, int64_t from, std::span<int32_t> out) const override { stored_->read_ids(row, from, out); }
  std::string fingerprint() const override { return stored_->fingerprint(); }

 private:
  std::shared_ptr<const StoredLogprobs> stored_;
};

class StoredTeacher : public Teacher {
 public:
  StoredTeacher(Context& ctx, std::shared_ptr<const StoredLogprobs> s, int64_t rows)
      : stored_(std::move(s)),
        rows_(rows),
        ids_(ctx.backend->alloc(Dtype::i32, {rows, stored_->k()})),
        logprobs_(ctx.backend->alloc(Dtype::f32, {rows, stored_->k()})),
        host_ids_(size_t(rows * stored_->k())),
        host_logprobs_(size_t(rows * stored_->k())),
        tokens_(size_t(rows)) {}

  const TeacherOutput& run(Context& ctx, const TrainBatch& b) override {
    const int64_t T = b.T(), k = stored_->k(), N = int64_t(b.start.size()) - 1;
    KDA_CHECK(T <= rows_ && int64_t(b.rows.size()) == N && int64_t(b.offsets.size()) == N,
              "stored teacher: a batch of ", T, " tokens in ", N, " sequences with ", b.rows.size(),
              " rows, planned for ", rows_, " tokens");
    ctx.pool->run(N, [&](int64_t n, int) {
      const size_t from = size_t(b.start[size_t(n)]), count = size_t(b.start[size_t(n) + 1]) - from, K = size_t(k);
      if (!count) return;
      const int64_t row = b.rows[size_t(n)], offset = b.offsets[size_t(n)];
      const std::span tokens(tokens_.data() + from, count);
      stored_->read(row, offset, tokens, {host_ids_.data() + from * K, count * K},
                    {host_logprobs_.data() + from * K, count * K});
      for (size_t t = 0; t < count; ++t)
        KDA_CHECK(tokens[t] == b.ids[from + t], "stored teacher: row ", row, ", token ", offset + int64_t(t),
                  ": the teacher saw id ", tokens[t], ", the batch has ", b.ids[from + t],
                  ": this data is not what was captured");
    });
    ctx.backend->copy(ctx, ids_.v.data, host_ids_.data(), size_t(T * k) * sizeof(int32_t));
    ctx.backend->copy(ctx, logprobs_.v.data, host_logprobs_.data(), size_t(T * k) * sizeof(float));
    out_.ids = {ids_.v.data, Dtype::i32, {T, k}};
    out_.logprobs = {logprobs_.v.data, Dtype::f32, {T, k}};
    return out_;
  }
  int64_t bytes() const override {
    return int64_t(ids_.v.bytes() + logprobs_.v.bytes()) +
           int64_t((host_ids_.size() + host_logprobs_.size() + tokens_.size()) * sizeof(int32_t));
  }

 private:
  std::shared_ptr<const StoredLogprobs> stored_;
  int64_t rows_;
  Tensor ids_, logprobs_;
  std::vector<int32_t> host_ids_;
  std::vector<float> host_logprobs_;
  std::vector<int32_t> tokens_;
  TeacherOutput out_;
};

}  // namespace

bool is_stored_logprobs(const fs::path& path) {
  return path_exists(path / kHeaderName) || path_exists(path / kUnfinishedName) || is_parquet(path);
}

std::shared_ptr<const StoredLogprobs> open_stored_logprobs(const fs::path& path,
                                                           const std::optional<LogprobCodecConfig>& codec) {
  if (path_exists(path / kHeaderName) || path_exists(path / kUnfinishedName))
    return std::make_shared<CaptureFolder>(path);
  KDA_CHECK(is_parquet(path), path.string(), ": holds no stored log-probabilities: needed a folder of kda capture, or ",
            "Parquet in DistillKit's columns");
  return open_parquet(path, codec);
}

std::unique_ptr<Rows> stored_rows(std::shared_ptr<const StoredLogprobs> s) {
  return std::make_unique<StoredRows>(std::move(s));
}

std::unique_ptr<Teacher> stored_teacher(Context& ctx, std::shared_ptr<const StoredLogprobs> s, int64_t rows) {
  return std::make_unique<StoredTeacher>(ctx, std::move(s), rows);
}

}  // namespace kda
