// Parquet in DistillKit's column layout: input_ids list<int>, compressed_logprobs and bytepacked_indices
// list<list<uint8>>. Rows are drawn in any order in training and a row group may hold hundreds of megabytes, so the
// columns are kept in memory, packed, from the first reading on.
#include "base/file.h"
#include "train/stored_format.h"

#if defined(KDA_ARROW)
#include <arrow/api.h>
#include <parquet/arrow/reader.h>

#include <algorithm>

#include "base/sha256.h"
#endif

namespace kda::stored {

#if defined(KDA_ARROW)
namespace {
namespace fs = std::filesystem;

void check(const arrow::Status& s, const std::string& where) { KDA_CHECK(s.ok(), where, ": ", s.ToString()); }
template <class T>
T take(arrow::Result<T> r, const std::string& where) {
  check(r.status(), where);
  return std::move(r).ValueUnsafe();
}

// The reader of record batches; older versions of Arrow have it as an argument.
template <class Reader>
std::unique_ptr<arrow::RecordBatchReader> batches_of(Reader& reader, const std::string& where) {
  if constexpr (requires { reader.GetRecordBatchReader().status(); }) {
    return take(reader.GetRecordBatchReader(), where);
  } else {
    std::unique_ptr<arrow::RecordBatchReader> out;
    check(reader.GetRecordBatchReader(&out), where);
    return out;
  }
}

// A list column: its values, and which of them belong to an entry.
struct Lists {
  std::shared_ptr<arrow::Array> values;
  std::function<std::pair<int64_t, int64_t>(int64_t)> range;
};
Lists lists(const std::shared_ptr<arrow::Array>& a, const std::string& where) {
  const auto of = [&](const auto& list) {
    return Lists{list->values(), [list, &where](int64_t i) {
                   KDA_CHECK(!list->IsNull(i), where, ": entry ", i, " is null");
                   return std::pair<int64_t, int64_t>(list->value_offset(i), list->value_offset(i + 1));
                 }};
  };
  if (a->type_id() == arrow::Type::LIST) return of(std::static_pointer_cast<arrow::ListArray>(a));
  if (a->type_id() == arrow::Type::LARGE_LIST) return of(std::static_pointer_cast<arrow::LargeListArray>(a));
  throw Error(cat(where, ": needed lists, got ", a->type()->ToString()));
}

int64_t integer(const arrow::Array& a, int64_t i, const std::string& where) {
  KDA_CHECK(!a.IsNull(i), where, ": value ", i, " is null");
  switch (a.type_id()) {
    case arrow::Type::UINT64:
      return int64_t(std::min<uint64_t>(static_cast<const arrow::UInt64Array&>(a).Value(i), INT64_MAX));
    case arrow::Type::INT64: return static_cast<const arrow::Int64Array&>(a).Value(i);
    case arrow::Type::UINT32: return static_cast<const arrow::UInt32Array&>(a).Value(i);
    case arrow::Type::INT32: return static_cast<const arrow::Int32Array&>(a).Value(i);
    case arrow::Type::UINT16: return static_cast<const arrow::UInt16Array&>(a).Value(i);
    default: throw Error(cat(where, ": needed whole numbers, got ", a.type()->ToString()));
  }
}

class ParquetLogprobs : public StoredLogprobs {
 public:
  ParquetLogprobs(const fs::path& path, const LogprobCodecConfig& config) : where_(path.string()), codec_(config) {
    std::vector<fs::path> files;
    if (is_folder(path)) {
      for (const auto& e : fs::directory_iterator(path))
        if (e.path().extension() == ".parquet") files.push_back(e.path());
      std::sort(files.begin(), files.end());
    } else {
      files = {path};
    }
    for (const fs::path& f : files) read_file_of(f);
    KDA_CHECK(count() > 0, where_, ": holds no rows");
    Sha256 hash;
    hash.add(to_json(config));
    hash.add(tokens_.data(), tokens_.size() * sizeof(int32_t));
    hash.add(values_.data(), values_.size());
    hash.add(indices_.data(), indices_.size());
    fingerprint_ = hash.hex();
  }

  int64_t vocabulary() const override { return codec_.config().d; }
  int64_t k() const override { return codec_.config().k; }
  int64_t count() const override { return int64_t(begin_.size()) - 1; }
  int64_t length(int64_t row) const override {
    KDA_CHECK(row >= 0 && row < count(), where_, ": no row ", row, ", it has ", count());
    return begin_[size_t(row) + 1] - begin_[size_t(row)];
  }
  void read_ids(int64_t row, int64_t from, std::span<int32_t> out) const override {
    const int64_t at = find(row, from, int64_t(out.size()));
    std::copy_n(tokens_.begin() + at, out.size(), out.begin());
  }
  void read(int64_t row, int64_t from, std::span<int32_t> tokens, std::span<int32_t> ids,
            std::span<float> logprobs) const override {
    const auto K = size_t(k()), n = tokens.size(), vb = size_t(codec_.value_bytes()), ib = size_t(codec_.index_bytes());
    KDA_CHECK(ids.size() == n * K && logprobs.size() == n * K, where_, ": room for ", n * K, " needed, got ",
              ids.size());
    read_ids(row, from, tokens);
    const size_t at = size_t(begin_[size_t(row)] + from);
    for (size_t t = 0; t < n; ++t) try {
        codec_.decode({values_.data() + (at + t) * vb, vb}, {indices_.data() + (at + t) * ib, ib},
                      ids.subspan(t * K, K), logprobs.subspan(t * K, K));
      } catch (const Error& e) {
        throw Error(cat(where_, ": row ", row, ", token ", from + int64_t(t), ": ", e.what()));
      }
  }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  int64_t find(int64_t row, int64_t from, int64_t n) const {
    const int64_t tokens = length(row);
    KDA_CHECK(from >= 0 && n >= 0 && from <= tokens - n, where_, ": row ", row, ": tokens ", from, " to ", from + n,
              " asked for, it has ", tokens);
    return begin_[size_t(row)] + from;
  }

