#include "kernels/optimizer.h"

#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/optimizer.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include "kernels/cpu/pack-inl.h"
#include "kernels/cpu/tail-inl.h"

#ifndef KDA_OPTIMIZER_ONCE
#define KDA_OPTIMIZER_ONCE
namespace kda::cpu {
// What a step does to every element, worked out in double.
struct Step {
  float grad_scale, beta1, beta2, rest1, rest2;  // rest = 1 - beta
  float keep;                                    // 1 - lr decay
  float rate;                                    // lr / (1 - beta1^step)
  float root;                                    // 1 / sqrt(1 - beta2^step)
  float eps;
};
}  // namespace kda::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

void adamw_piece(const Step& s, float* p, const float* g, float* m, float* v, uint16_t* working, size_t n) {
  const DF d;
  const size_t L = hn::Lanes(d);
  const auto scale = hn::Set(d, s.grad_scale), beta1 = hn::Set(d, s.beta1), beta2 = hn::Set(d, s.beta2);
  const auto rest1 = hn::Set(d, s.rest1), rest2 = hn::Set(d, s.rest2), keep = hn::Set(d, s.keep);
  const auto rate = hn::Set(d, s.rate), root = hn::Set(d, s.root), eps = hn::Set(d, s.eps);
  for (size_t i = 0; i < n; i += L) {
    const bool whole = i + L <= n;
    const size_t rest = n - i;
    const auto get = [&](const float* x) HWY_ATTR { return whole ? hn::LoadU(d, x + i) : load_tail(d, x + i, rest); };
    const auto put = [&](VF x, float* to) HWY_ATTR {
      if (whole)
        hn::StoreU(x, d, to + i);
      else
        store_tail(d, x, to + i, rest);
    };
    const auto grad = hn::Mul(get(g), scale);
    const auto mean = hn::MulAdd(rest1, grad, hn::Mul(beta1, get(m)));
    const auto square = hn::MulAdd(hn::Mul(rest2, grad), grad, hn::Mul(beta2, get(v)));
    const auto by = hn::MulAdd(hn::Sqrt(square), root, eps);
    const auto now = hn::Sub(hn::Mul(get(p), keep), hn::Div(hn::Mul(rate, mean), by));
    put(mean, m);
    put(square, v);
    put(now, p);
    if (!working) continue;
    if (whole)
      hn::StoreU(to_bf16(now), DU16(), working + i);
    else
      for (size_t j = i; j < n; ++j) working[j] = bf16(p[j]).bits;
  }
}

// Lane i adds elements i, i + lanes, ..; the lanes in order at the end. A lane has at most kPiece / lanes terms, in
// double.
double squares_piece(const float* x, size_t n) {
  const DF d;
  const size_t L = hn::Lanes(d);
  double sum[4] = {};
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::RepartitionToWide<DF> wide;
  const hn::Rebind<float, decltype(wide)> half;
  const size_t W = hn::Lanes(wide);
  auto a = hn::Zero(wide), b = a;
  for (; i + L <= n; i += L) {
    const auto u = hn::PromoteTo(wide, hn::LoadU(half, x + i)), v = hn::PromoteTo(wide, hn::LoadU(half, x + i + W));
    a = hn::MulAdd(u, u, a);
    b = hn::MulAdd(v, v, b);
  }
  sum[0] = hn::GetLane(hn::SumOfLanes(wide, hn::Add(a, b)));
#endif
  (void)L;
  for (; i < n; ++i) sum[i & 3] += double(x[i]) * double(x[i]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {

HWY_EXPORT(adamw_piece);
HWY_EXPORT(squares_piece);

namespace {
constexpr int64_t kPiece = 65536;
}

void adamw(Context& ctx, const AdamW& a) {
  float *p = a.p.as<float>(), *m = a.m.as<float>(), *v = a.v.as<float>();
  const float* g = a.g.as<float>();
  auto* working = a.working.data ? reinterpret_cast<uint16_t*>(a.working.as<bf16>()) : nullptr;
  const double b1 = double(a.beta1), b2 = double(a.beta2), lr = double(a.lr);
  const Step s{.grad_scale = a.grad_scale,
               .beta1 = a.beta1,
               .beta2 = a.beta2,
               .rest1 = float(1 - b1),
               .rest2 = float(1 - b2),
               .keep = float(1 - lr * double(a.decay)),
               .rate = float(lr / (1 - std::pow(b1, double(a.step)))),
               .root = float(1 / std::sqrt(1 - std::pow(b2, double(a.step)))),
               .eps = a.eps};
  const auto f = HWY_DYNAMIC_DISPATCH(adamw_piece);
  in_pieces(*ctx.pool, a.p.size(), 4, [=](int64_t from, int64_t to) {
    f(s, p + from, g + from, m + from, v + from, working ? working + from : nullptr, size_t(to - from));
  });
}

void sum_squares(Context& ctx, const SumSquares& a) {
  const float* x = a.x.as<float>();
  const int64_t n = a.x.size(), pieces = (n + kPiece - 1) / kPiece;
  auto* partial = static_cast<double*>(workspace(ctx, sum_squares_workspace_bytes(ctx, n), "sum_squares"));
  const auto f = HWY_DYNAMIC_DISPATCH(squares_piece);
  ctx.pool->run(pieces,
                [&](int64_t i, int) { partial[i] = f(x + i * kPiece, size_t(std::min(kPiece, n - i * kPiece))); });
  double sum = 0;
  for (int64_t i = 0; i < pieces; ++i) sum += partial[i];
  *a.sum.as<float>() += float(sum);
}

}  // namespace cpu

size_t sum_squares_workspace_bytes(const Context&, int64_t n) {
  return size_t((n + cpu::kPiece - 1) / cpu::kPiece) * sizeof(double);
}

}  // namespace kda
#endif
