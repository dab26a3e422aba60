// matmul and matvec on the matrices of a 5B KDA model (width 2560, 20 heads of 128, MLP 18432), against what the same
// machine reaches in the same run: oneDNN with weights packed beforehand, and reading DRAM. One JSON line a
// measurement. Weights are taken from a buffer far larger than the caches, so they come from memory as in a model.
//   matmul_bench [matmul [ROWS] | matvec [FOLDER]]     FOLDER: matvec also reads weights mapped from a file made there
#include "kernels/matmul.h"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "bench/kernels/device.h"
#include "kernels/probe.h"
#include "tests/check.h"
#include "tests/ref/matmul.h"

namespace kda {
namespace {

struct Group {  // matrices that share their input
  const char* name;
  int64_t K;
  std::vector<int64_t> N;
};
const std::vector<Group> kLayer = {{"qkvfgb", 2560, {2560, 2560, 2560, 128, 128, 20}},
                                   {"f1", 128, {2560}},
                                   {"g1", 128, {2560}},
                                   {"o", 2560, {2560}},
                                   {"up", 2560, {18432}},
                                   {"down", 18432, {2560}}};

int64_t weights(const Group& g) {
  int64_t n = 0;
  for (int64_t N : g.N) n += N * g.K;
  return n;
}

// Random weights, read round and round.
class Source {
 public:
  Source(Dtype d, const void* data, int64_t elements) : d_(d), data_(static_cast<const char*>(data)), n_(elements) {}
  WeightView take(int64_t N, int64_t K, const Tensor& scale) {
    if (at_ + N * K > n_) at_ = 0;
    WeightView w{.w = {data_ + at_ * int64_t(size_of(d_)), d_, {N, K}}, .scale = {}};
    if (d_ == Dtype::i8) w.scale = {scale.v.data, Dtype::f32, {N}};
    at_ += N * K;
    return w;
  }

