// That the printed plan is what training takes: a process of its own builds everything, makes a step, and compares the
// memory it had resident at most with what it had before.
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstdio>
#include <cstdlib>

#include "base/memory.h"
#include "checkpoint/random.h"
#include "tests/model/train_problem.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

struct Size {
  int64_t tokens, sequences;
  bool recompute;
};

// Leaves the process: 0 when plan and peak differ by 5 % at most. `missing`: bytes wrongly left out of the plan.
[[noreturn]] void measure(const std::filesystem::path& folder, const Size& size, int64_t missing) {
  CpuContext ctx(2, Precision::fast, 64);
  const Checkpoint c = load_checkpoint(folder);
  std::filesystem::remove_all(folder.parent_path());  // it stays mapped, and nobody comes back to do this
  double touched = 0;  // every page of the mapped file is in memory before the count begins
  for (const auto& [name, t] : c.tensors)
    for (double v : doubles(t)) touched += v;
  {
    // What the process takes once, whatever the size: code of products and of the ops, stacks.
    Parameters p(ctx, c);
    p.set_trainable(ctx, {{.regex = "."}});
    TrainPass pass(ctx, p.weights(), {.rows = 64});
    Text text;
    text.add(std::vector<int32_t>(64, 1));
    loss_gradients(ctx, p, pass, text);
    ctx.workspace = {};
  }
  malloc_trim(0);
  const int64_t before = std::max(resident_bytes(), peak_resident_bytes());
  const int64_t settled = resident_bytes();
  Parameters p(ctx, c);
  p.set_trainable(ctx, {{.regex = "."}});
  const TrainSizes sizes{.rows = size.tokens, .sequences = size.sequences, .recompute = size.recompute};
  const int64_t plan = p.bytes() + TrainPass::plan(ctx, p.weights(), sizes).total() - missing;
  TrainPass pass(ctx, p.weights(), sizes);
  Text text;
  for (int64_t n = 0; n < size.sequences; ++n)
    text.add(std::vector<int32_t>(size_t(size.tokens / size.sequences), int32_t(n + 7)));
  const View x = pass.forward(ctx, text.view());
  pass.backward(ctx, x, {}, p.gradients());  // the stream itself will do as its gradient
  p.step(ctx, {.lr = 1e-3}, 1, 1);
  const int64_t peak = peak_resident_bytes();
  const double used = double(peak - settled);
  std::fprintf(stderr, "plan %.1f MB, used %.1f MB (before: %.1f now, %.1f at most), sum %g\n", double(plan) / 1e6,
               used / 1e6, double(settled) / 1e6, double(before) / 1e6, touched);
  std::exit(peak > before && std::abs(used - double(plan)) <= 0.05 * double(plan) ? 0 : 1);
}

TEST(TrainingMemoryDeathTest, ThePlanIsTrue) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers keep memory of their own";
#endif
  TempFolder folder;
  {
    ThreadPool pool;
    write_random_checkpoint(folder / "nano-kda", named_model("nano-kda"), {}, pool);
  }
  for (const Size& size : {Size{512, 2, false}, Size{2048, 3, false}, Size{4096, 4, true}})
    EXPECT_EXIT(measure(folder / "nano-kda", size, 0), testing::ExitedWithCode(0), "") << size.tokens;
  EXPECT_EXIT(measure(folder / "nano-kda", {512, 2, false}, 20'000'000), testing::ExitedWithCode(1), "");
}

}  // namespace
}  // namespace kda::test
