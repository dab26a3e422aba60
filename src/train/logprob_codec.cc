#include "train/logprob_codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/dtype.h"
#include "base/error.h"

namespace kda {

namespace {

static_assert(std::endian::native == std::endian::little, "floats are stored little-endian");

double rounded(double x, CodecDtype t) {
  switch (t) {
    case CodecDtype::float16: return double(float(f16(float(x))));
    case CodecDtype::bfloat16: return double(float(bf16(float(x))));
    case CodecDtype::float32: return double(float(x));
    case CodecDtype::float64: return x;
  }
  return x;
}

void put(double x, CodecDtype t, uint8_t* to) {
  const auto store = [&](auto v) { std::memcpy(to, &v, sizeof v); };
  switch (t) {
    case CodecDtype::float16: return store(f16(float(x)).bits);
    case CodecDtype::bfloat16: return store(bf16(float(x)).bits);
    case CodecDtype::float32: return store(float(x));
    case CodecDtype::float64: return store(x);
  }
}

double get(CodecDtype t, const uint8_t* from) {
  const auto load = [&](auto v) {
    std::memcpy(&v, from, sizeof v);
    return v;
  };
  switch (t) {
    case CodecDtype::float16: return double(float(load(f16())));
    case CodecDtype::bfloat16: return double(float(load(bf16())));
    case CodecDtype::float32: return double(load(float()));
    case CodecDtype::float64: return load(double());
  }
  return 0;
}

int64_t packed_bytes(int64_t bits, int64_t n) { return (bits * n + 7) / 8; }

// Numbers of `bits` bits, highest bit first within a number and a byte.
class BitReader {
 public:
  explicit BitReader(const uint8_t* p) : p_(p) {}
  uint64_t next(int bits) {
    uint64_t out = 0;
    while (bits > 0) {
      const int take = std::min(bits, 8 - used_);
      out = out << take | ((*p_ >> (8 - used_ - take)) & ((1u << take) - 1));
      advance(take);
      bits -= take;
    }
    return out;
  }

 private:
  void advance(int n) {
    used_ += n;
    if (used_ == 8) used_ = 0, ++p_;
  }
  const uint8_t* p_;
  int used_ = 0;
};

class BitWriter {
 public:
  explicit BitWriter(uint8_t* p) : p_(p) {}  // the bytes must be zero
  void next(uint64_t x, int bits) {
    while (bits > 0) {
      const int take = std::min(bits, 8 - used_);
      const auto part = uint8_t((x >> (bits - take)) & ((1u << take) - 1));
      *p_ = uint8_t(*p_ | part << (8 - used_ - take));
      used_ += take;
      if (used_ == 8) used_ = 0, ++p_;
      bits -= take;
    }
  }

