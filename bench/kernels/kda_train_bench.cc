// bench/kernels/kda_train_bench.cc — a KDA layer's ops of a training step on the CPU, one JSON object a line.
//
// `limit` is what the line is measured against, probed in this run on as many threads: for the recurrence the fp32 rate
// of multiply-adds on registers, where only the products that meet a state count as work (3 of 2 H K V flops a token
// forwards, 7 backwards); for the rest the speed of copying memory larger than any cache (bytes read + written).
// A result off its reference by more than the tests allow is not timed: the program ends with status 1.
//
//   kda_train_bench [THREADS [SECONDS [NAME]]]   0 threads or nothing: one per core; seconds for each line, 1 unless
//                                                given; only ops whose names begin with NAME
#include <cstdio>
#include <cstdlib>

#include "bench/kernels/device.h"
#include "bench/kernels/probe.h"
#include "kernels/conv_backward.h"
#include "tests/kernels/kda_gradient.h"

using namespace kda;
using namespace kda::test;

namespace {

double budget = 1, copy_speed, flop_speed;  // per second
int threads;
std::string only;

struct Size {
  int64_t H, K, V, N, T;  // T tokens in each of N sequences
};

void line(const std::string& op, const Size& s, bool flops, double work, const std::function<void()>& f) {
  if (op.rfind(only, 0) != 0) return;
  const auto ms = bench::time_ms(budget, f);
  const auto at = [&](double q) { return ms[size_t(q * double(ms.size() - 1))]; };
  const double rate = work / at(.5) / 1e6, limit = (flops ? flop_speed : copy_speed) / 1e9;
  nlohmann::ordered_json l = bench::head(threads);
  l["op"] = op;
  l["H"] = s.H, l["K"] = s.K, l["V"] = s.V, l["N"] = s.N, l["T_per_sequence"] = s.T;
  l["ms_p10"] = at(.1), l["ms_p50"] = at(.5), l["ms_p90"] = at(.9);
  l["us_per_token_and_head"] = at(.5) * 1e3 / double(s.N * s.T * s.H);
  l["us_per_token_and_head_p10"] = at(.1) * 1e3 / double(s.N * s.T * s.H);
  l[flops ? "gflops" : "gb_per_s"] = rate, l["limit"] = limit, l["share"] = rate / limit;
  std::puts(l.dump().c_str());
  std::fflush(stdout);
}

void need(bool good, const char* op) {
  if (good) return;
  std::fprintf(stderr, "kda_train_bench: %s gives a wrong result, not timed\n", op);
  std::exit(1);
}

void bench_recurrence(Context& ctx, const Size& s) {
  {
    const KdaProblem p("bench", {130, 17}, 2, s.K, s.V);
    const KdaCotangent c("bench", p);
    const auto got = run_backward(ctx, p, c.d_o, c.d_state);
    need(got.forward == run_forward(ctx, p), "kda_forward_keep");
    need(bool(gradients_follow(got.d, reference_backward(p, c.d_o, c.d_state))), "kda_backward");
  }
  const KdaProblem p("bench", std::vector<int64_t>(size_t(s.N), s.T), s.H, s.K, s.V);
  const KdaCotangent c("bench", p);
  const int64_t T = s.N * s.T, H = s.H, K = s.K, V = s.V, size = kda_kept_floats(ctx, p.pack.packing(), H, K, V);
  Buffer q(ctx, p.q), k(ctx, p.k), v(ctx, p.v), g(ctx, p.g), beta(ctx, p.beta), S(ctx, p.state), o(ctx, T * H * V);
  Buffer kept(ctx, size), d_o(ctx, c.d_o), d_last(ctx, c.d_state), dS(ctx, s.N * H * V * K);
  Buffer dq(ctx, T * H * K), dk(ctx, T * H * K), dv(ctx, T * H * V), dg(ctx, T * H * K), db(ctx, T * H);
  Pack pack = p.pack;
  std::fill(pack.out.begin(), pack.out.end(), -1);
  const Shape thk{T, H, K}, thv{T, H, V}, states{s.N, H, V, K};
  const KdaForward f{q.view(thk),    k.view(thk),  v.view(thv),    g.view(thk), beta.view({T, H}),
                     S.view(states), pack.slots(), pack.packing(), o.view(thv)};
  const KdaBackward b{q.view(thk),       k.view(thk),    v.view(thv),   g.view(thk),         beta.view({T, H}),
                      kept.view({size}), pack.packing(), d_o.view(thv), d_last.view(states), dq.view(thk),
                      dk.view(thk),      dv.view(thv),   dg.view(thk),  db.view({T, H}),     dS.view(states)};
  const double product = 2.0 * double(T * H * K * V);
  line("kda_forward", s, true, 3 * product, [&] { kda_forward(ctx, f); });
  line("kda_forward_keep", s, true, 3 * product, [&] { kda_forward_keep(ctx, {f, kept.view({size})}); });
  kda_forward_keep(ctx, {f, kept.view({size})});
  line("kda_backward", s, true, 7 * product, [&] { kda_backward(ctx, b); });
}

// Their tests hold them to the complex step at every size.
void bench_around(Context& ctx, const Size& s) {
  const int64_t T = s.N * s.T, H = s.H, K = s.K, V = s.V, C = 2 * H * K + H * V, n = T * H * K, m = T * H * V;
  const Pack pack(std::vector<int64_t>(size_t(s.N), s.T));
  Buffer x(ctx, values("x", T * C)), w(ctx, values("w", 4 * C)), dy(ctx, values("dy", T * C)), dx(ctx, T * C),
      dw(ctx, values("dw", 4 * C));
  line("conv_silu_backward", s, false, 12.0 * double(T * C), [&] {
    conv_silu_backward(
        ctx, {x.view({T, C}), w.view({C, 4}), pack.packing(), dy.view({T, C}), dx.view({T, C}), dw.view({C, 4})});
  });
  Buffer q(ctx, values("q", n)), k(ctx, values("k", n)), f(ctx, values("f", n, 4)), b(ctx, values("b", T * H, 4)),
      A(ctx, values("A", H)), bias(ctx, values("bias", H * K, 3)), dq(ctx, values("dq", n)), dk(ctx, values("dk", n)),
      df(ctx, values("df", n)), db(ctx, values("db", T * H)), dA(ctx, values("dA", H)),
      dbias(ctx, values("dbias", H * K));
  const Shape thk{T, H, K}, thv{T, H, V}, th{T, H};
  const KdaPrepBackward prep{q.view(thk),        k.view(thk),  f.view(thk),        b.view(th),   A.view({H}),
                             bias.view({H * K}), {},           dq.view(thk),       dk.view(thk), df.view(thk),
                             db.view(th),        dA.view({H}), dbias.view({H * K})};
  line("kda_prep_backward", s, false, 36.0 * double(n), [&] {  // what it changes in place shrinks: to zero at last
    kda_prep_backward(ctx, prep);
  });
  Buffer o(ctx, values("o", m)), gate(ctx, values("gate", m, 4)), gb(ctx, values("gb", H * V)),
      on(ctx, values("on", V)), dy2(ctx, values("dy2", m)), d_o(ctx, m), dg(ctx, m), dgb(ctx, values("dgb", H * V)),
      don(ctx, values("don", V));
  const KdaOutputBackward output{o.view(thv), gate.view(thv), gb.view({H * V}), on.view({V}),      dy2.view(thv),
                                 1e-5f,       d_o.view(thv),  dg.view(thv),     dgb.view({H * V}), don.view({V})};
  line("kda_output_backward", s, false, 20.0 * double(m), [&] { kda_output_backward(ctx, output); });
}

}  // namespace

int main(int argc, char** argv) {
  threads = ThreadPool(argc > 1 ? std::atoi(argv[1]) : 0).threads();
  if (argc > 2) budget = std::atof(argv[2]);
  if (argc > 3) only = argv[3];
  CpuContext ctx(threads);
  flop_speed = bench::probe_flops(ctx);
  copy_speed = bench::probe_copy(ctx);
  const Size nano{4, 64, 64, 4, 1024};
  bench_recurrence(ctx, nano);
  bench_around(ctx, nano);
  for (const Size& s : {Size{4, 64, 64, 1, 8192}, Size{20, 128, 128, 1, 512}}) bench_recurrence(ctx, s);
}
