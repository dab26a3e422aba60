#include "train/teacher.h"

#include <gtest/gtest.h>

#include <random>

#include "model/transformer.h"
#include "tests/check.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

namespace fs = std::filesystem;

TrainBatch batch_of(const std::vector<int64_t>& lengths, int64_t vocabulary) {
  std::mt19937 random(5);
  TrainBatch b;
  b.start = {0};
  for (int64_t n : lengths) {
    for (int64_t i = 0; i < n; ++i) b.ids.push_back(int32_t(random() % uint32_t(vocabulary)));
    b.start.push_back(int32_t(b.ids.size()));
  }
  return b;
}

std::vector<float> copy(const ConstView& v) { return {v.as<float>(), v.as<float>() + v.size()}; }

// Every sequence alone, in one pass.
struct Plain {
  std::map<int64_t, std::vector<float>> hidden, mixer_in, mixer_out;

  Plain(Context& ctx, const Weights& w, const TrainBatch& b) {
    const Transformer model(w);
    const int64_t D = w.config.width, L = int64_t(w.layers.size());
    for (size_t n = 0; n + 1 < b.start.size(); ++n) {
      const int64_t T = b.start[n + 1] - b.start[n];
      if (T == 0) continue;
      StatePool states(ctx, w.config, 1);
      states.reserve(ctx, 1, T);
      Buffers buffers = plan_buffers(ctx, w, T, T, T);
      std::vector<Tap> taps;
      std::vector<std::vector<float>> memory(size_t(3 * L + 1), std::vector<float>(size_t(T * D)));
      for (int64_t l = -1; l < L; ++l)
        for (TapPoint p : {TapPoint::layer_out, TapPoint::mixer_in, TapPoint::mixer_out})
          if (l >= 0 || p == TapPoint::layer_out) taps.push_back({l, p, view(memory[taps.size()].data(), {T, D})});
      const std::vector<int32_t> start{0, int32_t(T)}, zero{0}, none{-1};
      model.prefill(ctx, buffers, states,
                    {.ids = std::span(b.ids).subspan(size_t(b.start[n]), size_t(T)),
                     .start = start,
                     .slot_in = none,
                     .slot_out = zero,
                     .past = zero},
                    taps);
      for (size_t i = 0; i < taps.size(); ++i) {
        const int64_t l = taps[i].layer;
        auto& to = taps[i].point == TapPoint::layer_out  ? hidden[l + 1]
                   : taps[i].point == TapPoint::mixer_in ? mixer_in[l]
                                                         : mixer_out[l];
        to.insert(to.end(), memory[i].begin(), memory[i].end());
      }
    }
  }
};

std::vector<fs::path> folders() {
  const fs::path source(KDA_SOURCE_DIR);
  return {source / "tests/golden/tiny-teacher", source / "tests/golden/tiny-hybrid", source / "tests/golden/tiny-kda",
          source / "tests/data/llama/linear"};
}

constexpr double kRounding = 2e-5;

TEST(LiveTeacher, BlocksAndPacksEqualSequencesAlone) {
  for (const fs::path& folder : folders()) {
    CpuContext ctx;
    const Checkpoint c = load_checkpoint(folder);
    const Weights w = arrange_weights(c);
    const int64_t L = int64_t(w.layers.size());
    TeacherWants wants{.logits = true, .hidden = {}, .mixers = {}};
    for (int64_t l = 0; l <= L; ++l) wants.hidden.push_back(l);
    for (int64_t l = 0; l < L; ++l) wants.mixers.push_back(l);
    const auto teacher = live_teacher(ctx, w, wants, 5000, 4500);
    // Far over a block; many short ones, empty ones among them; one just over and one just under a block. The
    // second batch finds what the first left behind.
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{4500, 0, 3},
                                                {0, 1, 7, 2, 0, 5, 1, 1, 9, 33, 64, 2, 1, 0},
                                                {2049, 2047},
                                                {700, 900, 3, 1}}) {
      const TrainBatch b = batch_of(lengths, w.config.vocabulary);
      const TeacherOutput& out = teacher->run(ctx, b);
      const Plain want(ctx, w, b);
      EXPECT_EQ(out.weights, &w);
      EXPECT_LE(relative_max(copy(out.x), want.hidden.at(L)), kRounding) << folder;
      ASSERT_EQ(out.hidden.size(), size_t(L + 1));
      for (const auto& [l, v] : out.hidden)
        EXPECT_LE(relative_max(copy(v), want.hidden.at(l)), kRounding) << folder << l;
      for (const auto& [l, v] : out.mixer_in)
        EXPECT_LE(relative_max(copy(v), want.mixer_in.at(l)), kRounding) << folder << l;
      for (const auto& [l, v] : out.mixer_out)
        EXPECT_LE(relative_max(copy(v), want.mixer_out.at(l)), kRounding) << folder << l;
      EXPECT_FALSE(out.ids.data);
      std::vector<float> other = want.hidden.at(L);  // the comparison can fail
      std::swap(other[0], other[1]);
      EXPECT_GT(relative_max(copy(out.x), other), kRounding);
    }
  }
}

