// kernels/cuda/pointwise.cu — elementwise ops: one pass each, 16 bytes of bf16 an access, four accesses under way.
#include "kernels/pointwise.h"

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using bf = __nv_bfloat16;
constexpr int kThreads = 256, kUnroll = 4;

// f(float (&y)[n], int64_t at) makes n results from what it loads at element `at`.
template <int n, class Y, class F>
__global__ void __launch_bounds__(kThreads) each(Y* y, int64_t groups, F f) {
  const int64_t first = blockIdx.x * int64_t(kThreads * kUnroll) + threadIdx.x;
  float v[kUnroll][n];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (const int64_t i = first + u * kThreads; i < groups) f(v[u], i * n);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (const int64_t i = first + u * kThreads; i < groups) store(y + i * n, v[u]);
}

// `make<n>()` gives f for n elements at once; n = 8 where size and addresses allow it.
template <class Y, class Make>
void run(const char* op, Context& ctx, Y* y, int64_t size, bool wide, Make make) {
  if (size == 0) return;
  const auto go = [&](auto n) {
    const int64_t groups = size / n;
    launch(op, ctx, unsigned(ceil_div(groups, kThreads * kUnroll)), kThreads, 0, each<n, Y, decltype(make(n))>, y,
           groups, make(n));
  };
  if (wide)
    go(std::integral_constant<int, 8>{});
  else
    go(std::integral_constant<int, 1>{});
}

template <int n, class X, class Y>
struct Add {
  const X* x;
  const Y* y;
  __device__ void operator()(float (&v)[n], int64_t at) const {
    float a[n];
    load(a, x + at);
    load(v, y + at);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += a[i];
  }
};

template <int n, class Y>
struct Bias {
  const float* bias;
  const Y* y;
  int64_t D;
  __device__ void operator()(float (&v)[n], int64_t at) const {
    float a[n];
    load(a, bias + at % D);
    load(v, y + at);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += a[i];
  }
};

template <int n>
struct Square {
  const bf* x;
  __device__ void operator()(float (&v)[n], int64_t at) const {
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float positive = v[i] < 0.0f ? 0.0f : v[i];  // a NaN stays one
      v[i] = positive * positive;
    }
  }
};

template <int n>
struct Gated {
  const bf *gate, *up;
  __device__ void operator()(float (&v)[n], int64_t at) const {
    float g[n];
    load(g, gate + at);
    load(v, up + at);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= silu(g[i]);
  }
};

bool wide(int64_t size, std::initializer_list<const void*> pointers) {
  return size % 8 == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return aligned(p, 16); });
}

template <class X, class Y>
void add(Context& ctx, const X* x, Y* y, int64_t size) {
  run("add_rows", ctx, y, size, wide(size, {x, y}), [=](auto n) { return Add<n, X, Y>{x, y}; });
}

}  // namespace

void add_rows(Context& ctx, const AddRows& a) {
  const int64_t size = a.y.size();
  const bool x_bf16 = a.x.dtype == Dtype::bf16;
  if (a.y.dtype == Dtype::bf16)
    add(ctx, bf16_of(a.x), bf16_of(a.y), size);
  else if (x_bf16)
    add(ctx, bf16_of(a.x), a.y.as<float>(), size);
  else
    add(ctx, a.x.as<float>(), a.y.as<float>(), size);
}

void add_bias(Context& ctx, const AddBias& a) {
  const int64_t size = a.y.size(), D = a.y.dim(1);
  const float* bias = a.bias.as<float>();
  const bool groups = D % 8 == 0 && wide(size, {bias, a.y.data});
  const auto go = [&](auto* y) {
    using Y = std::remove_pointer_t<decltype(y)>;
    run("add_bias", ctx, y, size, groups, [=](auto n) { return Bias<n, Y>{bias, y, D}; });
  };
  if (a.y.dtype == Dtype::bf16)
    go(bf16_of(a.y));
  else
    go(a.y.as<float>());
}

void relu2(Context& ctx, const Relu2& a) {
  const bf* x = bf16_of(a.x);
  run("relu2", ctx, bf16_of(a.y), a.y.size(), wide(a.y.size(), {a.x.data, a.y.data}),
      [=](auto n) { return Square<n>{x}; });
}

void swiglu(Context& ctx, const SwiGlu& a) {
  const bf *gate = bf16_of(a.gate), *up = bf16_of(a.up);
  run("swiglu", ctx, bf16_of(a.y), a.y.size(), wide(a.y.size(), {a.gate.data, a.up.data, a.y.data}), [=](auto n) {
    return Gated<n>{gate, up};
  });
}

}  // namespace kda::cuda
