#include "train/logprob_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "tests/check.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

std::vector<uint8_t> bytes_of(const GoldenTensor& t, int64_t row) {
  const auto n = size_t(t.shape.back());
  const auto* p = reinterpret_cast<const uint8_t*>(t.bytes.data()) + size_t(row) * n;
  return {p, p + n};
}

struct Decoded {
  std::vector<int32_t> ids;
  std::vector<float> values;
};
Decoded decode(const LogprobCodec& codec, const std::vector<uint8_t>& values, const std::vector<uint8_t>& indices) {
  const auto k = size_t(codec.config().k);
  Decoded d{std::vector<int32_t>(k), std::vector<float>(k)};
  codec.decode(values, indices, d.ids, d.values);
  return d;
}

struct Encoded {
  std::vector<uint8_t> values, indices;
};
Encoded encode(const LogprobCodec& codec, const std::vector<int32_t>& ids, const std::vector<float>& logprobs) {
  Encoded e{std::vector<uint8_t>(size_t(codec.value_bytes())), std::vector<uint8_t>(size_t(codec.index_bytes()))};
  codec.encode(ids, logprobs, e.values, e.indices);
  return e;
}

struct Error2 {
  double square = 0, most = 0;
  void add(const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t j = 0; j < a.size(); ++j) {
      const double e = std::abs(double(a[j]) - double(b[j]));
      square += e * e;
      most = std::max(most, e);
    }
  }
};

TEST(LogprobCodec, EqualsDistillKit) {
  KDA_NEED(path, "logit_compression.safetensors");
  const GoldenFile g(path);
  const auto all = g["logprobs"].floats();
  const int64_t rows = g["logprobs"].shape[0], V = g["logprobs"].shape[1];
  int tried = 0;
  for (auto c : g.cases()) {
    if (!c["index"].is_number()) continue;
    const std::string i = std::to_string(c["index"].get<int>());
    c.erase("index");
    const LogprobCodec codec(parse_codec_config(c.dump(), "case " + i));
    const auto k = size_t(codec.config().k);
    ASSERT_EQ(codec.value_bytes(), g[i + ".compressed_logprobs"].shape[1]);
    ASSERT_EQ(codec.index_bytes(), g[i + ".bytepacked_indices"].shape[1]);
    const auto ids = g[i + ".ids"].ids();
    const auto values = g[i + ".values"].floats();
    Error2 ours, theirs;
    for (int64_t r = 0; r < rows; ++r) {
      const Decoded d =
          decode(codec, bytes_of(g[i + ".compressed_logprobs"], r), bytes_of(g[i + ".bytepacked_indices"], r));
      const std::vector<int32_t> want_ids(ids.begin() + r * int64_t(k), ids.begin() + (r + 1) * int64_t(k));
      const std::vector<float> want(values.begin() + r * int64_t(k), values.begin() + (r + 1) * int64_t(k));
      EXPECT_EQ(d.ids, want_ids) << "case " << i << " row " << r;
      EXPECT_TRUE(close(d.values, want, 1e-5, 1.0)) << "case " << i << " row " << r;
      // Our own way there and back.
      std::vector<float> exact;
      for (int32_t id : want_ids) exact.push_back(all[size_t(r * V + id)]);
      const Encoded e = encode(codec, want_ids, exact);
      EXPECT_EQ(e.indices, bytes_of(g[i + ".bytepacked_indices"], r)) << "case " << i << " row " << r;
      const Decoded back = decode(codec, e.values, e.indices);
      EXPECT_EQ(back.ids, want_ids);
      ours.add(back.values, exact);
      theirs.add(want, exact);
    }
    EXPECT_LE(ours.most, theirs.most) << "case " << i;
    EXPECT_LE(ours.square, theirs.square * (1 + 1e-4)) << "case " << i;
    RecordProperty("case " + i, cat("largest error ", ours.most, ", theirs ", theirs.most));
    ++tried;
  }
  EXPECT_EQ(tried, 5);
}

