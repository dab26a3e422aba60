// The ops of a training step that wait for memory, at the sizes of nano-teacher's KDA student and 4 x 1024 tokens, and
// attention with its gradient. One JSON line each. `limit`: for the former what the DRAM probe of this run takes for
// the bytes that must be read and written; for attention oneDNN's f32 products of 4096 x 64 x 1024.
//   train_ops_bench
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>

#include "bench/kernels/device.h"
#include "kernels/attention_train.h"
#include "kernels/norm_backward.h"
#include "kernels/optimizer.h"
#include "kernels/pointwise_backward.h"
#include "kernels/probe.h"
#include "tests/check.h"
#include "tests/ref/attention.h"

namespace kda {
namespace {

constexpr int64_t kTokens = 4096;

double median_ms(int n, const std::function<void()>& f) {
  f();
  std::vector<double> t;
  for (int i = 0; i < n; ++i) {
    const auto from = std::chrono::steady_clock::now();
    f();
    t.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - from).count());
  }
  std::sort(t.begin(), t.end());
  return t[t.size() / 2];
}

Tensor drawn(const char* name, int64_t n, float size = 1) {
  const auto v = test::values(name, 1 << 18, size);
  Tensor t = host_tensor(Dtype::f32, {n});
  for (int64_t i = 0; i < n; ++i) t.v.as<float>()[i] = v[size_t((i * 7 + i / 100003) & ((1 << 18) - 1))];
  return t;
}

void print(ThreadPool& pool, const char* op, nlohmann::ordered_json what, double ms, double limit_ms) {
  nlohmann::ordered_json line = bench::head(pool.threads());
  line["op"] = op;
  line.update(what);
  line["ms_p50"] = ms;
  line["limit_ms"] = limit_ms;
  line["share"] = limit_ms / ms;
  std::puts(line.dump().c_str());
  std::fflush(stdout);
}

void bench_memory(Context& ctx) {
  DramProbe dram(*ctx.pool);
  const Tensor a = drawn("a", 8 << 20), b = drawn("b", 8 << 20), c = drawn("c", 8 << 20), d = drawn("d", 8 << 20);
  const Tensor working = host_tensor(Dtype::bf16, {8 << 20}), w = drawn("w", 4096);
  const auto at = [](const Tensor& t, Shape s) { return view(t.v.as<float>(), s); };
  const auto line = [&](const char* op, int64_t R, int64_t D, double floats, const std::function<void()>& f) {
    const double rate = dram.bytes_per_s();
    print(*ctx.pool, op, {{"R", R}, {"D", D}}, median_ms(15, f), floats * double(R * D) * 4 / rate * 1e3);
  };
  const Shape x{kTokens, 256}, f{kTokens, 1024};
  line("rms_norm_backward", kTokens, 256, 4, [&] {
    rms_norm_backward(
        ctx, {.x = at(a, x), .w = at(w, {256}), .dy = at(b, x), .dx = at(c, x), .dw = at(d, {256}), .eps = 1e-5f});
  });
  line("relu2_backward", kTokens, 1024, 3,
       [&] { relu2_backward(ctx, {.x = at(a, f), .dy = at(b, f), .dx = at(b, f)}); });
  line("swiglu_backward", kTokens, 1024, 5, [&] {
    swiglu_backward(ctx, {.gate = at(a, f), .up = at(b, f), .dy = at(c, f), .dgate = at(c, f), .dup = at(d, f)});
  });
  line("add_bias_backward", kTokens, 256, 1, [&] { add_bias_backward(ctx, {.dy = at(a, x), .dbias = at(d, {256})}); });
  std::vector<int32_t> ids, position;
  for (int64_t t = 0; t < kTokens; ++t) ids.push_back(int32_t(t * 7919 % 4096)), position.push_back(int32_t(t % 1024));
  line("embedding_backward", kTokens, 256, 3, [&] {
    embedding_backward(
        ctx, {.ids = view(std::as_const(ids).data(), {kTokens}), .dy = at(a, x), .dtable = at(b, {4096, 256})});
  });
  line("rope_backward", kTokens, 256, 2, [&] {
    rope_backward(ctx, {.x = at(a, {kTokens, 4, 64}),
                        .position = view(std::as_const(position).data(), {kTokens}),
                        .inv_freq = at(w, {32})});
  });
  const Shape n{7864320};
  line("adamw", 1, 7864320, 7.5, [&] {
    adamw(ctx, {.p = at(a, n),
                .g = at(b, n),
                .m = at(c, n),
                .v = at(d, n),
                .working = view(working.v.as<bf16>(), n),
                .lr = 1e-3f,
                .beta1 = 0.9f,
                .beta2 = 0.95f,
                .eps = 1e-8f,
                .decay = 0.1f,
                .step = 10,
                .grad_scale = 1});
  });
  line("sum_squares", 1, 7864320, 1, [&] { sum_squares(ctx, {.x = at(a, n), .sum = at(w, {1})}); });
}

