#include "train/rows.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "base/sha256.h"
#include "checkpoint/safetensors.h"

namespace kda {

namespace {
namespace fs = std::filesystem;

// One file, mapped.
class Shard {
 public:
  explicit Shard(const fs::path& path) : file_(MappedFile::open(path)) {
    const std::string where = path.string();
    const SafetensorsHeader header = parse_safetensors({file_->data(), file_->size()}, where);
    const SafetensorsEntry &tokens = entry(header, "tokens", where), &offsets = entry(header, "offsets", where);
    KDA_CHECK(tokens.dtype_name == "I32" || tokens.dtype_name == "U16", where, ": tokens are ", tokens.dtype_name,
              ", needed I32 or U16");
    KDA_CHECK(offsets.dtype_name == "I64" || offsets.dtype_name == "I32", where, ": offsets are ", offsets.dtype_name,
              ", needed I64 or I32");
    width_ = tokens.dtype_name == "U16" ? 2 : 4;
    tokens_ = file_->data() + tokens.begin;
    const int64_t n = int64_t(tokens.end - tokens.begin) / width_;
    KDA_CHECK(tokens.shape[0] == n && offsets.shape[0] >= 1, where, ": needed tokens [n] and offsets [rows + 1]");
    const size_t size = offsets.dtype_name == "I64" ? 8 : 4;
    offsets_.resize(size_t(offsets.shape[0]));
    for (size_t i = 0; i < offsets_.size(); ++i) {
      int32_t narrow = 0;
      if (size == 8)
        std::memcpy(&offsets_[i], file_->data() + offsets.begin + 8 * i, 8);
      else
        std::memcpy(&narrow, file_->data() + offsets.begin + 4 * i, 4), offsets_[i] = narrow;
      KDA_CHECK(i ? offsets_[i] >= offsets_[i - 1] : offsets_[i] == 0, where,
                ": offsets must begin at 0 and not fall; number ", i, " is ", offsets_[i]);
    }
    KDA_CHECK(offsets_.back() == n, where, ": offsets end at ", offsets_.back(), ", there are ", n, " tokens");
  }

  int64_t count() const { return int64_t(offsets_.size()) - 1; }
  int64_t length(int64_t row) const { return offsets_[size_t(row) + 1] - offsets_[size_t(row)]; }
  void read(int64_t row, int64_t from, std::span<int32_t> out) const {
    const std::byte* p = tokens_ + (offsets_[size_t(row)] + from) * width_;
    if (width_ == 4) {
      std::memcpy(out.data(), p, out.size_bytes());
      return;
    }
    for (size_t i = 0; i < out.size(); ++i) {
      uint16_t id;
      std::memcpy(&id, p + 2 * i, 2);
      out[i] = id;
    }
  }
  // Names nothing: a shard that was moved is the same.
  void add_to(Sha256& hash) const {
    const int64_t size = int64_t(file_->size());
    hash.add(&size, sizeof size).add(file_->data(), std::min<size_t>(file_->size(), 1 << 20));
    const size_t tail = std::min<size_t>(file_->size(), 1 << 20);
    hash.add(file_->data() + file_->size() - tail, tail).add(offsets_.data(), offsets_.size() * sizeof(int64_t));
  }

 private:
  static const SafetensorsEntry& entry(const SafetensorsHeader& h, const char* name, const std::string& where) {
    const auto it = h.tensors.find(name);
    KDA_CHECK(it != h.tensors.end(), where, ": no tensor '", name,
              "'; a token shard holds `tokens` [n] and `offsets` [rows + 1]");
    KDA_CHECK(it->second.shape.size() == 1, where, ": tensor '", name, "' has ", it->second.shape.size(),
              " dimensions, needed one");
    return it->second;
  }

  std::shared_ptr<const MappedFile> file_;
  const std::byte* tokens_;
  int width_;
  std::vector<int64_t> offsets_;
};

class ShardRows : public Rows {
 public:
  explicit ShardRows(const std::vector<fs::path>& files) {
    KDA_CHECK(!files.empty(), "token shards: no file given");
    for (const fs::path& f : files) {
      shards_.emplace_back(f);
      first_.push_back(first_.back() + shards_.back().count());
    }
  }
  int64_t count() const override { return first_.back(); }
  int64_t length(int64_t row) const override {
    const size_t s = shard_of(row);
    return shards_[s].length(row - first_[s]);
  }
  void read(int64_t row, int64_t from, std::span<int32_t> out) const override {
    const size_t s = shard_of(row);
    const int64_t length = shards_[s].length(row - first_[s]);
    KDA_CHECK(from >= 0 && from + int64_t(out.size()) <= length, "row ", row, ": tokens ", from, " to ",
              from + int64_t(out.size()), " asked for, it has ", length);
    shards_[s].read(row - first_[s], from, out);
  }
  std::string fingerprint() const override {
    Sha256 hash;
    for (const Shard& s : shards_) s.add_to(hash);
    return hash.hex();
  }

