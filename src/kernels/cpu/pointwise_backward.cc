#include "kernels/pointwise_backward.h"

#include "kernels/cpu/ops.h"
#include "kernels/cpu/row_sums.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pointwise_backward.cc"
#include <hwy/foreach_target.h>  // before highway.h

#include <hwy/highway.h>

#include <hwy/contrib/math/math-inl.h>

#include "kernels/cpu/tail-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {

void add_piece(const float* x, float* y, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  size_t i = 0;
  for (; i + L <= n; i += L) hn::StoreU(hn::Add(hn::LoadU(d, y + i), hn::LoadU(d, x + i)), d, y + i);
  for (; i < n; ++i) y[i] += x[i];
}

void relu2_backward_piece(const float* x, const float* dy, float* dx, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  // The operands' order matters: a NaN stays one.
  const auto f = [d](auto u, auto g) HWY_ATTR {
    const auto r = hn::IfThenElse(hn::Lt(u, hn::Zero(d)), hn::Zero(d), u);
    return hn::Mul(hn::Add(r, r), g);
  };
  size_t i = 0;
  for (; i + L <= n; i += L) hn::StoreU(f(hn::LoadU(d, x + i), hn::LoadU(d, dy + i)), d, dx + i);
  if (i < n) store_tail(d, f(load_tail(d, x + i, n - i), load_tail(d, dy + i, n - i)), dx + i, n - i);
}

// With s = sigmoid(gate): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s.
void swiglu_backward_piece(const float* gate, const float* up, const float* dy, float* dgate, float* dup, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t L = hn::Lanes(d);
  const auto one = hn::Set(d, 1.0f);
  for (size_t i = 0; i < n; i += L) {
    const bool whole = i + L <= n;
    const auto get = [&](const float* p) HWY_ATTR { return whole ? hn::LoadU(d, p + i) : load_tail(d, p + i, n - i); };
    const auto g = get(gate), u = get(up), y = get(dy);
    // Through exp(-|gate|), which cannot overflow; 1 - s is taken the same way, without cancelling.
    const auto z = hn::Exp(d, hn::Neg(hn::Abs(g)));
    const auto below = hn::Lt(g, hn::Zero(d));
    const auto share = hn::Div(one, hn::Add(one, z));
    const auto s = hn::Mul(hn::IfThenElse(below, z, one), share), rest = hn::Mul(hn::IfThenElse(below, one, z), share);
    const auto ys = hn::Mul(y, s);
    const auto to_gate = hn::Mul(hn::Mul(ys, u), hn::MulAdd(g, rest, one)), to_up = hn::Mul(ys, g);
    if (whole) {
      hn::StoreU(to_gate, d, dgate + i);
      hn::StoreU(to_up, d, dup + i);
    } else {
      store_tail(d, to_gate, dgate + i, n - i);
      store_tail(d, to_up, dup + i, n - i);
    }
  }
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kda {
namespace cpu {

HWY_EXPORT(add_piece);
HWY_EXPORT(relu2_backward_piece);
HWY_EXPORT(swiglu_backward_piece);

void add_bias_backward(Context& ctx, const AddBiasBackward& a) {
  const float* dy = a.dy.as<float>();
  const int64_t D = a.dy.dim(1);
  const auto add = HWY_DYNAMIC_DISPATCH(add_piece);
  add_row_sums(ctx, a.dy.dim(0), D, a.dbias.as<float>(), "add_bias_backward",
               [=](int64_t from, int64_t to, float* sum) {
                 for (int64_t r = from; r < to; ++r) add(dy + r * D, sum, size_t(D));
               });
}

void relu2_backward(Context& ctx, const Relu2Backward& a) {
  const float *x = a.x.as<float>(), *dy = a.dy.as<float>();
  float* dx = a.dx.as<float>();
  const auto f = HWY_DYNAMIC_DISPATCH(relu2_backward_piece);
  in_pieces(*ctx.pool, a.x.size(), 1,
            [=](int64_t from, int64_t to) { f(x + from, dy + from, dx + from, size_t(to - from)); });
}

void swiglu_backward(Context& ctx, const SwiGluBackward& a) {
  const float *gate = a.gate.as<float>(), *up = a.up.as<float>(), *dy = a.dy.as<float>();
  float *dgate = a.dgate.as<float>(), *dup = a.dup.as<float>();
  const auto f = HWY_DYNAMIC_DISPATCH(swiglu_backward_piece);
  in_pieces(*ctx.pool, a.dy.size(), 1, [=](int64_t from, int64_t to) {
    f(gate + from, up + from, dy + from, dgate + from, dup + from, size_t(to - from));
  });
}

// A task is a block of columns: it adds up all tokens in order, however often an id comes.
void embedding_backward(Context& ctx, const EmbeddingBackward& a) {
  const int32_t* ids = a.ids.as<int32_t>();
  const float* dy = a.dy.as<float>();
  float* dtable = a.dtable.as<float>();
  const int64_t T = a.dy.dim(0), D = a.dy.dim(1), rows = a.dtable.dim(0);
  for (int64_t t = 0; t < T; ++t)
    KDA_CHECK(ids[t] >= 0 && ids[t] < rows, "embedding_backward: id ", ids[t], " at token ", t, ", the table has ",
              rows, " rows");
  constexpr int64_t kColumns = 64;
  const auto add = HWY_DYNAMIC_DISPATCH(add_piece);
  ctx.pool->run((D + kColumns - 1) / kColumns, [&](int64_t task, int) {
    const int64_t from = task * kColumns, n = std::min(kColumns, D - from);
    for (int64_t t = 0; t < T; ++t) add(dy + t * D + from, dtable + int64_t(ids[t]) * D + from, size_t(n));
  });
}

}  // namespace cpu

size_t add_bias_backward_workspace_bytes(const Context&, int64_t R, int64_t D) { return cpu::row_sums_bytes(R, D); }

}  // namespace kda
#endif