bool bench_attention(Context& ctx, int64_t sequences, int64_t L) {
  const int64_t T = sequences * L, H = 4, G = 2, d = 64;
  std::vector<int32_t> start;
  for (int64_t n = 0; n <= sequences; ++n) start.push_back(int32_t(n * L));
  const Tensor q = drawn("q", T * H * d), k = drawn("k", T * G * d), v = drawn("v", T * G * d),
               d_o = drawn("do", T * H * d);
  const Tensor o = host_tensor(Dtype::f32, {T, H, d}), dq = host_tensor(Dtype::f32, {T, H, d});
  const Tensor dk = host_tensor(Dtype::f32, {T, G, d}), dv = host_tensor(Dtype::f32, {T, G, d});
  const Tensor lse = host_tensor(Dtype::f32, {T, H});
  const auto at = [](const Tensor& t, Shape s) { return view(t.v.as<float>(), s); };
  const Packing packing{.host_start = start, .start = start.data()};
  const AttentionTrain forward{
      .q = at(q, {T, H, d}), .k = at(k, {T, G, d}), .v = at(v, {T, G, d}), .packing = packing, .o = o, .lse = lse};
  const AttentionBackward backward{.q = forward.q,
                                   .k = forward.k,
                                   .v = forward.v,
                                   .o = o,
                                   .d_o = at(d_o, {T, H, d}),
                                   .lse = lse,
                                   .packing = packing,
                                   .dq = dq,
                                   .dk = dk,
                                   .dv = dv};
  GemmProbe probe(*ctx.pool, 4096, {1024, 64, 1}, Precision::exact);
  std::vector<double> rates;
  for (int i = 0; i < 9; ++i) rates.push_back(2.0 * 4096 * 1024 * 64 / probe.seconds());
  std::sort(rates.begin(), rates.end());
  attention_train(ctx, forward);
  if (L <= 1024) {  // the first sequence against the reference
    const auto part = [&](const Tensor& t, int64_t heads) {
      const float* p = t.v.as<float>();
      return std::vector<double>(p, p + L * heads * d);
    };
    const auto want =
        ref::attention_backward(part(q, H), part(k, G), part(v, G), part(d_o, H), size_t(H), size_t(G), size_t(d));
    attention_backward(ctx, backward);
    if (test::relative_max(part(dk, G), want.dk) > 1e-4 || test::relative_max(part(dq, H), want.dq) > 1e-4) {
      std::fprintf(stderr, "attention_backward: wrong result\n");
      return false;
    }
  }
  const double pairs = double(sequences) * double(L) * double(L + 1) / 2;
  const int n = L > 4096 ? 1 : 9;
  for (const bool back : {false, true}) {
    const double flops = (back ? 10 : 4) * pairs * double(H * d);
    const double ms = median_ms(n, [&] { back ? attention_backward(ctx, backward) : attention_train(ctx, forward); });
    print(*ctx.pool, back ? "attention_backward" : "attention_train",
          {{"sequences", sequences}, {"L", L}, {"gflops", flops / ms / 1e6}}, ms, flops / rates[4] * 1e3);
  }
  return true;
}

}  // namespace
}  // namespace kda

int main() {
  kda::ThreadPool pool;
  kda::Context ctx;
  ctx.backend = &kda::cpu_backend();
  ctx.pool = &pool;
  ctx.workspace = kda::host_tensor(kda::Dtype::u8, {64 << 20});
  kda::bench_memory(ctx);
  for (const auto& [sequences, L] : {std::pair<int64_t, int64_t>{4, 1024}, {2, 2048}, {1, 16384}})
    if (!kda::bench_attention(ctx, sequences, L)) return 1;
}
