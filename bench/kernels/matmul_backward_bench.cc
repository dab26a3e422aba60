// The three products of training (matmul, matmul_dx, matmul_dw) on the matrices of nano-teacher's KDA student, for
// 4 x 1024 tokens, against oneDNN on operands packed beforehand in the same run. One JSON line a measurement; `all`
// weighs the groups as one training step has them.
//   matmul_backward_bench [fast | exact]
#include "kernels/matmul_backward.h"

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "bench/kernels/device.h"
#include "kernels/matmul.h"
#include "kernels/probe.h"
#include "tests/check.h"
#include "tests/ref/matmul_backward.h"

namespace kda {
namespace {

struct Group {  // matrices that share their input
  const char* name;
  int64_t K;
  std::vector<int64_t> N;
  double count;  // in a training step
};
const std::vector<Group> kGroups = {{"qkvfgb", 256, {256, 256, 256, 64, 64, 4}, 8},
                                    {"f1", 64, {256}, 16},
                                    {"o", 256, {256}, 8},
                                    {"up", 256, {1024}, 8},
                                    {"down", 1024, {256}, 8},
                                    {"head", 256, {4096}, 1}};
constexpr int64_t kTokens = 4096;

double sum(const std::vector<int64_t>& v) {
  double s = 0;
  for (int64_t n : v) s += double(n);
  return s;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <class F>
double seconds(const F& f) {
  const auto from = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
}

Tensor drawn(const char* name, Dtype d, int64_t n) {
  const auto v = test::values(name, 1 << 18);
  Tensor t = host_tensor(d, {n});
  for (int64_t i = 0; i < n; ++i) {
    const float f = v[size_t((i * 7 + i / 100003) & ((1 << 18) - 1))];
    d == Dtype::bf16 ? void(t.v.as<bf16>()[i] = bf16(f)) : void(t.v.as<float>()[i] = f);
  }
  return t;
}

enum class Op { matmul, matmul_dx, matmul_dw };
const char* name(Op op) { return op == Op::matmul ? "matmul" : op == Op::matmul_dx ? "matmul_dx" : "matmul_dw"; }

class Bench {
 public:
  Bench(ThreadPool& pool, Precision p) : pool_(pool), precision_(p) {
    ctx_.backend = &cpu_backend();
    ctx_.pool = &pool;
    ctx_.precision = p;
    size_t bytes = 0;
    for (const Group& g : kGroups)
      for (int64_t n : g.N)
        bytes = std::max({bytes, matmul_workspace_bytes(ctx_, kTokens, g.K, n),
                          matmul_dx_workspace_bytes(ctx_, kTokens, g.K, n),
                          matmul_dw_workspace_bytes(ctx_, kTokens, g.K, n)});
    ctx_.workspace = host_tensor(Dtype::u8, {int64_t(bytes)});
    x_ = drawn("x", Dtype::f32, kTokens * 1024);
    y_ = drawn("y", Dtype::f32, kTokens * 4096);
    w_ = drawn("w", Dtype::bf16, 1 << 20);
    w32_ = drawn("w", Dtype::f32, 1 << 20);
    dw_ = host_tensor(Dtype::f32, {1 << 20});
  }

  void call(Op op, const Group& g, int64_t R) {
    std::vector<MatmulSegment> forward;
    std::vector<MatmulDxSegment> dx;
    std::vector<MatmulDwSegment> dw;
    int64_t at = 0, w_at = 0;
    for (int64_t n : g.N) {
      WeightView w{.w = precision_ == Precision::fast ? view(w_.v.as<bf16>() + w_at, {n, g.K})
                                                      : view(w32_.v.as<float>() + w_at, {n, g.K}),
                   .scale = {}};
      const View y = view(y_.v.as<float>() + at, {R, n});
      forward.push_back({.w = w, .y = y});
      dx.push_back({.w = w, .dy = y});
      dw.push_back({.dy = y, .dw = view(dw_.v.as<float>() + w_at, {n, g.K})});
      at += R * n, w_at += n * g.K;
    }
    const View x = view(x_.v.as<float>(), {R, g.K});
    if (op == Op::matmul) matmul(ctx_, {.x = x, .segments = forward});
    if (op == Op::matmul_dx) matmul_dx(ctx_, {.segments = dx, .dx = x});
    if (op == Op::matmul_dw) matmul_dw(ctx_, {.x = x, .segments = dw});
  }

  // One product of each kind against double; nothing is timed when it is wrong.
  bool right() {
    const Group g{"", 64, {96}, 1};
    const int64_t R = 40;
    const auto wide = [](const float* p, int64_t n) { return std::vector<double>(p, p + n); };
    std::vector<double> w;
    for (int64_t i = 0; i < 96 * 64; ++i)
      w.push_back(precision_ == Precision::fast ? double(float(w_.v.as<bf16>()[i])) : double(w32_.v.as<float>()[i]));
    const double tolerance = precision_ == Precision::fast ? 1.0 / 128 : 1e-5;
    const auto check = [&](const float* got, const ref::Product& want) {
      const auto result = test::close(std::vector<float>(got, got + want.y.size()), want.y, tolerance,
                                      *std::max_element(want.terms.begin(), want.terms.end()));
      if (!result) std::fprintf(stderr, "wrong result: %s\n", result.message());
      return bool(result);
    };
    const auto y = wide(y_.v.as<float>(), R * 96), x = wide(x_.v.as<float>(), R * 64);
    std::fill_n(dw_.v.as<float>(), 96 * 64, 0.0f);
    call(Op::matmul_dw, g, R);
    if (!check(dw_.v.as<float>(), ref::matmul_dw(y, x, R, 96, 64))) return false;
    call(Op::matmul, g, R);
    if (!check(y_.v.as<float>(), ref::matmul(x, w, R, 96, 64))) return false;
    const auto now = wide(y_.v.as<float>(), R * 96);
    call(Op::matmul_dx, g, R);
    return check(x_.v.as<float>(), ref::matmul_dx(now, w, R, 96, 64));
  }

  void run(Op op) {
    double all = 0, all_limit = 0, all_flops = 0;
    for (const Group& g : kGroups) {
      std::vector<GemmProbe> probes;
      if (op == Op::matmul)
        for (int64_t n : g.N) probes.emplace_back(pool_, kTokens, GemmShape{n, g.K, 1}, precision_);
      else if (op == Op::matmul_dx)
        probes.emplace_back(pool_, kTokens, GemmShape{g.K, int64_t(sum(g.N)), 1}, precision_);
      else
        for (int64_t n : g.N) probes.emplace_back(pool_, n, GemmShape{g.K, kTokens, 1}, precision_);
      std::vector<double> t, limit;
      call(op, g, kTokens);
      for (int i = 0; i < 15; ++i) {  // side by side: the machine may not be ours
        t.push_back(seconds([&] { call(op, g, kTokens); }));
        limit.push_back(0);
        for (GemmProbe& p : probes) limit.back() += p.seconds();
      }
      const double flops = 2 * double(kTokens) * double(g.K) * sum(g.N);
      print(op, g.name, flops, median(t), median(limit));
      all += g.count * median(t), all_limit += g.count * median(limit), all_flops += g.count * flops;
    }
    print(op, "all", all_flops, all, all_limit);
  }

  void print(Op op, const char* group, double flops, double t, double limit) {
    nlohmann::ordered_json line = bench::head(pool_.threads());
    line["op"] = name(op);
    line["matrices"] = group;
    line["precision"] = precision_ == Precision::fast ? "fast" : "exact";
    line["R"] = kTokens;
    line["ms_p50"] = t * 1e3;
    line["gflops"] = flops / t / 1e9;
    line["limit_gflops"] = flops / limit / 1e9;
    line["share"] = limit / t;
    std::puts(line.dump().c_str());
    std::fflush(stdout);
  }

 private:
  ThreadPool& pool_;
  Precision precision_;
  Context ctx_;
  Tensor x_, y_, w_, w32_, dw_;
};

}  // namespace
}  // namespace kda

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  kda::ThreadPool pool;
  for (const kda::Precision p : {kda::Precision::fast, kda::Precision::exact}) {
    if (!only.empty() && (only == "fast") != (p == kda::Precision::fast)) continue;
    kda::Bench bench(pool, p);
    if (!bench.right()) return 1;
    for (const kda::Op op : {kda::Op::matmul, kda::Op::matmul_dx, kda::Op::matmul_dw}) bench.run(op);
  }
}