 private:
  uint8_t* p_;
  int used_ = 0;
};

// What an element of a bin stands for, without the scale.
double level(uint64_t u, int64_t bits) {
  return bits == 1 ? double(2 * int64_t(u) - 1) : double(u) - std::ldexp(1.0, int(bits) - 1);
}

// To the nearest, ties to even; without a call where the sum's last bit is 1.
double whole(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  return std::abs(x) < 1e15 ? (x + kMagic) - kMagic : std::nearbyint(x);
}

// The element for so many steps away from zero, which has element 2^(bits-1) = half.
uint64_t element(double steps, double half, int64_t bits) {
  const uint64_t middle = uint64_t(1) << (bits - 1);
  if (steps <= -half) return 0;
  if (steps >= half - 1) return bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
  return steps < 0 ? middle - uint64_t(-steps) : middle + uint64_t(steps);
}

}  // namespace

struct LogprobCodec::Attempt {
  std::vector<double> coefficients;
  bool feed_back = false, search = false;
  std::vector<float> fit{};
  std::vector<double> scales{};
  std::vector<uint64_t> u{};    // of all bins
  std::vector<double> error{};  // [tail]
  double square = 0, most = 0;  // errors
};

size_t size_of(CodecDtype t) { return t == CodecDtype::float64 ? 8 : t == CodecDtype::float32 ? 4 : 2; }
const char* name_of(CodecDtype t) {
  switch (t) {
    case CodecDtype::float16: return "float16";
    case CodecDtype::bfloat16: return "bfloat16";
    case CodecDtype::float32: return "float32";
    case CodecDtype::float64: return "float64";
  }
  return "?";
}

LogprobCodec::LogprobCodec(LogprobCodecConfig config) : config_(std::move(config)) {
  const LogprobCodecConfig& c = config_;
  constexpr int64_t kMost = int64_t(1) << 31;
  KDA_CHECK(c.d >= 1 && c.d < kMost, "logprob codec: d must be 1..2147483647, got ", c.d);
  KDA_CHECK(c.k >= 1 && c.k <= c.d && c.k <= (1 << 20), "logprob codec: k must be 1..d and at most 1048576, got k ",
            c.k, ", d ", c.d);
  KDA_CHECK(c.exact_k >= 0 && c.exact_k <= c.k, "logprob codec: exact_k must be 0..k, got exact_k ", c.exact_k, ", k ",
            c.k);
  const int64_t tail = c.k - c.exact_k;
  KDA_CHECK(!tail || !c.polynomial_terms.empty() || !c.residual_bins.empty(), "logprob codec: exact_k ", c.exact_k,
            " of k ", c.k, " values are exact, so the rest needs polynomial_terms or residual_bins");
  KDA_CHECK(c.polynomial_terms.size() <= 64, "logprob codec: at most 64 polynomial_terms, got ",
            c.polynomial_terms.size());
  value_bytes_ =
      c.exact_k * int64_t(size_of(c.exact_dtype)) + int64_t(c.polynomial_terms.size()) * int64_t(size_of(c.term_dtype));
  int64_t residuals = 0;
  for (const ResidualBin& b : c.residual_bins) {
    KDA_CHECK(b.element_bits >= 1 && b.element_bits <= 64, "logprob codec: element_bits must be 1..64, got ",
              b.element_bits);
    KDA_CHECK(b.num_elements >= 1 && b.num_elements <= tail - residuals,
              "logprob codec: residual_bins hold more elements than the ", tail, " values that are not exact");
    residuals += b.num_elements;
    value_bytes_ += int64_t(size_of(b.scale_dtype)) + packed_bytes(b.element_bits, b.num_elements);
  }
  id_bits_ = int(std::bit_width(uint64_t(c.d - 1)));
  index_bytes_ = packed_bytes(id_bits_, c.k);

  for (const CodecTerm& t : c.polynomial_terms) {
    KDA_CHECK(t.kind != CodecTerm::power || (t.exponent >= 0 && t.exponent <= 64),
              "logprob codec: a power of polynomial_terms must be 0..64, got ", t.exponent);
    std::vector<double> values;
    for (int64_t j = 0; j < tail; ++j) {
      // torch's linspace counts from the nearer end.
      const float step = tail > 1 ? 1.0f / float(tail - 1) : 0;
      const float even = j < tail / 2 ? step * float(j) : 1.0f - step * float(tail - 1 - j);
      const double x = rounded(c.normalize_t ? (tail > 1 ? double(even) : 0) : double(j), c.term_dtype);
      values.push_back(rounded(t.kind == CodecTerm::sqrt  ? std::sqrt(x)
                               : t.kind == CodecTerm::exp ? std::exp(x)
                                                          : std::pow(x, t.exponent),
                               c.term_dtype));
      KDA_CHECK(std::isfinite(values.back()), "logprob codec: a term of polynomial_terms is not finite in ",
                name_of(c.term_dtype), " at x = ", x, ": choose normalize_t or smaller powers");
    }
    term_.push_back(std::move(values));
  }
  if (!tail) return;
  fit_ = plan_fit(term_);
  if (!c.delta_encoding) return;
  sums_ = term_;
  for (auto& column : sums_) std::partial_sum(column.begin(), column.end(), column.begin());
  sums_fit_ = plan_fit(sums_);
}

// The rows of the least-squares solution depend on the configuration alone. A coefficient is rounded when it is stored;
// the terms are therefore fixed one by one, those first whose rounding does most harm, and each fit of the rest makes
// good what the fixed ones lost.
LogprobCodec::Fit LogprobCodec::plan_fit(const std::vector<std::vector<double>>& column) const {
  const size_t tail = size_t(config_.k - config_.exact_k), n = column.size();
  Fit steps;
  std::vector<double> size(n);
  for (size_t i = 0; i < n; ++i)
    size[i] = std::sqrt(std::inner_product(column[i].begin(), column[i].end(), column[i].begin(), 0.0));
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size[a] > size[b]; });
  // The coefficient of one column among others: the part of it that is at right angles to the others.
  for (size_t s = 0; s < n; ++s) {
    std::vector<std::vector<double>> base;
    std::vector<double> v;
    for (size_t j = n; j-- > s;) {
      v = column[order[j]];
      if (size[order[j]] > 0)
        for (double& x : v) x /= size[order[j]];
      for (int twice = 0; twice < 2; ++twice)
        for (const auto& q : base) {
          const double dot = std::inner_product(q.begin(), q.end(), v.begin(), 0.0);
          for (size_t i = 0; i < tail; ++i) v[i] -= dot * q[i];
        }
      const double left = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
      if (left < 1e-11) {
        v.assign(tail, 0.0);  // follows from the others: not needed
        continue;
      }
      for (double& x : v) x /= left;
      if (j > s)
        base.push_back(v);
      else
        for (double& x : v) x /= left * size[order[j]];
    }
    steps.push_back({.term = order[s], .row = v});
  }
  return steps;
}