TEST(LogprobCodec, LegacyEqualsDistillKit) {
  KDA_NEED(path, "logit_compression.safetensors");
  const GoldenFile g(path);
  const auto cases = g.cases();
  const auto c = std::find_if(cases.begin(), cases.end(), [](const auto& x) { return x["index"] == "legacy"; });
  ASSERT_NE(c, cases.end());
  const LegacyCodecConfig config{.vocab_size = (*c)["vocab_size"],
                                 .k = (*c)["k"],
                                 .exact_k = (*c)["exact_k"],
                                 .polynomial_degree = (*c)["polynomial_degree"],
                                 .invert_polynomial = (*c)["invert_polynomial"],
                                 .with_sqrt_term = (*c)["with_sqrt_term"]};
  const auto& packed = g["legacy.packed_indices"];
  const auto exact = g["legacy.exact_values"].floats(), coeffs = g["legacy.coeffs"].floats();
  const auto ids = g["legacy.ids"].ids();
  const auto values = g["legacy.values"].floats();
  for (int64_t r = 0; r < packed.shape[1]; ++r) {
    std::vector<uint64_t> words(size_t(config.words()));
    std::memcpy(words.data(), packed.bytes.data() + size_t(r) * words.size() * 8, words.size() * 8);
    const auto part = [&](const auto& v, int64_t n) { return std::vector(v.begin() + r * n, v.begin() + (r + 1) * n); };
    Decoded d{std::vector<int32_t>(size_t(config.k)), std::vector<float>(size_t(config.k))};
    decode_legacy(config, words, part(exact, config.exact_k), part(coeffs, config.coefficients()), d.ids, d.values);
    EXPECT_EQ(d.ids, part(ids, config.k));
    EXPECT_TRUE(close(d.values, part(values, config.k), 2e-3, 1.0));
    EXPECT_FALSE(close(d.values, part(values, config.k), 0, 1.0));  // able to fail
    words[0] = ~uint64_t(0);
    EXPECT_THROW(
        decode_legacy(config, words, part(exact, config.exact_k), part(coeffs, config.coefficients()), d.ids, d.values),
        Error);
  }
}

// A falling row of k log-probabilities over d ids.
void row(int64_t d, int64_t k, std::vector<int32_t>& ids, std::vector<float>& logprobs) {
  ids.resize(size_t(k));
  for (int64_t j = 0; j < k; ++j) ids[size_t(j)] = int32_t((j * 7919 + d - 1) % d);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  while (int64_t(ids.size()) < k) ids.push_back(int32_t(ids.size()));
  logprobs.clear();
  const auto noise = values("row", k, 0.3f);
  for (int64_t j = 0; j < k; ++j) logprobs.push_back(-0.1f - 1.4f * std::log1p(float(j)) - noise[size_t(j)] - 0.3f);
  std::sort(logprobs.begin(), logprobs.end(), std::greater<float>());
}

TEST(LogprobCodec, ThereAndBackInEveryConfiguration) {
  std::vector<int32_t> ids;
  std::vector<float> l;
  for (int64_t d : {1, 2, 3, 255, 256, 257, 128004})
    for (CodecDtype exact : {CodecDtype::float16, CodecDtype::bfloat16, CodecDtype::float32, CodecDtype::float64})
      for (CodecDtype term : {CodecDtype::float16, CodecDtype::bfloat16, CodecDtype::float32, CodecDtype::float64})
        for (bool delta : {false, true})
          for (bool normalize : {false, true}) {
            const int64_t k = std::min<int64_t>(d, 60), exact_k = std::min<int64_t>(k, 5), tail = k - exact_k;
            LogprobCodecConfig c{.d = d,
                                 .k = k,
                                 .exact_k = exact_k,
                                 .exact_dtype = exact,
                                 .polynomial_terms = {{.exponent = 0}, {.exponent = 1}, {.kind = CodecTerm::sqrt}},
                                 .term_dtype = term,
                                 .residual_bins = {},
                                 .delta_encoding = delta,
                                 .normalize_t = normalize};
            if (normalize) c.polynomial_terms.push_back({.kind = CodecTerm::exp});
            if (tail > 20) c.residual_bins = {{CodecDtype::float16, 7, 10}, {CodecDtype::float32, 3, 10}};
            const LogprobCodec codec(c);
            EXPECT_EQ(parse_codec_config(to_json(c), "there and back"), c);
            row(d, k, ids, l);
            const Encoded e = encode(codec, ids, l);
            const Decoded back = decode(codec, e.values, e.indices);
            EXPECT_EQ(back.ids, ids);
            const bool coarse = exact == CodecDtype::bfloat16 || term == CodecDtype::bfloat16;
            EXPECT_TRUE(close(back.values, l, coarse ? 0.6 : 0.3, 1.0))
                << d << " " << name_of(exact) << " " << name_of(term) << " delta " << delta;
          }
}

