// kda_prefill on CUDA: time and share of the device's own copy rate, at the sizes that peers were measured at. Every
// size is checked against the recurrence in double (a few heads of a few hundred tokens) before anything is timed.
//   cuda_kda_prefill_bench [heads=20]
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

#include "bench/kernels/cuda_device.h"
#include "kernels/kda.h"
#include "kernels/probe.h"
#include "tests/ref/kda.h"

#ifndef KDA_COMMIT
#define KDA_COMMIT "unknown"
#endif

using namespace kda;
using namespace kda::bench;

namespace {

struct Problem {
  int64_t N, each, H, K, V, T = N * each;
  CudaContext& ctx;
  std::vector<int32_t> start;
  Tensor q, k, v, f, b, A_log, dt_bias, state, o, starts, in, out;

  Tensor integers(const std::vector<int32_t>& x) {
    Tensor t = ctx.backend->alloc(Dtype::i32, {int64_t(x.size())});
    ctx.backend->copy(ctx, t.v.data, x.data(), x.size() * 4);
    return t;
  }
  Problem(CudaContext& c, int64_t N_, int64_t each_, int64_t H_, int64_t K_ = 128, int64_t V_ = 128)
      : N(N_), each(each_), H(H_), K(K_), V(V_), ctx(c) {
    // uniform values of variance 1; A_log = log U(1,16) as models begin
    const auto values = [&](Shape s) { return random_tensor(ctx, Dtype::bf16, s, 1.732f); };
    q = values({T, H, K}), k = values({T, H, K}), v = values({T, H, V}), f = values({T, H, K}), b = values({T, H});
    std::vector<float> A(size_t(H), 0.0f);
    for (int64_t h = 0; h < H; ++h) A[size_t(h)] = std::log(1.0f + 15.0f * float(h) / float(H));
    A_log = ctx.backend->alloc(Dtype::f32, {H}), dt_bias = ctx.backend->alloc(Dtype::f32, {H * K});
    ctx.backend->copy(ctx, A_log.v.data, A.data(), A.size() * 4);
    state = ctx.backend->alloc(Dtype::f32, {N, H, V, K}), o = ctx.backend->alloc(Dtype::bf16, {T, H, V});
    std::vector<int32_t> none, slot;
    for (int64_t n = 0; n <= N; ++n) start.push_back(int32_t(n * each));
    for (int64_t n = 0; n < N; ++n) none.push_back(-1), slot.push_back(int32_t(n));
    starts = integers(start), in = integers(none), out = integers(slot);
  }
  void run() {
    kda_prefill(ctx, {.q = q,
                      .k = k,
                      .v = v,
                      .f = f,
                      .b = b,
                      .A_log = A_log,
                      .dt_bias = dt_bias,
                      .gate = {},
                      .state = state,
                      .slots = {in.v.as<int32_t>(), out.v.as<int32_t>()},
                      .packing = {start, starts.v.as<int32_t>()},
                      .o = o});
  }
  std::vector<double> fetch(const Tensor& t, int64_t rows) {
    std::vector<bf16> x(size_t(rows * t.v.size() / T));
    ctx.backend->copy(ctx, x.data(), t.v.data, x.size() * 2);
    std::vector<double> y;
    for (const bf16 e : x) y.push_back(double(float(e)));
    return y;
  }
  // Of the first tokens of the first sequence, one head.
  double error(int64_t tokens, int64_t h) {
    run();
    std::vector<float> A(static_cast<size_t>(H));
    ctx.backend->copy(ctx, A.data(), A_log.v.data, A.size() * 4);
    const auto cut = [&](const std::vector<double>& x, int64_t D) { return ref::head(x, 0, tokens, H, h, D); };
    const auto q64 = ref::unit_rows(cut(fetch(q, tokens), K), K), k64 = ref::unit_rows(cut(fetch(k, tokens), K), K);
    const std::vector<double> a{double(A[size_t(h)])}, zero(size_t(K), 0.0);
    const auto g = ref::log_decay(cut(fetch(f, tokens), K), a, zero, 1, K, 0);
    std::vector<double> S(size_t(V * K));
    const auto want =
        ref::recurrence(q64, k64, cut(fetch(v, tokens), V), g, ref::beta(cut(fetch(b, tokens), 1), 1), S, K, V);
    const auto got = cut(fetch(o, tokens), V);
    double e = 0, n = 0;
    for (size_t i = 0; i < want.size(); ++i) e += (got[i] - want[i]) * (got[i] - want[i]), n += want[i] * want[i];
    return std::sqrt(e / n);
  }
};

}  // namespace

int main(int argc, char** argv) try {
  if (const std::string why = no_cuda(); !why.empty()) {
    std::cerr << "nothing measured: " << why << "\n";
    return 0;
  }
  const int64_t H = argc > 1 ? std::atoll(argv[1]) : 20;
  CudaContext ctx(0);
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(kda_prefill_workspace_bytes(ctx, 4 * 8192, 8, H, 128, 128))});
  const double copy = probe_device_copy(ctx);
  for (const auto& [N, each] : {std::pair<int64_t, int64_t>{1, 8192}, {4, 8192}, {1, 32768}, {1, 2048}, {8, 512}}) {
    Problem p(ctx, N, each, H);
    const double error = std::max(p.error(300, 0), p.error(300, H - 1));
    if (!(error < 3.8e-3)) {
      std::cerr << "wrong: relative error of o " << error << "\n";
      return 1;
    }
    const Times t = time_on_device(ctx, 0.3, [&] { p.run(); });
    // q, k, v and f read, o written
    const double bytes = double(p.T) * double(H) * double(3 * p.K + 2 * p.V) * 2, limit_ms = bytes / copy * 1e3;
    std::cout << nlohmann::ordered_json{{"op", "kda_prefill"},
                                        {"device", device_status(ctx).name},
                                        {"commit", KDA_COMMIT},
                                        {"gate", "softplus"},
                                        {"H", H},
                                        {"K", p.K},
                                        {"V", p.V},
                                        {"N", N},
                                        {"T_per_sequence", each},
                                        {"ms_p10", t.p10},
                                        {"ms_p50", t.p50},
                                        {"ms_p90", t.p90},
                                        {"limit", "device copy of q, k, v, f and o"},
                                        {"limit_bytes_per_s", copy},
                                        {"limit_ms", limit_ms},
                                        {"share", limit_ms / t.p50},
                                        {"error_o", error}}
              << std::endl;
  }
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