std::vector<double> LogprobCodec::solve(const Fit& fit, const std::vector<std::vector<double>>& column,
                                        std::vector<double> left) const {
  std::vector<double> out(column.size());
  for (const FitStep& s : fit) {
    const double x = rounded(std::inner_product(s.row.begin(), s.row.end(), left.begin(), 0.0), config_.term_dtype);
    if (!std::isfinite(x)) continue;  // too large for the dtype: the others make do without it
    out[s.term] = x;
    for (size_t j = 0; j < left.size(); ++j) left[j] -= x * column[s.term][j];
  }
  return out;
}

// The terms' sum as the decoder makes it: products and sum rounded.
void LogprobCodec::fitted(std::span<const double> coefficients, std::span<float> out) const {
  const CodecDtype t = config_.term_dtype;
  for (size_t j = 0; j < out.size(); ++j) {
    if (t == CodecDtype::float32) {
      float sum = 0;
      for (size_t i = 0; i < term_.size(); ++i) sum += float(coefficients[i]) * float(term_[i][j]);
      out[j] = sum;
    } else {
      double sum = 0;
      for (size_t i = 0; i < term_.size(); ++i) {
        sum += rounded(coefficients[i] * term_[i][j], t);
        if (t != CodecDtype::float64) sum = double(float(sum));
      }
      out[j] = float(rounded(sum, t));
    }
  }
}

void LogprobCodec::decode(std::span<const uint8_t> values, std::span<const uint8_t> indices, std::span<int32_t> ids,
                          std::span<float> logprobs) const {
  const LogprobCodecConfig& c = config_;
  const size_t k = size_t(c.k), exact = size_t(c.exact_k);
  KDA_CHECK(int64_t(values.size()) == value_bytes_ && int64_t(indices.size()) == index_bytes_,
            "logprob codec: a token must have ", value_bytes_, " bytes of values and ", index_bytes_,
            " of indices, got ", values.size(), " and ", indices.size());
  KDA_CHECK(ids.size() == k && logprobs.size() == k, "logprob codec: room for ", k, " ids and values needed, got ",
            ids.size(), " and ", logprobs.size());
  BitReader id_bits(indices.data());
  for (size_t j = 0; j < k; ++j) {
    const uint64_t id = id_bits.next(id_bits_);
    KDA_CHECK(int64_t(id) < c.d, "logprob codec: id ", id, " outside the vocabulary of ", c.d);
    ids[j] = int32_t(id);
  }
  const uint8_t* p = values.data();
  for (size_t j = 0; j < exact; ++j, p += size_of(c.exact_dtype)) logprobs[j] = float(get(c.exact_dtype, p));
  std::vector<double> coefficients(term_.size());
  for (double& x : coefficients) {
    x = get(c.term_dtype, p);
    p += size_of(c.term_dtype);
  }
  fitted(coefficients, logprobs.subspan(exact));
  size_t j = exact;
  for (const ResidualBin& b : c.residual_bins) {
    const double scale = get(b.scale_dtype, p);
    p += size_of(b.scale_dtype);
    BitReader bits(p);
    for (int64_t i = 0; i < b.num_elements; ++i, ++j)
      logprobs[j] += float(rounded(scale * level(bits.next(int(b.element_bits)), b.element_bits), c.exact_dtype));
    p += packed_bytes(b.element_bits, b.num_elements);
  }
  if (c.delta_encoding) {
    float sum = 0;
    for (float& x : logprobs) {
      sum += x;
      x = float(rounded(double(sum), c.exact_dtype));
    }
  }
  for (float x : logprobs) KDA_CHECK(std::isfinite(x), "logprob codec: a value is not finite");
}

