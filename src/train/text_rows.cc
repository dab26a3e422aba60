#include "train/text_rows.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "base/file.h"
#include "base/sha256.h"
#include "checkpoint/json.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

constexpr size_t kChunkBytes = size_t(8) << 20;    // hashed as one
constexpr size_t kTaskBytes = size_t(256) << 10;   // of lines, tokenized as one
constexpr size_t kWaveTasks = 64;                  // in memory at once
constexpr size_t kShardTokens = size_t(32) << 20;  // of a cache file
constexpr const char* kMark = "kda-tokens-1";      // version of the cache's contents

enum class Kind { jsonl, text, shard };

struct Source {
  fs::path path;
  Kind kind;
};

std::string extension(const fs::path& p) {
  std::string e = p.extension().string();
  std::transform(e.begin(), e.end(), e.begin(), [](unsigned char c) { return char(std::tolower(c)); });
  return e;
}

[[noreturn]] void refuse_hub_format(const fs::path& path, const std::string& what) {
  throw Error(cat(path.string(), ": ", what, " is not read here; export it once:  python3 tools/export_dataset.py '",
                  path.string(), "' -o train.jsonl"));
}

Kind kind_of(const fs::path& p) {
  const std::string e = extension(p);
  if (e == ".jsonl" || e == ".json" || e == ".ndjson") return Kind::jsonl;
  if (e == ".txt" || e == ".md" || e == ".text") return Kind::text;
  if (e == ".safetensors") return Kind::shard;
  if (e == ".arrow" || e == ".parquet") refuse_hub_format(p, "a data set in " + e.substr(1) + " files");
  KDA_CHECK(e != ".xz" && e != ".gz" && e != ".zst", p.string(),
            ": is packed; unpack it first (xz -dk, gunzip -k, zstd -d)");
  throw Error(cat(p.string(), ": no data set: needed .jsonl, .json, .ndjson, .txt, .md, .text or .safetensors"));
}

std::vector<Source> sources_of(const fs::path& path) {
  KDA_CHECK(path_exists(path), path.string(), ": no such file or folder");
  if (!is_folder(path)) return {{path, kind_of(path)}};
  for (const char* name : {"dataset_info.json", "dataset_dict.json", "state.json"})
    if (path_exists(path / name)) refuse_hub_format(path, "a Hugging Face data set on disk");
  std::vector<fs::path> files;
  for (const auto& e : fs::recursive_directory_iterator(path))
    if (e.is_regular_file() && e.path().filename().string()[0] != '.') files.push_back(e.path());
  std::sort(files.begin(), files.end());
  std::vector<Source> out;
  for (const auto& f : files) {
    if (f.filename() == "dataset_info.json") refuse_hub_format(path, "a Hugging Face data set on disk");
    out.push_back({f, kind_of(f)});
  }
  KDA_CHECK(!out.empty(), path.string(), ": a folder without any file of data");
  return out;
}

// SHA-256 over the SHA-256 of each chunk, chunks in parallel.
std::string hash_file(const MappedFile& f, ThreadPool& pool, const std::function<void(int64_t)>& done) {
  const size_t chunks = (f.size() + kChunkBytes - 1) / kChunkBytes;
  std::vector<std::string> part(chunks);
  for (size_t wave = 0; wave < chunks; wave += kWaveTasks) {
    const size_t n = std::min(kWaveTasks, chunks - wave);
    pool.run(int64_t(n), [&](int64_t task, int) {
      const size_t at = (wave + size_t(task)) * kChunkBytes;
      part[wave + size_t(task)] = Sha256().add(f.data() + at, std::min(kChunkBytes, f.size() - at)).hex();
    });
    done(int64_t(std::min(f.size(), (wave + n) * kChunkBytes) - wave * kChunkBytes));
  }
  Sha256 all;
  const uint64_t size = f.size();
  all.add(&size, sizeof size);
  for (const auto& p : part) all.add(p);
  return all.hex();
}

