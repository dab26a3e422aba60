// A KDA-only model's memory does not grow with what it has generated.
#include "base/memory.h"

#include <gtest/gtest.h>

#include "runtime/generate.h"
#include "tests/golden.h"

namespace kda::test {
namespace {

TEST(Memory, DoesNotGrowWithGeneratedTokens) {
  KDA_NEED(folder, "tiny-kda");
  EngineOptions o;
  o.threads = 1;
  Engine e(folder, o);
  GenerationRequest r{.prompt = {1, 2, 3}, .params = {}};
  r.params.max_new_tokens = 20000;
  r.params.ignore_eos = true;
  int64_t tokens = 0, early = 0;
  GenerationCallbacks callbacks;
  callbacks.on_token = [&](size_t, const Sampled&) {
    if (++tokens == 1000) early = resident_bytes();
  };
  generate(e, {r}, callbacks);
  EXPECT_EQ(tokens, 20000);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's own memory grows";
#else
  EXPECT_LT(resident_bytes() - early, 4 << 20);
#endif
}

}  // namespace
}  // namespace kda::test