void LogprobCodec::encode(std::span<const int32_t> ids, std::span<const float> logprobs, std::span<uint8_t> values,
                          std::span<uint8_t> indices) const {
  const LogprobCodecConfig& c = config_;
  const size_t k = size_t(c.k), exact = size_t(c.exact_k), tail = k - exact;
  KDA_CHECK(ids.size() == k && logprobs.size() == k, "logprob codec: needs ", k, " ids and values, got ", ids.size(),
            " and ", logprobs.size());
  KDA_CHECK(int64_t(values.size()) == value_bytes_ && int64_t(indices.size()) == index_bytes_,
            "logprob codec: room for ", value_bytes_, " and ", index_bytes_, " bytes needed, got ", values.size(),
            " and ", indices.size());
  std::fill(values.begin(), values.end(), uint8_t(0));
  std::fill(indices.begin(), indices.end(), uint8_t(0));
  BitWriter id_bits(indices.data());
  for (size_t j = 0; j < k; ++j) {
    KDA_CHECK(ids[j] >= 0 && ids[j] < c.d, "logprob codec: id ", ids[j], " outside the vocabulary of ", c.d);
    KDA_CHECK(std::isfinite(logprobs[j]), "logprob codec: value ", j, " is not finite");
    id_bits.next(uint64_t(ids[j]), id_bits_);
  }
  // What the decoder has so far is followed along: with differences, each makes good the error of the ones before.
  uint8_t* p = values.data();
  double have = 0;
  for (size_t j = 0; j < exact; ++j, p += size_of(c.exact_dtype)) {
    const double x = c.delta_encoding ? double(logprobs[j]) - have : double(logprobs[j]);
    put(x, c.exact_dtype, p);
    if (c.delta_encoding) have = double(float(have) + float(get(c.exact_dtype, p)));
  }
  if (!tail) return;

  // The first attempt is the plain way: the fit of the stored numbers themselves, scales by which the largest residual
  // just fits. Others are better in one respect or another; the one is taken whose root mean square and largest error,
  // relative to the first's, are smallest.
  const std::span<const float> rest = logprobs.subspan(exact);
  std::vector<double> values_left(tail), numbers_left(tail);
  for (size_t j = 0; j < tail; ++j) {
    values_left[j] = double(rest[j]) - have;
    numbers_left[j] = c.delta_encoding ? double(rest[j]) - (j ? double(rest[j - 1]) : have) : double(rest[j]);
  }
  Attempt best;
  double square = 0, most = 0, least = 0;  // of the first; of the best
  const auto attempt = [&](const std::vector<double>& coefficients, bool feed_back, bool search) {
    Attempt a{.coefficients = coefficients, .feed_back = feed_back, .search = search};
    quantise(a, rest, have);
    if (best.coefficients.empty() && best.u.empty() && best.fit.empty()) {
      square = a.square, most = a.most, least = 1;
      best = std::move(a);
      return;
    }
    if (!(square > 0)) return;
    // Where the first is a least-squares fit, nothing has a smaller square: a few parts in 100,000 more are let pass.
    const double worse = std::max(std::sqrt(a.square / square) - 3e-5, a.most / most);
    if (worse < least) least = worse, best = std::move(a);
  };
  const bool bins = !c.residual_bins.empty();
  const auto both = [&](const std::vector<double>& coefficients, bool search) {
    attempt(coefficients, c.error_diffusion, search);
    if (bins && c.delta_encoding) attempt(coefficients, !c.error_diffusion, search);
  };
  const Fit& fit = c.delta_encoding ? sums_fit_ : fit_;
  const auto& column = c.delta_encoding ? sums_ : term_;
  // A pull of the fit towards the values with the largest errors trades a little of the one measure for the other.
  const double gentle[] = {0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0}, coarse[] = {0.03, 0.3, 1.0};
  const auto with_pulls = [&](const std::vector<double>& coefficients) {
    both(coefficients, false);
    Attempt plain{.coefficients = coefficients, .feed_back = c.error_diffusion};
    quantise(plain, rest, have);
    if (!(plain.most > 0)) return;
    for (double& e : plain.error) e *= std::pow(e / plain.most, 4);
    const std::vector<double> towards = solve(fit, column, plain.error);
    for (double pull : bins ? std::span<const double>(coarse) : std::span<const double>(gentle)) {
      std::vector<double> pulled = coefficients;
      for (size_t i = 0; i < pulled.size(); ++i) pulled[i] = rounded(pulled[i] + pull * towards[i], c.term_dtype);
      both(pulled, false);
    }
  };
  with_pulls(solve(fit_, term_, numbers_left));
  if (c.delta_encoding && !term_.empty()) with_pulls(solve(fit, column, values_left));
  if (bins) both(std::vector<double>(best.coefficients), true);

  for (double x : best.coefficients) {
    put(x, c.term_dtype, p);
    p += size_of(c.term_dtype);
  }
  size_t at = 0;
  for (size_t b = 0; b < c.residual_bins.size(); ++b) {
    const ResidualBin& bin = c.residual_bins[b];
    put(best.scales[b], bin.scale_dtype, p);
    p += size_of(bin.scale_dtype);
    BitWriter bits(p);
    for (int64_t i = 0; i < bin.num_elements; ++i) bits.next(best.u[at++], int(bin.element_bits));
    p += packed_bytes(bin.element_bits, bin.num_elements);
  }
}