void append_text(std::string_view text, const TextEncoder& e, const std::string& where, std::vector<int32_t>& out) {
  std::vector<int32_t> ids;
  try {
    ids = e.tokenizer.encode(text);
  } catch (const Error& error) {
    throw Error(cat(where, ": ", error.what()));
  }
  if (e.eos >= 0 && (ids.empty() || ids.back() != e.eos)) ids.push_back(e.eos);
  out.insert(out.end(), ids.begin(), ids.end());
}

void append_line(std::string_view line, const TextEncoder& e, const std::string& key, const std::string& where,
                 std::vector<int32_t>& out) {
  const nlohmann::json row = parse_json_object(line, where, 64);
  const auto ids = row.find("input_ids");
  if (ids != row.end() && !row.contains(key)) {
    KDA_CHECK(ids->is_array(), where, ": input_ids must be a list of token ids");
    for (const auto& id : *ids) {
      KDA_CHECK(id.is_number_integer() && id >= 0 && id < e.vocabulary, where, ": input_ids holds ", id.dump(),
                ", needed a whole number from 0 to ", e.vocabulary - 1);
      out.push_back(id.get<int32_t>());
    }
    return;
  }
  const auto text = row.find(key);
  KDA_CHECK(text != row.end(), where, ": no key '", key, "' (dataset text_key) and no 'input_ids'");
  KDA_CHECK(text->is_string(), where, ": '", key, "' is not a string");
  append_text(text->get_ref<const std::string&>(), e, where, out);
}

// Lines [begin,end) of a file, the first being number `line`; or a whole text file.
struct Task {
  std::string_view bytes;
  int64_t line = 1;
  std::vector<int32_t> tokens;
  std::vector<int64_t> lengths;
};

void run_task(Task& t, const Source& source, const TextEncoder& e, const std::string& key) {
  const std::string name = source.path.string();
  if (source.kind == Kind::text) {
    append_text(t.bytes, e, name, t.tokens);
    t.lengths.push_back(int64_t(t.tokens.size()));
    return;
  }
  int64_t line = t.line;
  for (size_t at = 0; at < t.bytes.size(); ++line) {
    const size_t end = std::min(t.bytes.find('\n', at), t.bytes.size());
    const std::string_view text = t.bytes.substr(at, end - at);
    at = end + 1;
    if (text.find_first_not_of(" \t\r") == text.npos) continue;
    const size_t before = t.tokens.size();
    append_line(text, e, key, cat(name, ":", line), t.tokens);
    t.lengths.push_back(int64_t(t.tokens.size() - before));
  }
}

// Collects rows into shards of a folder that appears whole or not at all.
class CacheWriter {
 public:
  explicit CacheWriter(fs::path folder) : folder_(std::move(folder)) {
    static std::atomic<unsigned> serial{0};
    temporary_ = folder_;
    temporary_ += cat(".tmp-", ::getpid(), "-", serial++);
    fs::create_directories(temporary_);
  }
  ~CacheWriter() {
    std::error_code ignored;
    if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
  }
  CacheWriter(const CacheWriter&) = delete;
  CacheWriter& operator=(const CacheWriter&) = delete;

  void add(const Task& t) {
    tokens_.insert(tokens_.end(), t.tokens.begin(), t.tokens.end());
    for (int64_t n : t.lengths) offsets_.push_back(offsets_.back() + n);
    if (tokens_.size() >= kShardTokens) flush();
  }
  void commit() {
    flush();
    std::error_code error;
    fs::rename(temporary_, folder_, error);
    // Another run that made the same cache meanwhile is as good.
    KDA_CHECK(!error || path_exists(folder_), folder_.string(), ": cannot rename ", temporary_.string(), ": ",
              error.message());
    if (!error) temporary_.clear();
  }