  void read_file_of(const fs::path& file) {
    const std::string where = file.string();
    parquet::arrow::FileReaderBuilder builder;
    check(builder.OpenFile(where, true), where);
    parquet::ArrowReaderProperties properties;
    properties.set_batch_size(64);
    builder.properties(properties);
    std::unique_ptr<parquet::arrow::FileReader> reader;
    check(builder.Build(&reader), where);
    const auto batches = batches_of(*reader, where);
    for (;;) {
      std::shared_ptr<arrow::RecordBatch> batch;
      check(batches->ReadNext(&batch), where);
      if (!batch) break;
      const auto column = [&](const char* name) {
        const auto c = batch->GetColumnByName(name);
        KDA_CHECK(c, where, ": no column ", name,
                  "; needed are input_ids, compressed_logprobs and bytepacked_indices, ",
                  "there are: ", batch->schema()->ToString());
        return c;
      };
      add(column("input_ids"), column("compressed_logprobs"), column("bytepacked_indices"), where);
    }
  }

  void add(const std::shared_ptr<arrow::Array>& ids, const std::shared_ptr<arrow::Array>& values,
           const std::shared_ptr<arrow::Array>& indices, const std::string& where) {
    const std::string of_ids = where + ": input_ids";
    const Lists rows = lists(ids, of_ids);
    for (int64_t r = 0; r < ids->length(); ++r) {
      const auto [from, to] = rows.range(r);
      for (int64_t i = from; i < to; ++i) {
        const int64_t id = integer(*rows.values, i, of_ids);
        KDA_CHECK(id >= 0 && id < vocabulary(), of_ids, ": row ", count(), ": id ", id, " outside the vocabulary of ",
                  vocabulary());
        tokens_.push_back(int32_t(id));
      }
      add_bytes(values, r, to - from, codec_.value_bytes(), where + ": compressed_logprobs", values_);
      add_bytes(indices, r, to - from, codec_.index_bytes(), where + ": bytepacked_indices", indices_);
      begin_.push_back(int64_t(tokens_.size()));
    }
  }

  // One row's list of byte lists, one for each token. A writer that asks a server for prompt log-probabilities has none
  // for what follows the last token; nothing is learned there, and the one before it takes the place.
  void add_bytes(const std::shared_ptr<arrow::Array>& column, int64_t row, int64_t tokens, int64_t each,
                 const std::string& where, std::vector<uint8_t>& out) const {
    const Lists outer = lists(column, where);
    const auto [from, to] = outer.range(row);
    const int64_t have = to - from;
    KDA_CHECK(have == tokens || (have == tokens - 1 && have > 0), where, ": row ", count(), ": ", have, " entries for ",
              tokens, " tokens");
    const Lists inner = lists(outer.values, where);
    KDA_CHECK(inner.values->type_id() == arrow::Type::UINT8, where, ": needed lists of uint8, got ",
              inner.values->type()->ToString());
    const uint8_t* bytes = static_cast<const arrow::UInt8Array&>(*inner.values).raw_values();
    for (int64_t t = 0; t < tokens; ++t) {
      const auto [a, b] = inner.range(from + std::min(t, have - 1));
      KDA_CHECK(b - a == each, where, ": row ", count(), ", token ", t, ": ", b - a, " bytes, the codec has ", each,
                ": is teacher.logprob_compressor the one it was written with?");
      out.insert(out.end(), bytes + a, bytes + b);
    }
  }

  std::string where_, fingerprint_;
  LogprobCodec codec_;
  std::vector<int64_t> begin_{0};  // [rows + 1] into the tokens
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> values_, indices_;
};

}  // namespace

std::shared_ptr<const StoredLogprobs> open_parquet(const fs::path& path,
                                                   const std::optional<LogprobCodecConfig>& codec) {
  if (codec) return std::make_shared<ParquetLogprobs>(path, *codec);
  const fs::path beside = (is_folder(path) ? path : path.parent_path()) / "logprob_compressor.json";
  KDA_CHECK(path_exists(beside), path.string(), ": Parquet does not say how its log-probabilities are stored: put the ",
            "run file's teacher.logprob_compressor, as JSON, into ", beside.string());
  return std::make_shared<ParquetLogprobs>(path, parse_codec_config(read_file(beside, 1 << 20), beside.string()));
}

#else

std::shared_ptr<const StoredLogprobs> open_parquet(const std::filesystem::path& path,
                                                   const std::optional<LogprobCodecConfig>&) {
  throw Error(cat(path.string(),
                  ": Parquet is read by builds that found Apache Arrow: install libarrow and libparquet ",
                  "with their headers and configure again, or capture the teacher here: kda capture"));
}

#endif

}  // namespace kda::stored