// Fills in the fit, scales, elements and errors for these coefficients. feed_back: with differences, a number makes
// good the errors of those before it. search: the scale is the one that leaves the least error.
void LogprobCodec::quantise(Attempt& a, std::span<const float> logprobs, double have) const {
  const LogprobCodecConfig& c = config_;
  a.fit.resize(logprobs.size());
  fitted(a.coefficients, a.fit);
  const double start = have;
  double square = 0, most = 0;
  const auto follow = [&](size_t j, float number, double& at) {  // what the decoder has after this number
    at = c.delta_encoding ? double(float(at) + number) : double(number);
    return double(logprobs[j]) - at;
  };
  const auto wanted = [&](size_t j, double at) {
    if (!c.delta_encoding)
      at = 0;
    else if (!a.feed_back)
      at = j ? double(logprobs[j - 1]) : start;
    return double(logprobs[j]) - at - double(a.fit[j]);
  };
  size_t first = 0;
  for (const ResidualBin& bin : c.residual_bins) {
    const size_t n = size_t(bin.num_elements);
    const double half = std::ldexp(1.0, int(bin.element_bits) - 1);
    // Residuals one by one with a scale: their sum of squares and largest error, in the end the elements themselves.
    const auto run = [&](double scale, bool keep) {
      double error = 0, at = have;
      for (size_t j = first; j < first + n; ++j) {
        const double r = wanted(j, at);
        uint64_t u;
        if (bin.element_bits == 1)
          u = r >= 0;
        else if (scale > 0)
          u = element(whole(r / scale), half, bin.element_bits);
        else
          u = uint64_t(1) << (bin.element_bits - 1);
        const double e = follow(j, a.fit[j] + float(rounded(scale * level(u, bin.element_bits), c.exact_dtype)), at);
        error += e * e;
        if (!keep) continue;
        a.u.push_back(u);
        a.error.push_back(e);
        most = std::max(most, std::abs(e));
      }
      if (keep) have = at, square += error;
      return error;
    };
    double largest = 0, mean = 0;
    for (size_t j = first; j < first + n; ++j) {
      const double r = std::abs(wanted(j, j ? double(logprobs[j - 1]) : start));
      largest = std::max(largest, r);
      mean += r / double(n);
    }
    double scale = rounded((bin.element_bits == 1 ? mean : largest / half), bin.scale_dtype);
    if (!std::isfinite(scale)) scale = 0;
    if (a.search) {
      double least = run(scale, false);
      const double widest = scale;
      for (double f : {1.02, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5}) {
        const double s = rounded(widest * f, bin.scale_dtype);
        const double error = std::isfinite(s) ? run(s, false) : least;
        if (error < least) least = error, scale = s;
      }
    }
    a.scales.push_back(scale);
    run(scale, true);
    first += n;
  }
  for (size_t j = first; j < logprobs.size(); ++j) {
    const double e = follow(j, a.fit[j], have);
    a.error.push_back(e);
    square += e * e;
    most = std::max(most, std::abs(e));
  }
  a.square = square;
  a.most = most;
}