 private:
  void flush() {
    if (offsets_.size() == 1 && shards_ > 0) return;
    char name[32];
    std::snprintf(name, sizeof name, "%05d.safetensors", shards_++);
    write_shard(temporary_ / name, tokens_, offsets_);
    tokens_.clear();
    offsets_.assign(1, 0);
  }
  fs::path folder_, temporary_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> offsets_{0};
  int shards_ = 0;
};

std::unique_ptr<Rows> open_folder_of_shards(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(folder))
    if (e.path().extension() == ".safetensors") files.push_back(e.path());
  std::sort(files.begin(), files.end());
  return open_shards(files);
}
}  // namespace

TextEncoder TextEncoder::load(const fs::path& model_folder, int32_t eos, int32_t vocabulary) {
  const fs::path file = model_folder / "tokenizer.json";
  KDA_CHECK(path_exists(file), file.string(), ": not there; text needs the tokenizer that belongs to the model; put it there (token shards need none)");
  const std::string json = read_file(file);
  TextEncoder e{Tokenizer::from_json(json), {}, eos, vocabulary};
  e.fingerprint = Sha256().add(json).add(cat("\neos ", eos)).hex();
  return e;
}

std::unique_ptr<Rows> open_text(const fs::path& path, const std::function<const TextEncoder&()>& get_encoder,
                                const TextOptions& options, ThreadPool& pool) {
  const std::vector<Source> sources = sources_of(path);
  const auto shards =
      std::count_if(sources.begin(), sources.end(), [](const Source& s) { return s.kind == Kind::shard; });
  if (shards) {
    KDA_CHECK(size_t(shards) == sources.size(), path.string(),
              ": token shards beside text; keep them in folders apart");
    std::vector<fs::path> files;
    for (const Source& s : sources) files.push_back(s.path);
    return open_shards(files);
  }

  const TextEncoder& encoder = get_encoder();
  std::vector<std::shared_ptr<const MappedFile>> files;
  int64_t total = 0, done = 0;
  for (const Source& s : sources) {
    files.push_back(MappedFile::open(s.path));
    total += int64_t(files.back()->size());
  }
  const auto report = [&](const char* what, int64_t bytes) {
    done += bytes;
    if (options.progress) options.progress(what, done, total);
  };
  Sha256 key;
  key.add(kMark).add(encoder.fingerprint).add(options.text_key);
  for (size_t i = 0; i < sources.size(); ++i) {
    key.add(sources[i].kind == Kind::jsonl ? "\njsonl " : "\ntext ");
    key.add(hash_file(*files[i], pool, [&](int64_t bytes) { report("hashing", bytes); }));
  }
  const fs::path folder = options.cache / ("tokens-" + key.hex().substr(0, 32));
  if (is_folder(folder)) return open_folder_of_shards(folder);

  fs::create_directories(options.cache);
  CacheWriter cache(folder);
  done = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const std::string_view bytes(reinterpret_cast<const char*>(files[i]->data()), files[i]->size());
    int64_t line = 1;
    for (size_t at = 0; at < bytes.size();) {
      std::vector<Task> wave;
      size_t wave_bytes = 0;
      while (at < bytes.size() && wave.size() < kWaveTasks) {
        size_t end = bytes.size();
        if (sources[i].kind == Kind::jsonl && bytes.size() - at > kTaskBytes)
          end = std::min(bytes.size(), bytes.find('\n', at + kTaskBytes - 1));
        if (end < bytes.size()) ++end;
        wave.push_back({.bytes = bytes.substr(at, end - at), .line = line, .tokens = {}, .lengths = {}});
        line += std::count(bytes.begin() + ptrdiff_t(at), bytes.begin() + ptrdiff_t(end), '\n');
        wave_bytes += end - at;
        at = end;
      }
      pool.run(int64_t(wave.size()),
               [&](int64_t t, int) { run_task(wave[size_t(t)], sources[i], encoder, options.text_key); });
      for (const Task& t : wave) cache.add(t);
      report("tokenizing", int64_t(wave_bytes));
    }
  }
  cache.commit();
  return open_folder_of_shards(folder);
}

}  // namespace kda
