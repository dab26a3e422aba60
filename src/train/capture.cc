#include "train/capture.h"

#include <algorithm>

#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/top_k.h"

namespace kda {

namespace {

constexpr int64_t kChunk = 256;  // rows of logits at once

struct Piece {
  int64_t row, from, tokens;
};

// Calls f for every piece in order.
void each_piece(const Rows& rows, const CaptureSizes& s, const std::function<void(const Piece&)>& f) {
  KDA_CHECK(s.sequence_length >= 2, "capture: sequence_length must be 2 or more, got ", s.sequence_length);
  KDA_CHECK(s.max_tokens >= 0 && s.batch_tokens >= 1, "capture: max_tokens and batch_tokens must not be negative");
  int64_t left = s.max_tokens ? s.max_tokens : INT64_MAX;
  for (int64_t r = 0; r < rows.count() && left >= 2; ++r)
    for (int64_t from = 0; from < rows.length(r) && left >= 2; from += s.sequence_length) {
      const int64_t n = std::min({s.sequence_length, rows.length(r) - from, left});
      if (n < 2) continue;
      left -= n;
      f({r, from, n});
    }
}

// The head, top-k and codec for the tokens of one batch.
class Encoder {
 public:
  Encoder(Context& ctx, const Weights& w, const LogprobCodec& codec, int64_t rows)
      : w_(w),
        codec_(codec),
        V_(w.config.vocabulary),
        k_(codec.config().k),
        h_(ctx.backend->alloc(Dtype::f32, {kChunk, w.config.width})),
        logits_(ctx.backend->alloc(Dtype::f32, {kChunk, V_})),
        ids_(ctx.backend->alloc(Dtype::i32, {kChunk, k_})),
        logprobs_(ctx.backend->alloc(Dtype::f32, {kChunk, k_})),
        scratch_(
            ctx.backend->alloc(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, kChunk, w.config.width, V_)) + 64})),
        host_ids_(size_t(kChunk * k_)),
        host_logprobs_(size_t(kChunk * k_)),
        values_(size_t(rows * codec.value_bytes())),
        indices_(size_t(rows * codec.index_bytes())) {}

  void run(Context& ctx, const ConstView& x) {
    const int64_t T = x.dim(0), D = x.dim(1), vb = codec_.value_bytes(), ib = codec_.index_bytes();
    ctx.workspace = scratch_;
    for (int64_t from = 0; from < T; from += kChunk) {
      const int64_t n = std::min(kChunk, T - from);
      const View h{h_.v.data, Dtype::f32, {n, D}}, logits{logits_.v.data, Dtype::f32, {n, V_}};
      const View ids{ids_.v.data, Dtype::i32, {n, k_}}, logprobs{logprobs_.v.data, Dtype::f32, {n, k_}};
      rms_norm(ctx, {.x = {x.as<float>() + from * D, Dtype::f32, {n, D}},
                     .w = w_.final_norm,
                     .y = h,
                     .eps = float(w_.config.norm_eps)});
      const MatmulSegment segment{w_.head.view(), logits};
      matmul(ctx, {.x = h, .segments = {&segment, 1}});
      top_k(ctx, {.logits = logits, .ids = ids, .logprobs = logprobs});
      ctx.backend->copy(ctx, host_ids_.data(), ids.data, ids.bytes());
      ctx.backend->copy(ctx, host_logprobs_.data(), logprobs.data, logprobs.bytes());
      constexpr int64_t kTask = 8;
      ctx.pool->run((n + kTask - 1) / kTask, [&](int64_t task, int) {
        for (int64_t r = task * kTask; r < std::min(n, (task + 1) * kTask); ++r)
          codec_.encode({host_ids_.data() + r * k_, size_t(k_)}, {host_logprobs_.data() + r * k_, size_t(k_)},
                        {values_.data() + (from + r) * vb, size_t(vb)},
                        {indices_.data() + (from + r) * ib, size_t(ib)});
      });
    }
  }
  std::span<const uint8_t> values(int64_t from, int64_t n) const {
    return {values_.data() + from * codec_.value_bytes(), size_t(n * codec_.value_bytes())};
  }
  std::span<const uint8_t> indices(int64_t from, int64_t n) const {
    return {indices_.data() + from * codec_.index_bytes(), size_t(n * codec_.index_bytes())};
  }

 private:
  const Weights& w_;
  const LogprobCodec& codec_;
  int64_t V_, k_;
  Tensor h_, logits_, ids_, logprobs_, scratch_;
  std::vector<int32_t> host_ids_;
  std::vector<float> host_logprobs_;
  std::vector<uint8_t> values_, indices_;
};

}  // namespace

int64_t capture_tokens(const Rows& rows, const CaptureSizes& sizes) {
  int64_t total = 0;
  each_piece(rows, sizes, [&](const Piece& p) { total += p.tokens; });
  return total;
}

void capture(Context& ctx, const Weights& teacher, const Rows& rows, const CaptureSizes& sizes,
             const LogprobCodec& codec, CaptureWriter& writer, const std::function<void(int64_t)>& progress) {
  KDA_CHECK(codec.config().d == teacher.config.vocabulary, "capture: the codec is for a vocabulary of ",
            codec.config().d, ", the teacher has ", teacher.config.vocabulary);
  const int64_t room = std::max(sizes.batch_tokens, sizes.sequence_length);
  const auto model =
      live_teacher(ctx, teacher, {.logits = true, .hidden = {}, .mixers = {}}, room, sizes.sequence_length);
  Encoder encoder(ctx, teacher, codec, room);
  // Batches are cut from the first piece on, also where the first ones are there already: so a piece always meets the
  // same neighbours.
  TrainBatch batch;
  int64_t first = 0;  // piece of the batch
  const auto run = [&] {
    const int64_t n = int64_t(batch.rows.size());
    if (n && first + n > writer.rows()) {
      batch.labels.assign(batch.ids.size(), -1);
      encoder.run(ctx, model->run(ctx, batch).x);
      for (int64_t i = std::max<int64_t>(0, writer.rows() - first); i < n; ++i) {
        const int64_t from = batch.start[size_t(i)], count = batch.start[size_t(i) + 1] - from;
        writer.add({batch.ids.data() + from, size_t(count)}, encoder.values(from, count), encoder.indices(from, count));
        if (progress) progress(writer.tokens());
      }
    }
    first += n;
    batch = {};
    batch.start = {0};
  };
  run();
  each_piece(rows, sizes, [&](const Piece& p) {
    if (batch.T() && batch.T() + p.tokens > sizes.batch_tokens) run();
    const size_t at = batch.ids.size();
    batch.ids.resize(at + size_t(p.tokens));
    rows.read(p.row, p.from, std::span(batch.ids).subspan(at));
    for (size_t i = at; i < batch.ids.size(); ++i)
      KDA_CHECK(batch.ids[i] >= 0 && batch.ids[i] < teacher.config.vocabulary, "capture: row ", p.row, ": id ",
                batch.ids[i], " outside the teacher's vocabulary of ", teacher.config.vocabulary);
    batch.start.push_back(int32_t(batch.ids.size()));
    batch.rows.push_back(p.row);
    batch.offsets.push_back(p.from);
  });
  run();
  KDA_CHECK(writer.rows() == first, "capture: the folder holds ", writer.rows(), " rows, the data makes ", first,
            ": it was begun on other data");
  writer.finish();
}

}  // namespace kda