int64_t LegacyCodecConfig::words() const {
  const int64_t each = 64 / std::max<int64_t>(1, std::bit_width(uint64_t(vocab_size - 1)));
  return (k + each - 1) / each;
}
int64_t LegacyCodecConfig::coefficients() const { return polynomial_degree + 1 + (with_sqrt_term ? 1 : 0); }

void decode_legacy(const LegacyCodecConfig& c, std::span<const uint64_t> packed_indices,
                   std::span<const float> exact_values, std::span<const float> coeffs, std::span<int32_t> ids,
                   std::span<float> logprobs) {
  KDA_CHECK(c.vocab_size >= 1 && c.vocab_size < (int64_t(1) << 31) && c.k >= 1 && c.k <= c.vocab_size &&
                c.exact_k >= 0 && c.exact_k <= c.k && c.polynomial_degree >= 0 && c.polynomial_degree <= 64,
            "legacy logprob codec: needs 0 <= exact_k <= k <= vocab_size and polynomial_degree 0..64, got exact_k ",
            c.exact_k, ", k ", c.k, ", vocab_size ", c.vocab_size, ", polynomial_degree ", c.polynomial_degree);
  KDA_CHECK(int64_t(packed_indices.size()) == c.words() && int64_t(exact_values.size()) == c.exact_k &&
                int64_t(coeffs.size()) == c.coefficients(),
            "legacy logprob codec: a token must have ", c.words(), " words of indices, ", c.exact_k, " values, ",
            c.coefficients(), " coefficients, got ", packed_indices.size(), ", ", exact_values.size(), ", ",
            coeffs.size());
  KDA_CHECK(int64_t(ids.size()) == c.k && int64_t(logprobs.size()) == c.k, "legacy logprob codec: room for ", c.k,
            " ids and values needed");
  const int bits = std::max(1, int(std::bit_width(uint64_t(c.vocab_size - 1))));
  const size_t each = size_t(64 / bits);
  for (size_t j = 0; j < ids.size(); ++j) {
    const uint64_t id = packed_indices[j / each] >> (size_t(bits) * (j % each)) & ((uint64_t(1) << bits) - 1);
    KDA_CHECK(int64_t(id) < c.vocab_size, "legacy logprob codec: id ", id, " outside the vocabulary of ", c.vocab_size);
    ids[j] = int32_t(id);
  }
  for (size_t j = 0; j < logprobs.size(); ++j) {
    if (j < exact_values.size()) {
      logprobs[j] = exact_values[j];
    } else {
      const double x = double(j - exact_values.size() + 1), base = c.invert_polynomial ? 1 / x : x;
      double sum = 0, power = 1;
      for (int64_t n = 0; n <= c.polynomial_degree; ++n, power *= base) sum += double(coeffs[size_t(n)]) * power;
      if (c.with_sqrt_term) sum += double(coeffs.back()) * std::sqrt(x);
      logprobs[j] = float(sum);
    }
    KDA_CHECK(std::isfinite(logprobs[j]), "legacy logprob codec: a value is not finite");
  }
}

}  // namespace kda
