// The CUDA device itself: memory, copies, recorded work, and what it says when it cannot.
#include <numeric>

#include "kernels/embedding.h"
#include "kernels/pointwise.h"
#include "tests/cuda.h"

namespace kda::test {
namespace {

TEST(CudaBackend, SaysWhyItCannotAnswer) {
  if (!cuda_backend()) GTEST_SKIP() << "built without CUDA";
  const std::string why = cuda_backend()->unavailable();
  if (why.empty()) GTEST_SKIP() << "a device answers";
  Context ctx;
  ctx.backend = cuda_backend();
  try {
    ctx.backend->open(ctx);
    FAIL() << "opened, though " << why;
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()), "CUDA: " + why);
  }
  EXPECT_FALSE(ctx.device);
}

TEST(CudaBackend, MemoryIsZeroedAndCopied) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const int64_t n : {int64_t{1}, int64_t{100}, int64_t{20000}, int64_t{3000000}}) {
    const Tensor t = ctx.backend->alloc(Dtype::f32, {n}), u = ctx.backend->alloc(Dtype::f32, {n});
    std::vector<float> back(size_t(n), 1.0f);
    const size_t bytes = back.size() * sizeof(float);
    ctx.backend->copy(ctx, back.data(), t.v.data, bytes);
    EXPECT_EQ(back, std::vector<float>(size_t(n), 0.0f));
    const auto want = values("copy", n);
    auto from = want;
    ctx.backend->copy(ctx, t.v.data, from.data(), bytes);
    std::fill(from.begin(), from.end(), 2.0f);  // copy has taken it
    ctx.backend->copy(ctx, u.v.data, t.v.data, bytes);
    ctx.backend->copy(ctx, back.data(), u.v.data, bytes);
    EXPECT_EQ(back, want);
  }
}

TEST(CudaBackend, UploadsAnySize) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const size_t n :
       {size_t{0}, size_t{1}, size_t{70000}, (size_t(8) << 20) - 1, size_t(8) << 20, (size_t(41) << 20) + 5}) {
    std::vector<uint8_t> from(n);
    for (size_t i = 0; i < n; ++i) from[i] = uint8_t(i * 2654435761u >> 13);
    const auto want = from;
    const Tensor t = ctx.backend->alloc(Dtype::u8, {int64_t(n)});
    const Transfer all{t.v.data, {from.data(), n}};
    ctx.backend->upload(ctx, {&all, 1});
    std::fill(from.begin(), from.end(), uint8_t(0));
    std::vector<uint8_t> back(n);
    ctx.backend->copy(ctx, back.data(), t.v.data, n);
    EXPECT_TRUE(back == want) << n << " bytes";
  }
}

TEST(CudaBackend, TooMuchMemoryIsAnErrorThatSaysHowMuch) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  try {
    ctx.backend->alloc(Dtype::f32, {int64_t(1) << 40});
    FAIL() << "4 TB were given";
  } catch (const Error& e) {
    const std::string what = e.what();
    EXPECT_NE(what.find("4398046511104 bytes"), std::string::npos) << what;
    EXPECT_NE(what.find("MiB are free"), std::string::npos) << what;
  }
  const Tensor t = ctx.backend->alloc(Dtype::f32, {4});  // and life goes on
  EXPECT_TRUE(bool(t));
}

// Recorded work is not run when it is recorded; each run sees what its arrays hold then.
TEST(CudaBackend, RecordedWorkReadsItsArraysAnew) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const int64_t D = 8;
  const auto rows = values("table", 5 * D);
  TypedBuffer table(ctx, Dtype::f32, rows), y(ctx, Dtype::f32, 2 * D);
  DeviceArray<int32_t> ids(ctx, {0, 1});
  const auto recorded = ctx.backend->record(ctx, [&] {
    embedding(ctx, {.table = table.view({5, D}), .ids = ids.view(), .y = y.view({2, D})});
  });
  EXPECT_TRUE(std::isnan(y.fetch()[0]));
  for (const std::vector<int32_t>& pick : {std::vector<int32_t>{4, 2}, std::vector<int32_t>{1, 3}}) {
    ctx.backend->copy(ctx, ids.data(), pick.data(), 8);
    recorded->run(ctx);
    std::vector<float> want;
    for (const int32_t id : pick) want.insert(want.end(), rows.begin() + id * D, rows.begin() + (id + 1) * D);
    EXPECT_EQ(y.fetch(), want);
  }
}

