// train/logprob_codec.h — a token's k likeliest ids with their log-probabilities, in 100 to 300 bytes.
//
// ids      by falling log-probability, ceil(log2 d) bits each, highest bit first, zeros up to a whole byte
// values   exact_k floats | one coefficient for each term | for each residual bin its scale, then num_elements unsigned
//          numbers of element_bits, packed as the ids are; floats little-endian
//          value j >= exact_k: sum of coefficient * term(x), x = j - exact_k (normalize_t: evenly over [0,1]), plus
//          scale * (u - 2^(bits-1)) of the bins laid end to end (1 bit: scale * (2u - 1))
//          delta_encoding: all of these are the first value and then differences
//
// Source: the format of DistillKit @ a61c2e7 (distillkit/compression), decoded with its roundings. The fit is ours.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

enum class CodecDtype { float16, bfloat16, float32, float64 };
size_t size_of(CodecDtype);
const char* name_of(CodecDtype);

struct CodecTerm {
  enum Kind { power, sqrt, exp } kind = power;
  int exponent = 0;  // power: 0..64
  bool operator==(const CodecTerm&) const = default;
};

struct ResidualBin {
  CodecDtype scale_dtype = CodecDtype::float16;
  int64_t element_bits = 8;  // 1..64
  int64_t num_elements = 0;
  bool operator==(const ResidualBin&) const = default;
};

// Names and defaults are DistillKit's.
struct LogprobCodecConfig {
  int64_t d = 0;  // vocabulary
  int64_t k = 0;
  int64_t exact_k = 0;
  CodecDtype exact_dtype = CodecDtype::float32;
  std::vector<CodecTerm> polynomial_terms;
  CodecDtype term_dtype = CodecDtype::float32;
  std::vector<ResidualBin> residual_bins;
  bool delta_encoding = true;
  bool error_diffusion = false;  // the writer's: a value's rounding error is made good by the next
  bool normalize_t = false;
  bool operator==(const LogprobCodecConfig&) const = default;
};

// One JSON object with DistillKit's keys. Throws Error for unknown keys, wrong types and what LogprobCodec refuses.
LogprobCodecConfig parse_codec_config(std::string_view json, const std::string& where);
std::string to_json(const LogprobCodecConfig&);

// Immutable; may be used by any number of threads.
class LogprobCodec {
 public:
  // Throws Error for a configuration that makes no sense: k > d, exact_k > k, more residuals than values, ..
  explicit LogprobCodec(LogprobCodecConfig);
  const LogprobCodecConfig& config() const { return config_; }

  int64_t value_bytes() const { return value_bytes_; }  // of a token
  int64_t index_bytes() const { return index_bytes_; }

  // values [value_bytes], indices [index_bytes] -> ids [k], logprobs [k]. Throws Error for another size, an id that is
  // not below d, and values that are not finite.
  void decode(std::span<const uint8_t> values, std::span<const uint8_t> indices, std::span<int32_t> ids,
              std::span<float> logprobs) const;
  // ids [k] below d, logprobs [k] finite and falling -> bytes of one token.
  void encode(std::span<const int32_t> ids, std::span<const float> logprobs, std::span<uint8_t> values,
              std::span<uint8_t> indices) const;

 private:
  // A least-squares fit of the terms, one step for each: the coefficient from what the steps before left over.
  struct FitStep {
    size_t term;
    std::vector<double> row;  // [tail]
  };
  using Fit = std::vector<FitStep>;
  struct Attempt;
  Fit plan_fit(const std::vector<std::vector<double>>& columns) const;
  std::vector<double> solve(const Fit&, const std::vector<std::vector<double>>& columns,
                            std::vector<double> left) const;
  void fitted(std::span<const double> coefficients, std::span<float> out) const;
  void quantise(Attempt&, std::span<const float> logprobs, double have) const;

  LogprobCodecConfig config_;
  int64_t value_bytes_ = 0, index_bytes_ = 0;
  int id_bits_ = 0;
  std::vector<std::vector<double>> term_;  // [terms][tail]  in term_dtype
  std::vector<std::vector<double>> sums_;  // delta_encoding: the same, summed up
  Fit fit_, sums_fit_;
};

// The codec before that one: rows of packed_indices, exact_values, coeffs.
struct LegacyCodecConfig {
  int64_t vocab_size = 0, k = 0, exact_k = 0, polynomial_degree = 0;
  bool invert_polynomial = true;
  bool with_sqrt_term = false;
  int64_t words() const;         // of packed_indices, uint64: floor(64 / bits) ids each, lowest bits first
  int64_t coefficients() const;  // of x^-n (x^n if not inverted), n = 0..polynomial_degree, x = 1, 2, ..; sqrt(x) last
};
// Throws Error for sizes that do not fit, and an id that is not below vocab_size.
void decode_legacy(const LegacyCodecConfig&, std::span<const uint64_t> packed_indices,
                   std::span<const float> exact_values, std::span<const float> coeffs, std::span<int32_t> ids,
                   std::span<float> logprobs);

}  // namespace kda
