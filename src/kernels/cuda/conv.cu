// kernels/cuda/conv.cu — causal depthwise convolution and SiLU over packed sequences, in one pass. A thread has some
// channels of a run of tokens and slides the last three inputs along in registers, so that a run reads three rows more
// than it writes. The thread that has a sequence's first token also reads its window, and leaves the new one.
#include "kernels/conv.h"

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using bf = __nv_bfloat16;
constexpr int kRun = 8, kAhead = 8, kThreads = 64, kBlocks = 10;  // kBlocks: on a multiprocessor at a time

struct Args {
  const bf* x;
  const float* w;
  bf* window;  // at the call's first channel
  bf* y;
  int64_t C, channels;
  const int32_t *start, *in, *out;
  const StateMark* marks;
  unsigned groups;     // blocks side by side have one run's channels: whole rows of x at a time
  int N, runs, empty;  // rows of the grid: runs, then (empty ? N : 0) sequences without tokens, then marks
};

// The last of `start` at or below t: the sequence of token t (of sequences without tokens, the one after them).
__device__ int sequence_of(const int32_t* start, int N, int32_t t) {
  int low = 0, high = N - 1;
  while (low < high) {
    const int mid = (low + high + 1) / 2;
    if (start[mid] <= t)
      low = mid;
    else
      high = mid - 1;
  }
  return low;
}

template <int n>
__device__ void copy_row(bf* to, const bf* from) {
  *reinterpret_cast<Group<bf, n>*>(to) = *reinterpret_cast<const Group<bf, n>*>(from);
}
template <int n>
__device__ void zero_row(bf* to) {
  const float zeros[n] = {};
  store(to, zeros);
}

// The window after a sequence of T tokens from x: its last three inputs, older window rows included. Rows are read in
// order, before they are written over: `to` may be `before`.
template <int n>
__device__ void leave_window(bf* to, const bf* before, const bf* x, int64_t T, int64_t C, int64_t channels) {
  for (int64_t j = 0; j < 3; ++j) {
    const int64_t t = T - 3 + j;
    if (t >= 0)
      copy_row<n>(to + j * channels, x + t * C);
    else if (before)
      copy_row<n>(to + j * channels, before + (t + 3) * channels);
    else
      zero_row<n>(to + j * channels);
  }
}

template <int n>
__global__ void __launch_bounds__(kThreads, kBlocks) conv(Args a) {
  const int64_t c = (int64_t(blockIdx.x % a.groups) * kThreads + threadIdx.x) * n;
  if (c >= a.C) return;
  const bf* x = a.x + c;
  bf* window = a.window + c;
  int row = int(blockIdx.x / a.groups);
  if (row >= a.runs) {
    row -= a.runs;
    if (row < a.empty) {
      const int32_t in = a.in[row], out = a.out[row];
      if (a.start[row] == a.start[row + 1] && out >= 0)
        leave_window<n>(window + out * 3 * a.channels, in < 0 ? nullptr : window + in * 3 * a.channels, x, 0, a.C,
                        a.channels);
      return;
    }
    const StateMark m = a.marks[row - a.empty];
    leave_window<n>(window + m.slot * 3 * a.channels, nullptr, x + a.start[m.sequence] * a.C, m.tokens, a.C,
                    a.channels);
    return;
  }

  const int32_t from = row * kRun, end = a.start[a.N], to = min(from + kRun, end);
  int s = sequence_of(a.start, a.N, from);
  int32_t first = a.start[s], last = a.start[s + 1];  // of the sequence: its first token, and the one after its last
  float w[n][4];
  Raw<n> h[3];
#pragma unroll
  for (int e = 0; e < n; ++e) load(w[e], a.w + (c + e) * 4);

  // The three inputs before token t of the sequence; where t is its first, the window is also renewed.
  const auto enter = [&](int32_t t) {
    const int32_t in = a.in[s], out = a.out[s];
    const bf* before = in < 0 ? nullptr : window + in * 3 * a.channels;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int32_t p = t - 3 + j;
      if (p >= first)
        h[j].load(x + p * a.C);
      else if (before)
        h[j].load(before + (p - first + 3) * a.channels);
      else
        h[j] = {};
    }
    if (t == first && out >= 0)
      leave_window<n>(window + out * 3 * a.channels, before, x + first * a.C, last - first, a.C, a.channels);
  };
  enter(from);

  for (int32_t t = from; t < to;) {
    if (t == last) {
      do first = last, last = a.start[++s + 1];
      while (last == first);
      enter(t);
    }
    const int32_t stop = min(to, last);
    for (; t < stop; t += kAhead) {
      Raw<n> v[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (t + u < stop) v[u].load(x + (t + u) * a.C);
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (t + u < stop) {
          float y[n];
#pragma unroll
          for (int e = 0; e < n; ++e)
            y[e] = silu(w[e][0] * h[0][e] + w[e][1] * h[1][e] + w[e][2] * h[2][e] + w[e][3] * v[u][e]);
          h[0] = h[1];
          h[1] = h[2];
          h[2] = v[u];
          store(a.y + (t + u) * a.C + c, y);
        }
    }
    t = stop;
  }
}

}  // namespace

void conv_silu(Context& ctx, const Conv& a) {
  const int64_t T = a.x.dim(0), C = a.x.dim(1), channels = a.window.dim(2), N = a.packing.N();
  if (C == 0 || N == 0) return;
  bool empty = false;
  for (int64_t s = 0; s < N; ++s) empty |= a.packing.host_start[size_t(s)] == a.packing.host_start[size_t(s) + 1];
  Args args{.x = bf16_of(a.x),
            .w = a.w.as<float>(),
            .window = bf16_of(a.window) + a.channel,
            .y = bf16_of(a.y),
            .C = C,
            .channels = channels,
            .start = a.packing.start,
            .in = a.slots.in,
            .out = a.slots.out,
            .marks = a.marks.device,
            .groups = 1,
            .N = int(N),
            .runs = int(ceil_div(T, kRun)),
            .empty = empty ? int(N) : 0};
  const int64_t rows = args.runs + args.empty + int64_t(a.marks.host.size());
  const bool wide = C % 8 == 0 && channels % 8 == 0 && aligned(args.x, 16) && aligned(args.y, 16) &&
                    aligned(args.window, 16) && aligned(args.w, 16);
  const int64_t n = wide ? 8 : 1;
  args.groups = unsigned(ceil_div(C, n * kThreads));
  KDA_CHECK(rows * args.groups < int64_t(1) << 31, "conv_silu: [", T, ",", C, "] is too much for one call");
  const auto grid = unsigned(rows * args.groups);
  launch("conv_silu", ctx, grid, kThreads, 0, wide ? conv<8> : conv<1>, args);
}

}  // namespace kda::cuda
