// bench/kernels/kda_bench.cc — the KDA ops on the CPU at the 5 B model's size, one JSON object a line.
//
// `limit` is what the line is measured against, probed in this run on as many threads: for kda_forward the fp32 rate of
// multiply-adds on registers, where only the 6 H K V flops a token that must meet the state count as work; for the rest
// the speed of copying memory larger than any cache (bytes read + written), where what lies in a cache may beat it.
// A result off its reference by more than the tests allow is not timed: the program ends with status 1.
//
//   kda_bench [THREADS [SECONDS]]      0 threads or nothing: one per core; seconds for each line, 1 unless given
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "bench/kernels/device.h"
#include "bench/kernels/probe.h"
#include "kernels/conv.h"
#include "kernels/kda_decode.h"
#include "kernels/kda_prep.h"
#include "tests/kernels/kda_problem.h"

using namespace kda;
using namespace kda::test;

namespace {

double budget = 1;

std::vector<double> time_ms(const std::function<void()>& f) { return bench::time_ms(budget, f); }

constexpr int64_t H = 20, K = 128, V = 128;
double copy_speed, flop_speed;  // per second
int threads;

// `work` flops or bytes a run.
void line(const char* op, int64_t N, int64_t T, const std::vector<double>& ms, bool flops, double work) {
  const auto at = [&](double q) { return ms[size_t(q * double(ms.size() - 1))]; };
  const double rate = work / at(.5) / 1e6, limit = (flops ? flop_speed : copy_speed) / 1e9;
  nlohmann::ordered_json l = bench::head(threads);
  l["op"] = op;
  l["H"] = H, l["K"] = K, l["V"] = V, l["N"] = N, l["T_per_sequence"] = T;
  l["ms_p10"] = at(.1), l["ms_p50"] = at(.5), l["ms_p90"] = at(.9), l["us_per_token"] = at(.5) * 1e3 / double(N * T);
  l[flops ? "gflops" : "gb_per_s"] = rate, l["limit"] = limit, l["share"] = rate / limit;
  std::puts(l.dump().c_str());
  std::fflush(stdout);
}

void need(bool good, const char* op) {
  if (good) return;
  std::fprintf(stderr, "kda_bench: %s gives a wrong result, not timed\n", op);
  std::exit(1);
}

void bench_forward(Context& ctx, int64_t N, int64_t T) {
  const std::vector<int64_t> lengths(size_t(N), T);
  {
    KdaProblem p("bench", {130}, 2, K, V);
    const auto [o, S] = reference(p);
    const auto got = run_forward(ctx, p);
    need(relative_l2(got.o, o) <= kKdaTolerance && relative_l2(got.state, S) <= kKdaTolerance, "kda_forward");
  }
  const KdaProblem p("bench", lengths, H, K, V);
  const int64_t all = N * T;
  Buffer q(ctx, p.q), k(ctx, p.k), v(ctx, p.v), g(ctx, p.g), beta(ctx, p.beta), S(ctx, p.state), o(ctx, all * H * V);
  const auto ms = time_ms([&] {
    kda_forward(
        ctx, {q.view({all, H, K}), k.view({all, H, K}), v.view({all, H, V}), g.view({all, H, K}), beta.view({all, H}),
              S.view({N, H, V, K}), p.pack.slots(), p.pack.packing(), o.view({all, H, V})});
  });
  line("kda_forward", N, T, ms, true, 6.0 * double(all * H * K * V));
}

void bench_around(Context& ctx, int64_t T) {
  const int64_t C = H * K;
  const Pack pack({T});
  Buffer w(ctx, values("w", C * 4)), window(ctx, values("window", 9 * C));
  std::vector<Buffer> x, y;  // q, k and v, as wide as each other
  for (int i = 0; i < 3; ++i) {
    x.emplace_back(ctx, values(cat("x", i), T * C));
    y.emplace_back(ctx, T * C);
  }
  const auto conv = [&] {
    for (size_t i = 0; i < 3; ++i)
      conv_silu(ctx, {x[i].view({T, C}), w.view({C, 4}), window.view({1, 3, 3 * C}), int64_t(i) * C, pack.slots(),
                      pack.packing(), y[i].view({T, C})});
  };
  const auto all = doubles(window.fetch());
  Doubles before;
  for (int64_t j = 0; j < 3; ++j) before.insert(before.end(), all.begin() + j * 3 * C, all.begin() + j * 3 * C + C);
  conv();
  need(close(y[0].fetch(), ref::conv_silu(doubles(x[0].fetch()), doubles(w.fetch()), before, T, C).y, 1e-6, 4),
       "conv_silu");
  line("conv_silu_qkv", 1, T, time_ms(conv), false, 3 * 8.0 * double(T * C));

  const int64_t n = T * H * K;
  Buffer q(ctx, values("q", n)), k(ctx, values("k", n)), f(ctx, values("f", n, 4)), b(ctx, values("b", T * H, 4)),
      A(ctx, values("A", H)), bias(ctx, values("bias", H * K, 3)), g(ctx, n), beta(ctx, T * H);
  const KdaPrep prep{
      q.view({T, H, K}), k.view({T, H, K}), f.view({T, H, K}), b.view({T, H}), A.view({H}), bias.view({H * K}), {},
      g.view({T, H, K}), beta.view({T, H})};
  const auto qs = doubles(q.fetch());
  kda_prep(ctx, prep);
  need(close(q.fetch(), ref::unit_rows(qs, K), 2e-6, 1) &&
           relative_l2(g.fetch(),
                       ref::log_decay(doubles(f.fetch()), doubles(A.fetch()), doubles(bias.fetch()), H, K, 0)) < 1e-6,
       "kda_prep");
  line("kda_prep", 1, T, time_ms([&] { kda_prep(ctx, prep); }), false, 4.0 * 6 * double(n));

  const int64_t m = T * H * V;
  Buffer o(ctx, values("o", m)), gate(ctx, values("gate", m, 4)), gb(ctx, values("gb", H * V)),
      on(ctx, values("on", V)), out(ctx, m);
  const KdaOutput output{o.view({T, H, V}), gate.view({T, H, V}), gb.view({H * V}),
                         on.view({V}),      out.view({T, H, V}),  1e-5f};
  kda_output(ctx, output);
  need(relative_l2(out.fetch(), ref::gated_norm(doubles(o.fetch()), doubles(gate.fetch()), doubles(gb.fetch()),
                                                doubles(on.fetch()), 1e-5f, H, V)) < 1e-6,
       "kda_output");
  line("kda_output", 1, T, time_ms([&] { kda_output(ctx, output); }), false, 4.0 * 3 * double(m));
}

// One step of N sequences. `layers` pools are gone through in turn: with one, the state stays in the cache.
void bench_decode(Context& ctx, int64_t N, int64_t layers) {
  const int64_t HK = H * K, HV = H * V, C = 2 * HK + HV;
  const Pack pack(std::vector<int64_t>(size_t(N), 1));
  Buffer q(ctx, values("q", N * HK)), k(ctx, values("k", N * HK)), v(ctx, values("v", N * HV)),
      f(ctx, values("f", N * HK)), b(ctx, values("b", N * H)), g(ctx, values("g", N * HV)),
      qc(ctx, values("qc", HK * 4)), kc(ctx, values("kc", HK * 4)), vc(ctx, values("vc", HV * 4)),
      A(ctx, values("A", H)), bias(ctx, values("bias", HK)), gb(ctx, values("gb", HV)), on(ctx, values("on", V)),
      y(ctx, N * HV), y2(ctx, N * HV);
  std::vector<Buffer> S, window;
  for (int64_t l = 0; l < layers; ++l) {
    S.emplace_back(ctx, values("S", N * HV * K, 0.3f));
    window.emplace_back(ctx, values("window", N * 3 * C));
  }
  KdaDecode a{.q = q.view({N, HK}),
              .k = k.view({N, HK}),
              .v = v.view({N, HV}),
              .f = f.view({N, HK}),
              .b = b.view({N, H}),
              .g = g.view({N, HV}),
              .q_conv = qc.view({HK, 4}),
              .k_conv = kc.view({HK, 4}),
              .v_conv = vc.view({HV, 4}),
              .A_log = A.view({H}),
              .dt_bias = bias.view({HK}),
              .g_bias = gb.view({HV}),
              .o_norm = on.view({V}),
              .gate = {},
              .eps = 1e-5f,
              .window = window[0].view({N, 3, C}),
              .state = S[0].view({N, H, V, K}),
              .slots = pack.slots(),
              .y = y.view({N, HV})};
  {  // against the parts, which the tests hold to the references
    Buffer S1(ctx, S[0].fetch()), w1(ctx, window[0].fetch()), qo(ctx, N * HK), ko(ctx, N * HK), vo(ctx, N * HV),
        go(ctx, N * HK), bo(ctx, N * H);
    const auto conv = [&](const Buffer& x, const Buffer& w, const Buffer& to, int64_t first, int64_t n) {
      conv_silu(ctx, {x.view({N, n}), w.view({n, 4}), w1.view({N, 3, C}), first, pack.slots(), pack.packing(),
                      to.view({N, n})});
    };
    conv(q, qc, qo, 0, HK), conv(k, kc, ko, HK, HK), conv(v, vc, vo, 2 * HK, HV);
    kda_prep(ctx, {qo.view({N, H, K}),
                   ko.view({N, H, K}),
                   f.view({N, H, K}),
                   b.view({N, H}),
                   A.view({H}),
                   bias.view({HK}),
                   {},
                   go.view({N, H, K}),
                   bo.view({N, H})});
    kda_forward(ctx, {qo.view({N, H, K}), ko.view({N, H, K}), vo.view({N, H, V}), go.view({N, H, K}), bo.view({N, H}),
                      S1.view({N, H, V, K}), pack.slots(), pack.packing(), y2.view({N, H, V})});
    kda_output(ctx, {y2.view({N, H, V}), g.view({N, H, V}), gb.view({HV}), on.view({V}), y2.view({N, H, V}), 1e-5f});
    kda_decode(ctx, a);
    need(relative_l2(y.fetch(), y2.fetch()) < 2e-6 && relative_l2(S[0].fetch(), S1.fetch()) < 1e-6, "kda_decode");
  }
  size_t next = 0;
  const auto ms = time_ms([&] {
    next = (next + 1) % S.size();
    a.state = S[next].view({N, H, V, K}), a.window = window[next].view({N, 3, C});
    kda_decode(ctx, a);
  });
  line(layers == 1 ? "kda_decode_cached" : "kda_decode", N, 1, ms, false, 8.0 * double(N * HV * K));
}

}  // namespace

int main(int argc, char** argv) {
  threads = ThreadPool(argc > 1 ? std::atoi(argv[1]) : 0).threads();
  if (argc > 2) budget = std::atof(argv[2]);
  CpuContext ctx(threads);
  flop_speed = bench::probe_flops(ctx);
  copy_speed = bench::probe_copy(ctx);
  for (const auto& [N, T] : {std::pair<int64_t, int64_t>{1, 16}, {1, 512}, {1, 2048}, {4, 512}})
    bench_forward(ctx, N, T);
  bench_around(ctx, 512);
  for (const int64_t N : {1, 4}) bench_decode(ctx, N, 36);
  bench_decode(ctx, 1, 1);
}