TEST(CudaBackend, AnErrorWhileRecordingIsPassedOnAndHarmless) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  EXPECT_THROW(ctx.backend->record(ctx, [] { throw Error("no"); }), Error);
  TypedBuffer a(ctx, Dtype::f32, std::vector<float>{1, 2});
  EXPECT_EQ(a.fetch(), (std::vector<float>{1, 2}));
}

// What a copy says; empty when it succeeds.
std::string failure_of_copy(Context& ctx, void* from) {
  char to[16];
  try {
    ctx.backend->copy(ctx, to, from, sizeof to);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// In a process of its own: nothing can be done there any more.
TEST(CudaBackendDeathTest, AFailedLaunchIsToldByEveryLaterCallAndNothingHangs) {
  KDA_NEEDS_CUDA();
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto child = [] {
    CudaContext ctx;
    const int64_t D = 4096;
    TypedBuffer table(ctx, Dtype::f32, 2 * D), y(ctx, Dtype::f32, D);
    const DeviceArray<int32_t> ids(ctx, {1 << 30});  // far outside of all memory
    embedding(ctx, {.table = table.view({2, D}), .ids = ids.view(), .y = y.view({1, D})});
    const std::string first = failure_of_copy(ctx, ids.data()), second = failure_of_copy(ctx, ids.data());
    std::string third;
    try {
      ctx.backend->alloc(Dtype::f32, {1});
    } catch (const Error& e) {
      third = e.what();
    }
    const auto tells = [](const std::string& s) { return s.find("illegal memory access") != std::string::npos; };
    std::fprintf(stderr, "first: %s\n", first.c_str());
    std::_Exit(tells(first) && tells(second) && tells(third) ? 0 : 1);
  };
  EXPECT_EXIT(child(), testing::ExitedWithCode(0), "first: CUDA: .*illegal memory access.*every later call");
}

TEST(CudaEmbedding, GathersRowsOfEveryType) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const Dtype d : {Dtype::f32, Dtype::bf16, Dtype::f16})
    for (const int64_t D : {1, 3, 4, 8, 20, 2560})
      for (const int64_t T : {0, 1, 2, 65}) {
        const int64_t vocabulary = 50;
        TypedBuffer table(ctx, d, values(cat("table", D), vocabulary * D)), y(ctx, Dtype::f32, T * D);
        std::vector<int32_t> ids;
        for (int64_t t = 0; t < T; ++t) ids.push_back(int32_t((t * 37 + 49) % vocabulary));
        const DeviceArray<int32_t> on(ctx, ids);
        embedding(ctx, {.table = table.view({vocabulary, D}), .ids = on.view(), .y = y.view({T, D})});
        const auto rows = table.fetch();
        std::vector<float> want;
        for (const int32_t id : ids) want.insert(want.end(), rows.begin() + id * D, rows.begin() + (id + 1) * D);
        EXPECT_EQ(y.fetch(), want) << name_of(d) << " " << T << "x" << D;
        EXPECT_TRUE(y.guards_intact());
      }
}

TEST(CudaBackend, ComparisonsCanFail) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  TypedBuffer a(ctx, Dtype::bf16, std::vector<float>{1, 2, 3});
  EXPECT_EQ(a.fetch(), (std::vector<float>{1, 2, 3}));
  const bf16 bad(5.0f);
  ctx.backend->copy(ctx, static_cast<bf16*>(a.view({3}).data) + 3, &bad, 2);
  EXPECT_FALSE(a.guards_intact());
}

}  // namespace
}  // namespace kda::test
