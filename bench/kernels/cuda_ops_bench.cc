// The ops around KDA at a prompt's sizes on CUDA: products as a share of the largest product's rate, the rest as a
// share of a copy inside the device's memory. JSON lines; the tests check the results (tests/kernels/cuda_*).
//   cuda_ops_bench [tokens=8192] [width=2560] [mlp=18432]
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

#include "bench/kernels/cuda_device.h"
#include "kernels/conv.h"
#include "kernels/embedding.h"
#include "kernels/kda.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"

#ifndef KDA_COMMIT
#define KDA_COMMIT "unknown"
#endif

using namespace kda;
using namespace kda::bench;

int main(int argc, char** argv) try {
  if (const std::string why = no_cuda(); !why.empty()) {
    std::cerr << "nothing measured: " << why << "\n";
    return 0;
  }
  const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const int64_t T = number(1, 8192), D = number(2, 2560), F = number(3, 18432);
  const int64_t V = 128, H = D / V, rank = 128;
  CudaContext ctx(size_t(128) << 20);
  const double copy = probe_device_copy(ctx), gemm = probe_device_gemm(ctx);
  std::cout << nlohmann::ordered_json{{"op", "probe"},
                                      {"commit", KDA_COMMIT},
                                      {"copy_bytes_per_s", copy},
                                      {"gemm_flops", gemm}}
            << std::endl;
  double layer = 0;
  const auto report = [&](const std::string& op, double work, bool product, int per_layer,
                          const std::function<void()>& f) {
    const Times t = time_on_device(ctx, 0.15, f);
    const double limit_ms = work / (product ? gemm : copy) * 1e3;
    layer += per_layer * t.p50;
    std::cout << nlohmann::ordered_json{{"op", op},
                                        {"T", T},
                                        {"ms_p10", t.p10},
                                        {"ms_p50", t.p50},
                                        {"ms_p90", t.p90},
                                        {"limit_ms", limit_ms},
                                        {"share", limit_ms / t.p50},
                                        {"per_layer", per_layer}}
              << std::endl;
  };
  const auto act = [&](int64_t width) { return random_tensor(ctx, Dtype::bf16, {T, width}); };
  const auto vector = [&](int64_t n) { return random_tensor(ctx, Dtype::f32, {n}); };
  const double td = double(T) * double(D), tf = double(T) * double(F);

  const Tensor h = act(D), h2 = act(D), h3 = act(D), wide = act(F), low = act(rank), norm = vector(D);
  const Tensor x = random_tensor(ctx, Dtype::f32, {T, D});
  {
    const auto product = [&](const char* name, const Tensor& in, int64_t N, int per_layer, Dtype out = Dtype::bf16) {
      const int64_t K = in.shape()[1];
      const Tensor w = random_tensor(ctx, Dtype::bf16, {N, K}), y = ctx.backend->alloc(out, {T, N});
      const MatmulSegment s{.w = {w, {}}, .y = y};
      report(cat("matmul ", name, " ", K, " to ", N), 2.0 * double(T) * double(K) * double(N), true, per_layer, [&] {
        matmul(ctx, {.x = in, .segments = {&s, 1}});
      });
      if (std::string(name) == "up")
        report("matmul_relu2 up", 2.0 * double(T) * double(K) * double(N), true, 1, [&] {
          matmul_relu2(ctx, {.x = in, .segments = {&s, 1}});
        });
    };
    {
      std::vector<Tensor> w, y;
      std::vector<MatmulSegment> segments;
      double columns = 0;
      for (const int64_t N : {D, D, D, rank, rank, H}) {
        w.push_back(random_tensor(ctx, Dtype::bf16, {N, D}));
        y.push_back(ctx.backend->alloc(Dtype::bf16, {T, N}));
        columns += double(N);
      }
      for (size_t i = 0; i < w.size(); ++i) segments.push_back({.w = {w[i], {}}, .y = y[i]});
      report("matmul q,k,v,f0,g0,b", 2.0 * td * columns, true, 1, [&] { matmul(ctx, {.x = h, .segments = segments}); });
    }
    product("o", h, D, 1);
    product("f1", low, D, 2);
    product("up", h, F, 0);
    product("down", wide, D, 1);
    product("square f32", h, D, 0, Dtype::f32);
  }
  {
    const Tensor window = ctx.backend->alloc(Dtype::bf16, {1, 3, 3 * D}), taps = random_tensor(ctx, Dtype::f32, {D, 4});
    const std::vector<int32_t> start{0, int32_t(T)}, slot{0};
    const Tensor start_there = ctx.backend->alloc(Dtype::i32, {2}), slot_there = ctx.backend->alloc(Dtype::i32, {1});
    ctx.backend->copy(ctx, start_there.v.data, start.data(), 8);
    const Conv c{.x = h,
                 .w = taps,
                 .window = window,
                 .slots = {slot_there.v.as<int32_t>(), slot_there.v.as<int32_t>()},
                 .packing = {start, start_there.v.as<int32_t>()},
                 .y = h2};
    report("conv_silu", 4 * td, false, 3, [&] { conv_silu(ctx, c); });
  }
  report("rms_norm", 6 * td, false, 0, [&] { rms_norm(ctx, {.x = x, .w = norm, .y = h2, .eps = 1e-5f}); });
  report("add_rms_norm", 12 * td, false, 2,
         [&] { add_rms_norm(ctx, {.x = x, .add = h, .w = norm, .y = h2, .eps = 1e-5f}); });
  report("add_rows", 10 * td, false, 0, [&] { add_rows(ctx, {.x = h, .y = x}); });
  report("relu2", 4 * tf, false, 0, [&] { relu2(ctx, {.x = wide, .y = wide}); });
  const auto heads = [&](const Tensor& t) { return View{t.v.data, t.v.dtype, {T, H, V}}; };
  const Tensor bias = vector(D), w = vector(V);
  report("kda_output", 6 * td, false, 1, [&] {
    kda_output(ctx, {.o = heads(h), .g = heads(h2), .g_bias = bias, .w = w, .y = heads(h3), .eps = 1e-5f});
  });
  std::cout << nlohmann::ordered_json{{"op", "layer without KDA"}, {"T", T}, {"ms_p50", layer}} << std::endl;
} catch (const std::exception& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
