// The seam between ops and backends: a build without CUDA, and ops that a backend has no body for.
#include "kernels/backend.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "kernels/norm.h"

namespace kda {
namespace {

TEST(Backend, CudaIsAbsentFromACpuBuildAndSaysOtherwiseWhetherItAnswers) {
  if (!cuda_backend()) return;
  EXPECT_STREQ(cuda_backend()->name, "cuda");
  EXPECT_EQ(cuda_backend()->unavailable(), cuda_backend()->unavailable());
}

TEST(Backend, CpuMemoryIsZeroedAndCopied) {
  Context ctx;
  ctx.backend = &cpu_backend();
  EXPECT_STREQ(ctx.backend->name, "cpu");
  Tensor t = ctx.backend->alloc(Dtype::f32, {2, 3});
  for (int i = 0; i < 6; ++i) EXPECT_EQ(t.v.as<float>()[i], 0.0f);
  const float from[6] = {1, 2, 3, 4, 5, 6};
  float to[6] = {};
  ctx.backend->copy(ctx, t.v.data, from, sizeof from);
  ctx.backend->copy(ctx, to, t.v.data, sizeof to);
  EXPECT_EQ(std::memcmp(from, to, sizeof to), 0);
}

TEST(Backend, AMissingBodyIsAnErrorThatNamesOpAndBackend) {
  Backend hollow = cpu_backend();
  hollow.name = "hollow";
  hollow.rms_norm = nullptr;
  Context ctx;
  ctx.backend = &hollow;
  float x[2] = {3, 4}, y[2] = {7, 7};
  const float w[2] = {1, 1};
  try {
    rms_norm(ctx, {.x = view(x, {1, 2}), .w = view(w, {2}), .y = view(y, {1, 2}), .eps = 0});
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "rms_norm: no body in backend hollow");
  }
  EXPECT_EQ(y[0], 7);
  EXPECT_EQ(body(ctx, hollow.copy, "copy"), cpu_backend().copy);
}

TEST(Backend, AWorkspaceTooSmallSaysWhatIsNeeded) {
  Context ctx;
  ctx.backend = &cpu_backend();
  ctx.workspace = host_tensor(Dtype::u8, {64});
  EXPECT_EQ(workspace(ctx, 64, "op"), ctx.workspace.v.data);
  try {
    workspace(ctx, 65, "op");
    FAIL() << "no error";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "op: needs a workspace of 65 bytes, the context has 64");
  }
}

}  // namespace
}  // namespace kda
