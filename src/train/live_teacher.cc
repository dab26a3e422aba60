#include <algorithm>

#include "model/transformer.h"
#include "train/teacher.h"

namespace kda {

namespace {

constexpr int64_t kBlock = 2048;   // tokens of a pass
constexpr int64_t kSequences = 8;  // most sequences of a pass

// As many layers as somebody asks for: the tensors themselves are shared.
Weights lowest_layers(const Weights& w, const TeacherWants& wants) {
  const int64_t L = int64_t(w.layers.size());
  int64_t depth = wants.logits ? L : 0;
  for (int64_t h : wants.hidden) {
    KDA_CHECK(h >= 0 && h <= L, "teacher: hidden state ", h, " of a model with hidden states 0..", L);
    depth = std::max(depth, h);
  }
  for (int64_t l : wants.mixers) {
    KDA_CHECK(l >= 0 && l < L, "teacher: mixer ", l, " of a model with layers 0..", L - 1);
    depth = std::max(depth, l + 1);
  }
  Weights out = w;
  out.layers.resize(size_t(depth));
  out.config.layers.resize(size_t(depth));
  return out;
}

class LiveTeacher : public Teacher {
 public:
  LiveTeacher(Context& ctx, const Weights& w, const TeacherWants& wants, int64_t rows, int64_t longest)
      : rows_(rows),
        longest_(std::min(longest, rows)),
        block_(std::min(rows, kBlock)),
        room_(std::max(longest_, std::min(2 * block_, kSequences * longest_))),
        model_(lowest_layers(w, wants)),
        states_(ctx, model_.config(), std::min(rows, kSequences)),
        buffers_(plan_buffers(ctx, model_.weights(), block_, block_, room_)) {
    states_.reserve(ctx, 0, (room_ + states_.slots() - 1) / states_.slots());
    bytes_ = states_.bytes() + buffers_.bytes();
    const auto output = [&](int64_t layer, TapPoint point, ConstView& view) {
      for (Output& o : outputs_)
        if (o.layer == layer && o.point == point) return o.views.push_back(&view);
      outputs_.push_back({layer, point, ctx.backend->alloc(Dtype::f32, {rows, w.config.width}), {&view}});
      bytes_ += int64_t(outputs_.back().memory.v.bytes());
    };
    for (int64_t h : wants.hidden) output(h - 1, TapPoint::layer_out, out_.hidden[h]);
    for (int64_t l : wants.mixers) {
      output(l, TapPoint::mixer_in, out_.mixer_in[l]);
      output(l, TapPoint::mixer_out, out_.mixer_out[l]);
    }
    if (wants.logits) {
      out_.weights = &w;
      output(int64_t(w.layers.size()) - 1, TapPoint::layer_out, out_.x);
    }
  }

  int64_t bytes() const override { return bytes_; }

  const TeacherOutput& run(Context& ctx, const TrainBatch& batch) override {
    const int64_t T = batch.T(), D = model_.config().width;
    KDA_CHECK(T <= rows_, "teacher: ", T, " tokens, planned for ", rows_);
    for (const Output& o : outputs_)
      for (ConstView* view : o.views) *view = {o.memory.v.data, Dtype::f32, {T, D}};
    // Sequences no longer than a block are never cut: whole ones share a pass, longer ones have passes of their own.
    const size_t N = batch.start.size() - 1;
    const auto length = [&](size_t n) { return int64_t(batch.start[n + 1]) - batch.start[n]; };
    for (size_t n = 0; n < N;) {
      KDA_CHECK(length(n) <= longest_, "teacher: a sequence of ", length(n), " tokens, planned for ", longest_);
      if (length(n) > block_) {
        states_.divide(1, length(n));
        for (int64_t past = 0; past < length(n); past += block_)
          pass(ctx, batch, {{batch.start[n] + past, std::min(block_, length(n) - past), past}});
        ++n;
        continue;
      }
      std::vector<Piece> pieces;
      int64_t most = 0, tokens = 0;
      for (; n < N; ++n) {
        const int64_t more = length(n), count = int64_t(pieces.size()) + 1;
        if (more == 0) continue;
        if (tokens + more > block_ || count > states_.slots() || count * std::max(most, more) > room_) break;
        pieces.push_back({batch.start[n], more, 0});
        most = std::max(most, more);
        tokens += more;
      }
      if (pieces.empty()) continue;
      states_.divide(int64_t(pieces.size()), most);
      pass(ctx, batch, pieces);
    }
    return out_;
  }

 private:
  struct Output {
    int64_t layer;
    TapPoint point;
    Tensor memory;                  // f32 [rows,D]
    std::vector<ConstView*> views;  // in out_
  };
  struct Piece {
    int64_t from, tokens, past;  // of the batch's tokens; how many of the sequence came before
  };

  // Pieces are neighbours in the batch; piece i goes by slot i.
  void pass(Context& ctx, const TrainBatch& batch, const std::vector<Piece>& pieces) {
    const int64_t from = pieces.front().from, D = model_.config().width;
    std::vector<int32_t> start{0}, slot_in, slot_out, past;
    for (const Piece& p : pieces) {
      start.push_back(start.back() + int32_t(p.tokens));
      slot_out.push_back(int32_t(slot_out.size()));
      slot_in.push_back(p.past > 0 ? slot_out.back() : -1);
      past.push_back(int32_t(p.past));
    }
    std::vector<Tap> taps;
    for (const Output& o : outputs_)
      taps.push_back({o.layer, o.point, {o.memory.v.as<float>() + from * D, Dtype::f32, {start.back(), D}}});
    model_.prefill(ctx, buffers_, states_,
                   {.ids = std::span(batch.ids).subspan(size_t(from), size_t(start.back())),
                    .start = start,
                    .slot_in = slot_in,
                    .slot_out = slot_out,
                    .past = past},
                   taps);
  }

  int64_t rows_, longest_, block_, room_;  // room_: tokens of keys and values
  Transformer model_;
  StatePool states_;
  Buffers buffers_;
  std::vector<Output> outputs_;
  TeacherOutput out_;
  int64_t bytes_ = 0;
};

}  // namespace

std::unique_ptr<Teacher> live_teacher(Context& ctx, const Weights& w, const TeacherWants& wants, int64_t rows,
                                      int64_t longest) {
  KDA_CHECK(rows >= 1 && longest >= 1, "teacher: rows and longest must be at least 1, got ", rows, " and ", longest);
  return std::make_unique<LiveTeacher>(ctx, w, wants, rows, longest);
}

}  // namespace kda