TEST(LogprobCodec, WideResidualsAreExact) {
  std::vector<int32_t> ids;
  std::vector<float> l;
  row(5000, 40, ids, l);
  for (int64_t bits : {1, 2, 9, 24, 33, 53, 64})
    for (bool delta : {false, true}) {
      const LogprobCodec codec({.d = 5000,
                                .k = 40,
                                .exact_k = 1,
                                .polynomial_terms = {},
                                .residual_bins = {{CodecDtype::float64, bits, 39}},
                                .delta_encoding = delta});
      const Encoded e = encode(codec, ids, l);
      const Decoded back = decode(codec, e.values, e.indices);
      const double allowed = bits == 1 ? 10 : 2e-6 + 8 / std::ldexp(1.0, int(bits));
      EXPECT_TRUE(close(back.values, l, allowed, 1.0)) << bits << " " << delta;
      if (bits == 9) {
        EXPECT_FALSE(close(back.values, l, 1e-6, 1.0));
      }
    }
}

TEST(LogprobCodec, AProperFitOfDegreeFour) {
  std::vector<int32_t> ids;
  std::vector<float> l;
  row(5000, 128, ids, l);
  LogprobCodecConfig c{
      .d = 5000, .k = 128, .exact_k = 16, .polynomial_terms = {}, .residual_bins = {}, .delta_encoding = false};
  double before = 1e9;
  for (int n = 0; n <= 6; ++n) {  // more terms never fit worse
    c.polynomial_terms.push_back({.exponent = n});
    const LogprobCodec codec(c);
    const Encoded e = encode(codec, ids, l);
    Error2 error;
    error.add(decode(codec, e.values, e.indices).values, l);
    EXPECT_LE(error.square, before * 1.001) << n;
    before = error.square;
  }
  EXPECT_LT(std::sqrt(before / 112), 0.05);
}

TEST(LogprobCodec, RefusesConfigurations) {
  const auto message = [](const std::string& json) {
    try {
      LogprobCodec codec(parse_codec_config(json, "run.yaml"));
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(R"({"d":100,"k":10,"exact_k":10,"residual_bins":[]})"), "");
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":10,"exactk":1})").find("exactk"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":101,"exact_k":1})").find("k must be 1..d"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":11})").find("exact_k must be 0..k"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":1})").find("polynomial_terms or residual_bins"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":1,"polynomial_terms":["log"]})").find("sqrt"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":1,"polynomial_terms":[-1]})").find("-1"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":1,"exact_dtype":"int8"})").find("int8"), std::string::npos);
  EXPECT_NE(message(R"({"d":100,"k":10,"exact_k":1,"polynomial_terms":[0],
                       "residual_bins":[{"scale_dtype":"float16","element_bits":8,"num_elements":10}]})")
                .find("residual_bins hold more"),
            std::string::npos);
  EXPECT_NE(message(R"({"d":300,"k":200,"exact_k":1,"polynomial_terms":["exp"]})").find("not finite"),
            std::string::npos);
}

TEST(LogprobCodec, RefusesBytes) {
  const LogprobCodec codec({.d = 100, .k = 4, .exact_k = 4, .polynomial_terms = {}, .residual_bins = {}});
  std::vector<uint8_t> values(size_t(codec.value_bytes())), indices(size_t(codec.index_bytes()));
  EXPECT_NO_THROW(decode(codec, values, indices));
  indices[0] = 0xff;
  EXPECT_THROW(decode(codec, values, indices), Error);
  indices[0] = 0;
  values[3] = 0x7f, values[2] = 0xc0;  // NaN
  EXPECT_THROW(decode(codec, values, indices), Error);
  values.pop_back();
  EXPECT_THROW(decode(codec, values, indices), Error);
}

}  // namespace
}  // namespace kda::test