 private:
  size_t shard_of(int64_t row) const {
    KDA_CHECK(row >= 0 && row < count(), "row ", row, " asked for, there are ", count());
    return size_t(std::upper_bound(first_.begin(), first_.end(), row) - first_.begin()) - 1;
  }
  std::vector<Shard> shards_;
  std::vector<int64_t> first_{0};
};

class SomeRows : public Rows {
 public:
  SomeRows(std::shared_ptr<const Rows> all, std::vector<int64_t> which)
      : all_(std::move(all)), which_(std::move(which)) {}
  int64_t count() const override { return int64_t(which_.size()); }
  int64_t length(int64_t row) const override { return all_->length(at(row)); }
  void read(int64_t row, int64_t from, std::span<int32_t> out) const override { all_->read(at(row), from, out); }
  int64_t source_row(int64_t row) const override { return all_->source_row(at(row)); }
  int64_t source_count() const override { return all_->source_count(); }
  std::string fingerprint() const override {
    return Sha256().add(all_->fingerprint()).add(which_.data(), which_.size() * sizeof(int64_t)).hex();
  }

 private:
  int64_t at(int64_t row) const {
    KDA_CHECK(row >= 0 && row < count(), "row ", row, " asked for, there are ", count());
    return which_[size_t(row)];
  }
  std::shared_ptr<const Rows> all_;
  std::vector<int64_t> which_;
};

// Streams of random numbers, told apart by the counter's last word.
enum : uint32_t { kFeistel = 1 };
}  // namespace

std::unique_ptr<Rows> open_shards(const std::vector<fs::path>& files) { return std::make_unique<ShardRows>(files); }

void write_shard(const fs::path& path, std::span<const int32_t> tokens, std::span<const int64_t> offsets) {
  save_safetensors(path, {{"tokens", view(tokens.data(), {int64_t(tokens.size())})},
                          {"offsets", view(offsets.data(), {int64_t(offsets.size())})}});
}

std::shared_ptr<const Rows> some_rows(std::shared_ptr<const Rows> all, std::vector<int64_t> which) {
  return std::make_shared<SomeRows>(std::move(all), std::move(which));
}

SplitRows split_rows(const std::shared_ptr<const Rows>& all, int64_t held_out, uint64_t seed) {
  const int64_t n = all->count();
  KDA_CHECK(held_out >= 0 && held_out < n, "held-out rows: ", held_out, " wanted, the data set has ", n,
            " and at least one must be left to train on");
  const Permutation order(n, seed, ~uint64_t(0));
  std::vector<int64_t> train, rest;
  for (int64_t i = 0; i < n; ++i) (i < held_out ? rest : train).push_back(order(i));
  std::sort(train.begin(), train.end());
  std::sort(rest.begin(), rest.end());
  return {some_rows(all, std::move(train)), some_rows(all, std::move(rest))};
}

std::shared_ptr<const Rows> sample_rows(const std::shared_ptr<const Rows>& all, int64_t most, uint64_t seed) {
  if (all->count() <= most) return all;
  const Permutation order(all->count(), seed, ~uint64_t(1));
  std::vector<int64_t> which;
  for (int64_t i = 0; i < most; ++i) which.push_back(order(i));
  std::sort(which.begin(), which.end());
  return some_rows(all, std::move(which));
}

Permutation::Permutation(int64_t n, uint64_t seed, uint64_t stream) : n_(n), seed_(seed), stream_(stream) {
  KDA_CHECK(n > 0, "Permutation: needed at least one element, got ", n);
  half_bits_ = 1;
  while (half_bits_ < 32 && (uint64_t(1) << (2 * half_bits_)) < uint64_t(n)) ++half_bits_;
}

int64_t Permutation::operator()(int64_t i) const {
  KDA_CHECK(i >= 0 && i < n_, "Permutation: ", i, " is outside of [0,", n_, ")");
  constexpr int kRounds = 8;
  const uint32_t mask = half_bits_ == 32 ? ~uint32_t(0) : (uint32_t(1) << half_bits_) - 1;
  uint64_t x = uint64_t(i);
  do {  // the network permutes [0, 4^half_bits); walking on until inside [0,n) permutes that
    uint32_t left = uint32_t(x >> half_bits_) & mask, right = uint32_t(x) & mask;
    for (uint32_t round = 0; round < kRounds; ++round) {
      const auto random =
          Philox::block(seed_, {right, uint32_t(stream_), uint32_t(stream_ >> 32), kFeistel << 16 | round});
      const uint32_t next = left ^ (random[0] & mask);
      left = right;
      right = next;
    }
    x = uint64_t(left) << half_bits_ | right;
  } while (x >= uint64_t(n_));
  return int64_t(x);
}

}  // namespace kda
