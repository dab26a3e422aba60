// An engine over weights that are in memory: the same model as its folder's, sharing the tensors.
#include <gtest/gtest.h>

#include <cstring>

#include "runtime/generate.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

std::vector<float> last_logits(Engine& e, const std::vector<int32_t>& ids) {
  Session s(e);
  const Prompt p{&s, ids};
  e.prefill({&p, 1});
  return {s.logits().begin(), s.logits().end()};
}

class MemoryEngine : public testing::Test {
 protected:
  void SetUp() override {
    folder = golden_path("tiny-hybrid");
    if (folder.empty()) GTEST_SKIP() << "needs golden/tiny-hybrid";
    options.threads = 2;
  }
  std::filesystem::path folder;
  EngineOptions options;
  const std::vector<int32_t> ids{1, 17, 42, 99, 3, 7, 200};
};

TEST_F(MemoryEngine, SameLogitsAsTheFolderAndSharedTensors) {
  Engine stored(folder, options);
  const Checkpoint checkpoint = load_checkpoint(folder);
  Weights weights = arrange_weights(checkpoint);
  const void* embedding = weights.embedding.v.data;
  Engine memory(weights, stored.tokenizer(), checkpoint.generation, options);
  EXPECT_EQ(memory.weights().embedding.v.data, embedding);
  EXPECT_EQ(end_ids(memory), end_ids(stored));
  EXPECT_EQ(last_logits(memory, ids), last_logits(stored, ids));
}

TEST_F(MemoryEngine, SeesWhatTrainingChanged) {
  Weights weights = arrange_weights(load_checkpoint(folder));
  // A writable copy of one vector, as a training run owns it.
  Tensor& norm = weights.final_norm;
  const Tensor own = host_tensor(Dtype::f32, norm.shape());
  std::memcpy(own.v.data, norm.v.data, norm.v.bytes());
  norm = own;
  Engine e(weights, nullptr, {}, options);
  const auto before = last_logits(e, ids);
  for (int64_t i = 0; i < own.v.size(); ++i) own.v.as<float>()[i] *= 2;
  const auto after = last_logits(e, ids);
  ASSERT_EQ(before.size(), after.size());
  for (size_t i = 0; i < before.size(); ++i) EXPECT_NEAR(after[i], 2 * before[i], 0.02 * std::abs(before[i]) + 1e-4);
}

TEST_F(MemoryEngine, RefusesWhatNeedsAFolder) {
  const Weights weights = arrange_weights(load_checkpoint(folder));
  EngineOptions int8 = options;
  int8.weights = WeightKind::int8;
  EXPECT_THROW(Engine(weights, nullptr, {}, int8), Error);
  Engine e(weights, nullptr, {}, options);
  Session s(e);
  const Prompt p{&s, ids};
  e.prefill({&p, 1});
  const TempFolder temporary;
  EXPECT_THROW(s.save(temporary / "s.safetensors"), Error);
  EXPECT_FALSE(std::filesystem::exists(temporary / "s.safetensors"));
  EXPECT_THROW(Session::restore(e, temporary / "s.safetensors"), Error);
}

}  // namespace
}  // namespace kda::test
