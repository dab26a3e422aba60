#include "train/capture.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/check.h"
#include "tests/golden.h"
#include "tests/ref/loss.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

class SomeRows : public Rows {
 public:
  std::vector<std::vector<int32_t>> rows;
  int64_t count() const override { return int64_t(rows.size()); }
  int64_t length(int64_t r) const override { return int64_t(rows[size_t(r)].size()); }
  void read(int64_t r, int64_t from, std::span<int32_t> out) const override {
    std::copy_n(rows[size_t(r)].begin() + from, out.size(), out.begin());
  }
  std::string fingerprint() const override { return "rows"; }
};

LogprobCodecConfig exact(int64_t vocabulary, int64_t k) {
  return {.d = vocabulary, .k = k, .exact_k = k, .polynomial_terms = {}, .residual_bins = {}, .delta_encoding = false};
}

TEST(Capture, HoldsTheTeachersLikeliestTokens) {
  KDA_NEED(model, "tiny-teacher");
  const GoldenFile g(model / "expected.safetensors");
  const Weights w = arrange_weights(load_checkpoint(model));
  const int64_t V = w.config.vocabulary, T = g["input_ids"].shape[1], k = 10;
  const auto ids = g["input_ids"].ids();
  SomeRows rows;
  rows.rows = {{ids.begin(), ids.begin() + T}, {7}, {ids.begin() + T, ids.end()}};  // one too short to be of use
  const auto logits = g["logits"].floats();

  TempFolder temp;
  CpuContext ctx(2, Precision::exact);
  const LogprobCodec codec(exact(V, k));
  const CaptureSizes sizes{.sequence_length = T, .max_tokens = 0};
  EXPECT_EQ(capture_tokens(rows, sizes), 2 * T);
  CaptureWriter writer(temp / "c", {.codec = codec.config()}, false);
  int64_t told = 0;
  capture(ctx, w, rows, sizes, codec, writer, [&](int64_t tokens) { told = tokens; });
  EXPECT_EQ(told, 2 * T);

  const auto stored = open_stored_logprobs(temp / "c");
  ASSERT_EQ(stored->count(), 2);
  for (int64_t r = 0; r < 2; ++r) {
    std::vector<int32_t> tokens(static_cast<size_t>(T)), likeliest(size_t(T * k));
    std::vector<float> logprobs(likeliest.size());
    stored->read(r, 0, tokens, likeliest, logprobs);
    EXPECT_EQ(tokens, std::vector<int32_t>(ids.begin() + r * T, ids.begin() + (r + 1) * T));
    for (int64_t t = 0; t < T; ++t) {
      const auto* p = logits.data() + (r * T + t) * V;
      const auto want = ref::log_softmax(std::vector<double>(p, p + V));
      auto sorted = want;
      std::sort(sorted.begin(), sorted.end(), std::greater<double>());
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = size_t(t * k + j);
        EXPECT_NEAR(logprobs[at], want[size_t(likeliest[at])], 2e-4) << r << " " << t << " " << j;
        EXPECT_NEAR(logprobs[at], sorted[size_t(j)], 2e-4);
      }
    }
  }
}

TEST(Capture, AResumedOneIsTheSame) {
  KDA_NEED(model, "tiny-kda");
  const Weights w = arrange_weights(load_checkpoint(model));
  const int64_t V = w.config.vocabulary;
  SomeRows rows;
  for (int64_t r = 0; r < 9; ++r) {
    rows.rows.emplace_back();
    for (int64_t t = 0; t < 5 + 6 * r; ++t) rows.rows.back().push_back(int32_t((r * 31 + t * 17) % V));
  }
  CpuContext ctx(2);
  const LogprobCodec codec(
      {.d = V, .k = 12, .exact_k = 3, .polynomial_terms = {{.exponent = 0}, {.exponent = 1}}, .residual_bins = {}});
  const CaptureSizes sizes{.sequence_length = 16, .max_tokens = 200, .batch_tokens = 40};
  TempFolder temp;
  CaptureHeader header{.codec = codec.config()};
  {
    CaptureWriter writer(temp / "whole", header, false);
    capture(ctx, w, rows, sizes, codec, writer);
    EXPECT_EQ(writer.tokens(), capture_tokens(rows, sizes));
  }
  EXPECT_LE(capture_tokens(rows, sizes), 200);
  EXPECT_GE(capture_tokens(rows, sizes), 199);
  struct Stop {};
  for (int64_t after : {1, 2, 5, 9}) {
    const auto folder = temp / cat("stopped", after);
    {
      CaptureWriter writer(folder, header, false);
      EXPECT_THROW(capture(ctx, w, rows, sizes, codec, writer,
                           [&](int64_t) {
                             if (writer.rows() == after) throw Stop();
                           }),
                   Stop);
    }
    CaptureWriter writer(folder, header, true);
    EXPECT_EQ(writer.rows(), after);
    capture(ctx, w, rows, sizes, codec, writer);
    EXPECT_EQ(read_bytes(folder / "rows.bin"), read_bytes(temp / "whole/rows.bin")) << after;
    EXPECT_EQ(read_bytes(folder / "index.bin"), read_bytes(temp / "whole/index.bin"));
  }
}

TEST(Capture, Refuses) {
  KDA_NEED(model, "tiny-kda");
  const Weights w = arrange_weights(load_checkpoint(model));
  CpuContext ctx(1);
  TempFolder temp;
  SomeRows rows;
  rows.rows = {{1, int32_t(w.config.vocabulary)}};
  const LogprobCodec codec(exact(w.config.vocabulary, 4));
  {
    CaptureWriter writer(temp / "ids", {.codec = codec.config()}, false);
    EXPECT_THROW(capture(ctx, w, rows, {.sequence_length = 8}, codec, writer), Error);
  }
  EXPECT_THROW(capture_tokens(rows, {.sequence_length = 1}), Error);
  const LogprobCodec other(exact(w.config.vocabulary + 1, 4));
  CaptureWriter writer(temp / "d", {.codec = other.config()}, false);
  EXPECT_THROW(capture(ctx, w, rows, {.sequence_length = 8}, other, writer), Error);
}

}  // namespace
}  // namespace kda::test
