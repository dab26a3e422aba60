#include "kernels/pointwise.h"

#include "kernels/cpu/ops.h"
#include "kernels/cpu/tasks.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pointwise.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "kernels/cpu/tail-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

// y[i] = f(a[i], b[i]); the last, partial vector goes through the same f.
template <class F>
HWY_INLINE void map2(const float* a, const float* b, float* y, size_t n, const F& f) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  size_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto u = f(d, hn::LoadU(d, a + i), hn::LoadU(d, b + i));
    const auto v = f(d, hn::LoadU(d, a + i + L), hn::LoadU(d, b + i + L));
    hn::StoreU(u, d, y + i);
    hn::StoreU(v, d, y + i + L);
  }
  for (; i + L <= n; i += L) hn::StoreU(f(d, hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, y + i);
  if (i < n) store_tail(d, f(d, load_tail(d, a + i, n - i), load_tail(d, b + i, n - i)), y + i, n - i);
}

struct Sum {
  template <class D, class V>
  HWY_INLINE V operator()(D, V a, V b) const {
    return hn::Add(a, b);
  }
};

struct SquaredRelu {
  template <class D, class V>
  HWY_INLINE V operator()(D d, V x, V) const {
    // The operands' order matters: a NaN stays one.
    const V r = hn::IfThenElse(hn::Lt(x, hn::Zero(d)), hn::Zero(d), x);
    return hn::Mul(r, r);
  }
};

struct Gated {
  template <class D, class V>
  HWY_INLINE V operator()(D d, V gate, V up) const {
    // Through exp(-|gate|), which cannot overflow: sigmoid(g) = 1 / (1 + z), or z / (1 + z) below zero.
    const V one = hn::Set(d, 1.0f);
    const V z = hn::Exp(d, hn::Neg(hn::Abs(gate)));
    const V sigmoid = hn::Div(hn::IfThenElse(hn::Lt(gate, hn::Zero(d)), z, one), hn::Add(one, z));
    return hn::Mul(hn::Mul(gate, sigmoid), up);
  }
};

void sum_piece(const float* a, const float* b, float* y, size_t n) { map2(a, b, y, n, Sum()); }
void relu2_piece(const float* a, const float* b, float* y, size_t n) { map2(a, b, y, n, SquaredRelu()); }
void swiglu_piece(const float* a, const float* b, float* y, size_t n) { map2(a, b, y, n, Gated()); }

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda::cpu {

HWY_EXPORT(sum_piece);
HWY_EXPORT(relu2_piece);
HWY_EXPORT(swiglu_piece);

namespace {
using Piece = void (*)(const float*, const float*, float*, size_t);
void elementwise(Context& ctx, Piece f, const float* a, const float* b, float* y, int64_t n) {
  in_pieces(*ctx.pool, n, 1, [=](int64_t from, int64_t to) { f(a + from, b + from, y + from, size_t(to - from)); });
}
}  // namespace

void add_rows(Context& ctx, const AddRows& a) {
  float* y = a.y.as<float>();
  elementwise(ctx, HWY_DYNAMIC_DISPATCH(sum_piece), a.x.as<float>(), y, y, a.y.size());
}

void add_bias(Context& ctx, const AddBias& a) {
  const float* bias = a.bias.as<float>();
  float* y = a.y.as<float>();
  const int64_t D = a.y.dim(1);
  const Piece f = HWY_DYNAMIC_DISPATCH(sum_piece);
  in_pieces(*ctx.pool, a.y.dim(0), D, [=](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) f(y + r * D, bias, y + r * D, size_t(D));
  });
}

void relu2(Context& ctx, const Relu2& a) {
  const float* x = a.x.as<float>();
  elementwise(ctx, HWY_DYNAMIC_DISPATCH(relu2_piece), x, x, a.y.as<float>(), a.y.size());
}

void swiglu(Context& ctx, const SwiGlu& a) {
  elementwise(ctx, HWY_DYNAMIC_DISPATCH(swiglu_piece), a.gate.as<float>(), a.up.as<float>(), a.y.as<float>(),
              a.y.size());
}

}  // namespace kda::cpu
#endif
