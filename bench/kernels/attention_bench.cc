// bench/kernels/attention_bench.cc — attention over a prompt, and of one token over a long past. One JSON object a
// line.
//
//   attention_bench [THREADS]      0 or nothing: one per core
//
// `limit` is what the line is measured against: for prompts the fp32 rate of fused multiply-adds on registers, for
// single tokens the speed of reading memory in order, both probed in this run on as many threads.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "bench/kernels/device.h"
#include "bench/kernels/probe.h"
#include "kernels/attention.h"
#include "kernels/probe.h"
#include "tests/check.h"
#include "tests/ref/attention.h"

namespace {

using namespace kda;

double seconds(const std::function<void()>& f) {
  const auto t0 = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

struct Quantiles {
  double p10, p50, p90;
};
Quantiles quantiles(int n, const std::function<void()>& f) {
  f();
  std::vector<double> t;
  for (int i = 0; i < n; ++i) t.push_back(seconds(f));
  std::sort(t.begin(), t.end());
  return {t[t.size() / 10], t[t.size() / 2], t[t.size() * 9 / 10]};
}

struct Problem {
  const char* model;
  int64_t H, G, d, past, T;
};

class Case {
 public:
  Case(Context& ctx, const Problem& p)
      : ctx_(ctx),
        p_(p),
        past_{int32_t(p.past)},
        start_{0, int32_t(p.T)},
        q_(ctx, test::values("q", p.T * p.H * p.d)),
        k_(ctx, test::values("k", p.T * p.G * p.d)),
        v_(ctx, test::values("v", p.T * p.G * p.d)),
        o_(ctx, p.T * p.H * p.d),
        k_cache_(ctx, test::values("k cache", (p.past + p.T) * p.G * p.d)),
        v_cache_(ctx, test::values("v cache", (p.past + p.T) * p.G * p.d)) {}

  void run() {
    const Problem& p = p_;
    const Shape cache{1, p.past + p.T, p.G, p.d};
    attention(ctx_, {.q = q_.view({p.T, p.H, p.d}),
                     .k = k_.view({p.T, p.G, p.d}),
                     .v = v_.view({p.T, p.G, p.d}),
                     .k_cache = k_cache_.view(cache),
                     .v_cache = v_cache_.view(cache),
                     .slot = &slot_,
                     .past = &past_,
                     .packing = {.host_start = start_, .start = start_.data()},
                     .o = o_.view({p.T, p.H, p.d})});
  }

  // The last token against the reference.
  bool right() {
    run();
    const Problem& p = p_;
    const int64_t L = p.past + p.T;
    const auto k = k_cache_.fetch(), v = v_cache_.fetch(), q = q_.fetch(), o = o_.fetch();
    std::vector<double> wide_q(size_t(L * p.H * p.d));
    std::copy(q.end() - p.H * p.d, q.end(), wide_q.end() - p.H * p.d);
    const auto want =
        ref::attention(wide_q, std::vector<double>(k.begin(), k.end()), std::vector<double>(v.begin(), v.end()),
                       size_t(p.H), size_t(p.G), size_t(p.d), size_t(L - 1));
    return test::relative_max(std::vector<float>(o.end() - p.H * p.d, o.end()), want) < 1e-5;
  }

 private:
  Context& ctx_;
  Problem p_;
  int32_t slot_ = 0, past_;
  std::vector<int32_t> start_;
  test::Buffer q_, k_, v_, o_, k_cache_, v_cache_;
};

}  // namespace

int main(int argc, char** argv) {
  ThreadPool pool(argc > 1 ? std::atoi(argv[1]) : 0);
  Context ctx;
  ctx.backend = &cpu_backend();
  ctx.pool = &pool;
  const double flops = bench::probe_flops(ctx) / 1e9, dram = probe_dram_read_bytes_per_s(pool) / 1e9;
  for (const Problem& p : {Problem{"nano-teacher", 4, 2, 64, 0, 2048},
                           {"afm-4.5b-base", 20, 4, 128, 0, 512},
                           {"afm-4.5b-base", 20, 4, 128, 0, 2048},
                           {"afm-4.5b-base", 20, 4, 128, 1536, 512},
                           {"nano-teacher", 4, 2, 64, 2047, 1},
                           {"afm-4.5b-base", 20, 4, 128, 2047, 1},
                           {"afm-4.5b-base", 20, 4, 128, 32767, 1}}) {
    ctx.workspace = host_tensor(Dtype::u8, {int64_t(attention_workspace_bytes(ctx, p.T, p.H, p.d, p.past + p.T))});
    Case c(ctx, p);
    if (!c.right()) {
      std::fprintf(stderr, "attention: wrong result for %s, past %ld, T %ld\n", p.model, long(p.past), long(p.T));
      return 1;
    }
    const Quantiles t = quantiles(p.T > 1000 ? 11 : 31, [&] { c.run(); });
    const bool prompt = p.T > 1;
    const double pairs = double(p.T) * double(p.past) + double(p.T) * double(p.T + 1) / 2;
    const double rate = prompt ? 4 * pairs * double(p.H * p.d) / t.p50 / 1e9
                               : 2.0 * double((p.past + p.T) * p.G * p.d) * 4 / t.p50 / 1e9;
    nlohmann::ordered_json line = bench::head(pool.threads());
    line["op"] = "attention";
    line["model"] = p.model;
    line["H"] = p.H, line["G"] = p.G, line["d"] = p.d, line["past"] = p.past, line["T_per_sequence"] = p.T;
    line["ms_p10"] = t.p10 * 1e3, line["ms_p50"] = t.p50 * 1e3, line["ms_p90"] = t.p90 * 1e3;
    line[prompt ? "gflops" : "gb_per_s"] = rate;
    line["limit"] = prompt ? flops : dram;
    line["share"] = rate / (prompt ? flops : dram);
    std::puts(line.dump().c_str());
    std::fflush(stdout);
  }
}