TEST(LiveTeacher, OnlyWhatIsWanted) {
  CpuContext ctx;
  const Checkpoint c = load_checkpoint(folders()[0]);
  Weights w = arrange_weights(c);
  // From layer 2 on every number would be NaN.
  w.layers[2].mixer_norm = host_tensor(Dtype::f32, {w.config.width});
  std::fill_n(w.layers[2].mixer_norm.v.as<float>(), w.config.width, std::numeric_limits<float>::quiet_NaN());
  const TrainBatch b = batch_of({20, 30}, w.config.vocabulary);
  const auto teacher = live_teacher(ctx, w, {.logits = false, .hidden = {2}, .mixers = {0}}, 64, 64);
  const TeacherOutput& out = teacher->run(ctx, b);
  EXPECT_FALSE(out.weights);
  EXPECT_FALSE(out.x.data);
  EXPECT_EQ(out.hidden.size(), 1u);
  EXPECT_EQ(out.mixer_in.size(), 1u);
  EXPECT_EQ(out.mixer_out.size(), 1u);
  for (const ConstView& v : {out.hidden.at(2), out.mixer_in.at(0), out.mixer_out.at(0)})
    for (float x : copy(v)) ASSERT_FALSE(std::isnan(x));
}

int64_t allocated_bytes = 0;

TEST(LiveTeacher, BytesAreWhatItAllocatesAndWeightsAreShared) {
  for (const fs::path& folder : folders()) {
    CpuContext ctx;
    const Checkpoint c = load_checkpoint(folder);
    const Weights w = arrange_weights(c);
    Backend counting = cpu_backend();
    counting.alloc = [](Dtype d, Shape s) {
      allocated_bytes += s.size() * int64_t(size_of(d));
      return host_tensor(d, s);
    };
    ctx.backend = &counting;
    for (int64_t rows : {100, 3000}) {
      allocated_bytes = 0;
      const auto teacher = live_teacher(ctx, w, {.logits = true, .hidden = {1, 2}, .mixers = {}}, rows, rows);
      EXPECT_EQ(teacher->bytes(), allocated_bytes);
    }
  }
}

TEST(LiveTeacher, Refusals) {
  CpuContext ctx;
  const Checkpoint c = load_checkpoint(folders()[0]);
  const Weights w = arrange_weights(c);
  EXPECT_THROW(live_teacher(ctx, w, {.logits = false, .hidden = {5}, .mixers = {}}, 64, 64), Error);
  EXPECT_THROW(live_teacher(ctx, w, {.logits = false, .hidden = {}, .mixers = {4}}, 64, 64), Error);
  EXPECT_THROW(live_teacher(ctx, w, {.logits = true, .hidden = {}, .mixers = {}}, 0, 64), Error);
  const auto teacher = live_teacher(ctx, w, {.logits = true, .hidden = {}, .mixers = {}}, 64, 32);
  EXPECT_THROW(teacher->run(ctx, batch_of({40}, 260)), Error);
  EXPECT_THROW(teacher->run(ctx, batch_of({32, 33}, 260)), Error);
}

}  // namespace
}  // namespace kda::test