 private:
  Dtype d_;
  const char* data_;
  int64_t n_, at_ = 0;
};

struct Times {
  double p10, p50, p90;
};
Times percentiles(std::vector<double> ms) {
  std::sort(ms.begin(), ms.end());
  const auto at = [&](double q) { return ms[size_t(q * double(ms.size() - 1) + 0.5)]; };
  return {at(0.1), at(0.5), at(0.9)};
}

void print(nlohmann::ordered_json line, const Times& t, double limit, double share) {
  line["ms_p10"] = t.p10;
  line["ms_p50"] = t.p50;
  line["ms_p90"] = t.p90;
  line["limit"] = limit;
  line["share"] = share;
  std::puts(line.dump().c_str());
  std::fflush(stdout);
}

using Call = void (*)(Context&, const Matmul&);

double time_ms(Context& ctx, Call call, const Group& g, Source& source, const Tensor& scale, const Tensor& x,
               const Tensor& y, int64_t rows) {
  std::vector<MatmulSegment> s;
  float* to = y.v.as<float>();
  for (int64_t N : g.N) {
    s.push_back({.w = source.take(N, g.K, scale), .y = view(to, {rows, N})});
    to += rows * N;
  }
  const auto from = std::chrono::steady_clock::now();
  call(ctx, {.x = {x.v.data, Dtype::f32, {rows, g.K}}, .segments = s});
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - from).count();
}

// The result of one small product against double; nothing is timed when it is wrong.
bool right(Context& ctx, Call call, Dtype d, const Tensor& data, const Tensor& scale, double tolerance) {
  const int64_t R = 5, N = 100, K = 2560;
  const auto xs = test::values("bench/x", R * K);
  test::Buffer x(ctx, xs), y(ctx, R * N);
  Source source(d, data.v.data, N * K);
  const MatmulSegment s{.w = source.take(N, K, scale), .y = y.view({R, N})};
  call(ctx, {.x = x.view({R, K}), .segments = {&s, 1}});
  std::vector<double> w;
  for (int64_t i = 0; i < N * K; ++i)
    w.push_back(d == Dtype::i8 ? double(data.v.as<int8_t>()[i]) * double(scale.v.as<float>()[i / K])
                               : double(float(data.v.as<bf16>()[i])));
  const auto want = ref::matmul({xs.begin(), xs.end()}, w, R, N, K);
  const auto result =
      test::close(y.fetch(), want.y, tolerance, *std::max_element(want.terms.begin(), want.terms.end()));
  if (!result) std::fprintf(stderr, "wrong result: %s\n", result.message());
  return bool(result);
}

Tensor random_weights(Dtype d, int64_t n) {
  const auto v = test::values("bench/w", 1 << 20);
  Tensor t = host_tensor(d, {n});
  for (int64_t i = 0; i < n; ++i) {
    const float f = v[size_t((i * 7 + i / 1000003) & ((1 << 20) - 1))];
    if (d == Dtype::i8)
      t.v.as<int8_t>()[i] = int8_t(f * 127);
    else
      t.v.as<bf16>()[i] = bf16(f);
  }
  return t;
}

bool bench_matmul(ThreadPool& pool, const nlohmann::ordered_json& head, int64_t only_rows) {
  Context ctx;
  ctx.backend = &cpu_backend();
  ctx.pool = &pool;
  ctx.workspace = host_tensor(Dtype::u8, {int64_t(matmul_workspace_bytes(ctx, 2048, 18432, 18432))});
  const Tensor w = random_weights(Dtype::bf16, int64_t(160) << 20), scale = host_tensor(Dtype::f32, {18432});
  if (!right(ctx, matmul, Dtype::bf16, w, scale, 1.0 / 128)) return false;
  const Tensor x = host_tensor(Dtype::f32, {2048 * 18432}), y = host_tensor(Dtype::f32, {2048 * 18432});
  const auto v = test::values("bench/x", 1 << 20);
  for (int64_t i = 0; i < x.v.size(); ++i) x.v.as<float>()[i] = v[size_t(i & ((1 << 20) - 1))];
  for (int64_t rows : {int64_t(16), int64_t(512), int64_t(2048)}) {
    if (only_rows && rows != only_rows) continue;
    Times whole{};
    double whole_limit_ms = 0;
    for (const Group& g : kLayer) {
      std::vector<GemmProbe> probes;
      for (int64_t N : g.N) probes.emplace_back(pool, rows, GemmShape{N, g.K, 1});
      Source source(Dtype::bf16, w.v.data, w.v.size());
      std::vector<double> ms, limit_ms;
      for (int i = 0; i < (rows == 16 ? 21 : rows == 512 ? 9 : 5); ++i) {  // side by side: the machine may not be ours
        ms.push_back(time_ms(ctx, matmul, g, source, scale, x, y, rows));
        limit_ms.push_back(0);
        for (GemmProbe& p : probes) limit_ms.back() += p.seconds() * 1e3;
      }
      const Times t = percentiles(ms), limit = percentiles(limit_ms);
      const double flops = 2.0 * double(rows) * double(weights(g));
      auto line = head;
      line.update({{"op", "matmul"},
                   {"matrices", g.name},
                   {"weights", "bf16"},
                   {"R", rows},
                   {"K", g.K},
                   {"N", g.N},
                   {"gflops", flops / t.p50 / 1e6},
                   {"limit_gflops", flops / limit.p50 / 1e6},
                   {"share_p10", limit.p10 / t.p10}});
      print(line, t, limit.p50, limit.p50 / t.p50);
      whole = {whole.p10 + t.p10, whole.p50 + t.p50, whole.p90 + t.p90};
      whole_limit_ms += limit.p50;
    }
    auto line = head;
    line.update({{"op", "matmul"}, {"matrices", "layer"}, {"weights", "bf16"}, {"R", rows}});
    print(line, whole, whole_limit_ms, whole_limit_ms / whole.p50);
  }
  return true;
}

bool bench_matvec(ThreadPool& pool, const nlohmann::ordered_json& head, const std::string& folder) {
  Context ctx;
  ctx.backend = &cpu_backend();
  ctx.pool = &pool;
  const Tensor x = host_tensor(Dtype::f32, {16 * 18432}), y = host_tensor(Dtype::f32, {16 * 32768});
  const auto v = test::values("bench/x", x.v.size());
  std::copy(v.begin(), v.end(), x.v.as<float>());
  Tensor scale = host_tensor(Dtype::f32, {18432});
  for (int64_t i = 0; i < scale.v.size(); ++i) scale.v.as<float>()[i] = 0.001f * float(1 + i % 7);
  for (Dtype d : {Dtype::bf16, Dtype::i8}) {
    const Tensor w = random_weights(d, (int64_t(1) << 30) / int64_t(size_of(d)));
    if (!right(ctx, matvec, d, w, scale, 1e-6)) return false;
    std::shared_ptr<const MappedFile> file;
    const auto path = std::filesystem::path(folder) / "matmul_bench.weights";
    if (!folder.empty()) {
      std::ofstream(path, std::ios::binary).write(static_cast<const char*>(w.v.data), std::streamsize(w.v.bytes()));
      file = MappedFile::open(path);
      std::filesystem::remove(path);
      int touched = 0;  // every page once: page faults are the first token's, not a token's
      for (size_t i = 0; i < file->size(); i += 4096) touched += int(file->data()[i]);
      if (touched == 0) std::fprintf(stderr, "all weights are zero\n");
    }
    DramProbe dram(pool);
    for (const bool mapped : {false, true})
      for (int64_t rows : {1, 4, 16}) {
        if (mapped && !file) continue;
        Source source(d, mapped ? static_cast<const void*>(file->data()) : w.v.data, w.v.size());
        std::vector<std::vector<double>> ms(kLayer.size() + 1);
        std::vector<double> limit, share;
        double bytes = 0;
        for (const Group& g : kLayer) bytes += double(weights(g)) * double(size_of(d));
        for (int pass = 0; pass < (rows > 4 ? 9 : 21); ++pass) {  // side by side: the machine may not be ours
          double all = 0;
          for (size_t i = 0; i < kLayer.size(); ++i) {
            ms[i].push_back(time_ms(ctx, matvec, kLayer[i], source, scale, x, y, rows));
            all += ms[i].back();
          }
          ms.back().push_back(all);
          limit.push_back(dram.bytes_per_s() / 1e9);
          share.push_back(bytes / all / 1e6 / limit.back());
        }
        const double most = percentiles(limit).p50, fastest = percentiles(limit).p90;
        for (size_t i = 0; i < ms.size(); ++i) {
          const bool whole = i == kLayer.size();
          const double size = whole ? bytes : double(weights(kLayer[i])) * double(size_of(d));
          const Times t = percentiles(ms[i]);
          auto line = head;
          line.update({{"op", "matvec"},
                       {"matrices", whole ? "layer" : kLayer[i].name},
                       {"weights", name_of(d)},
                       {"memory", mapped ? "mapped" : "own"},
                       {"R", rows},
                       {"GB_per_s", size / t.p50 / 1e6}});
          line["share_p10"] = size / t.p10 / 1e6 / fastest;  // both undisturbed, on a machine with other work
          if (whole) line["share_pairwise"] = percentiles(share).p50;
          print(line, t, most, size / t.p50 / 1e6 / most);
        }
      }
  }
  return true;
}

int run(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  ThreadPool pool;
  const nlohmann::ordered_json head = bench::head(pool.threads());
  if (what != "matvec" && !bench_matmul(pool, head, argc > 2 && what == "matmul" ? std::atoll(argv[2]) : 0)) return 1;
  if (what != "matmul" && !bench_matvec(pool, head, argc > 2 ? argv[2] : "")) return 1;
  return 0;
}

}  // namespace
}  // namespace kda

int main(int argc, char** argv) { return kda::run(argc, argv); }
