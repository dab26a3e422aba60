// kernels/cuda/matvec.cu — matvec, norm_matvec, norm_matvec_relu2, matvec_add: matmul.h for generated tokens.
#include <algorithm>
#include <vector>

#include "kernels/cuda/chain.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/matvec_launch.cuh"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/skinny90.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"

namespace kda::cuda {
namespace {

// Any K and any alignment: a warp finds one y after another. Not tuned.
template <Weight kW>
__global__ void __launch_bounds__(256) matvec_any_kernel(const __grid_constant__ MatvecArgs a) {
  release_next();
  wait_for_previous();
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t i = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; i < a.rows * a.R; i += warps) {
    const int64_t row = i / a.R, r = i % a.R;
    const MatvecRow at = matvec_row(a, row);
    const __nv_bfloat16* x = (a.inputs > 1 ? at.segment->x : a.x) + r * a.K;
    float sum = 0;
    for (int k = lane; k < a.K; k += 32) {
      float w;
      if constexpr (kW == Weight::bf16)
        w = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(at.segment->w)[at.n * a.K + k]);
      else
        w = __uint_as_float(widen<kW>(at.segment->w[at.n * a.K + k], 0) << 16);
      sum = fmaf(__bfloat162float(x[k]), w, sum);
    }
    for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
    if (lane == 0) finish_one(a, at, int(r), sum);
  }
}

int stage_k_of(Weight w) { return w == Weight::bf16 ? kStageK<Weight::bf16> : kStageK<Weight::f8>; }

// What one launch takes, before it is cut into blocks of kMaxColumns rows of x.
struct Product {
  std::span<const MatmulSegment> segments;
  ConstView x;                       // bf16 [R,K], the one shared; without data where each has its own
  const NormMatvec* norm = nullptr;  // x is rms_norm(norm->x)
  Finish finish = Finish::write;
  const char* op;
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void launch_rows(Context& ctx, const Product& p, int64_t K, int64_t from, int R) {
  const Device& device = device_of(ctx);
  const bool early = device.arch >= 90;
  const cudaStream_t stream = stream_of(ctx);
  const Dtype type = p.segments[0].w.w.dtype;
  const bool own = p.segments[0].x.data;
  MatvecArgs a{};
  a.segments = int(p.segments.size()), a.R = R, a.K = int(K), a.finish = p.finish;
  a.inputs = own ? a.segments : 1;
  bool fast = K % (type == Dtype::bf16 ? 8 : 16) == 0;
  for (int i = 0; i < a.segments; ++i) {
    const MatmulSegment& s = p.segments[size_t(i)];
    const int64_t N = s.w.w.dim(0);
    const bool f32 = s.y.dtype == Dtype::f32;
    a.segment[i] = {.w = static_cast<const uint8_t*>(s.w.w.data),
                    .scale = s.w.scale.data ? s.w.scale.as<float>() : nullptr,
                    .y = static_cast<char*>(s.y.data) + size_t(from * N) * (f32 ? 4 : 2),
                    .x = own ? bf16_of(s.x) + from * K : nullptr,
                    .first = a.rows,
                    .rows = N,
                    .f32 = f32};
    a.rows += N;
    fast = fast && aligned(s.w.w.data) && aligned(s.x.data);
  }
  if (a.rows == 0) return;
  if (own && a.segments == 1) a.x = a.segment[0].x;  // one matrix alone: its input is the shared one
  if (p.norm) {
    const float* x = p.norm->x.as<float>() + from * K;
    fast = fast && aligned(x) && aligned(p.norm->norm.data) && aligned(p.norm->h.data);
    a.residual = x, a.norm = p.norm->norm.as<float>(), a.eps = p.norm->eps;
    a.x = bf16_of(p.norm->h) + from * K;
  } else if (!own) {
    a.x = bf16_of(p.x) + from * K;
    fast = fast && aligned(a.x);
  }
  if (fast)
    a.plan = plan_matvec(a.rows, K, R, stage_k_of(weight_of(type)), a.inputs, device.sms, int(device.shared_bytes));
  if (p.norm && !fast) {
    const View h{const_cast<__nv_bfloat16*>(a.x), Dtype::bf16, {R, K}};
    cuda::rms_norm(ctx, RmsNorm{.x = view(a.residual, {R, K}), .w = p.norm->norm, .y = h, .eps = p.norm->eps});
    a.residual = nullptr;
  } else if (p.norm && a.plan.chunk) {
    launch_on(stream, early, 1, dim3(unsigned(R)), dim3(256), 0, norm_rows_kernel, p.op, a.residual, a.norm, a.eps,
              int(K), const_cast<__nv_bfloat16*>(a.x));
    a.residual = nullptr;
  }
  if (fast) {
    if (a.plan.parts > 1) {
      a.partial = static_cast<float*>(workspace(ctx, size_t(a.plan.parts) * size_t(R) * size_t(a.rows) * 4, p.op));
      a.arrived = device.tickets;
    }
    return launch_matvec(stream, early, weight_of(type), a, p.op);
  }
  const dim3 grid(unsigned(std::min<int64_t>(ceil_div(a.rows * R, 8), int64_t(device.sms) * 8)));
  const auto kernel = type == Dtype::bf16      ? matvec_any_kernel<Weight::bf16>
                      : type == Dtype::f8_e4m3 ? matvec_any_kernel<Weight::f8>
                                               : matvec_any_kernel<Weight::i8>;
  launch_on(stream, early, 1, grid, dim3(256), 0, kernel, p.op, a);
}

// Segments go together where one launch can take them: of one type, and with own inputs only where all are of one
// shape.
void launch_product(Context& ctx, const Product& p) {
  const auto segments = p.segments;
  const auto together = [&](const MatmulSegment& a, const MatmulSegment& b) {
    if (a.w.w.dtype != b.w.w.dtype || !a.x.data != !b.x.data) return false;
    return !a.x.data || a.w.w.shape == b.w.w.shape;
  };
  for (size_t first = 0, end; first < segments.size(); first = end) {
    for (end = first + 1; end < segments.size() && together(segments[first], segments[end]);) ++end;
    Product part = p;
    part.segments = segments.subspan(first, end - first);
    const MatmulSegment& s = part.segments[0];
    const int64_t R = s.y.dim(0), K = s.w.w.dim(1);
    for (int64_t r = 0; r < R; r += kMaxColumns)
      launch_rows(ctx, part, K, r, int(std::min<int64_t>(kMaxColumns, R - r)));
  }
}

// From kSkinnyMinRows on matrices go to a kernel made for that, all together. Where it cannot be, and for more rows
// than it takes, large ones in bf16 go to cuBLASLt once there are so many rows that the tensor cores' own loads of x
// take longer than those of the weights; the small ones beside them are not worth a launch each.
constexpr int64_t kFewRows = 16, kLarge = 1024;

SkinnyFinish skinny_finish(Finish f) {
  return f == Finish::write ? SkinnyFinish::write : f == Finish::relu2 ? SkinnyFinish::relu2 : SkinnyFinish::add;
}

void run(Context& ctx, Product p) {
  if (chain_product(ctx, p.segments, p.x, p.norm, p.finish)) return;
  const int64_t R = p.segments[0].y.dim(0);
  if (R < kSkinnyMinRows) return launch_product(ctx, p);
  const ConstView x = p.norm ? ConstView(p.norm->h) : p.x;
  const auto large = [&](const MatmulSegment& s) {
    return R > kFewRows && s.w.w.dtype == Dtype::bf16 && s.w.w.dim(0) >= kLarge && s.w.w.dim(1) % 8 == 0;
  };
  const auto elsewhere = [&](const MatmulSegment& s) { return skinny90_takes(ctx, x, {&s, 1}) || large(s); };
  if (std::none_of(p.segments.begin(), p.segments.end(), elsewhere)) return launch_product(ctx, p);
  if (p.norm) {
    cuda::rms_norm(ctx, RmsNorm{.x = p.norm->x, .w = p.norm->norm, .y = p.norm->h, .eps = p.norm->eps});
    p.x = x;
    p.norm = nullptr;
  }
  void* const scratch = workspace(ctx, std::max(kGemmScratchBytes, skinny90_scratch_bytes(ctx)), p.op);
  std::vector<MatmulSegment> ours, rest;
  for (const MatmulSegment& s : p.segments) {
    if (s.w.w.dim(0) == 0) continue;
    if (ours.push_back(s); skinny90_takes(ctx, p.x, ours)) continue;
    ours.pop_back();
    if (!large(s)) {
      rest.push_back(s);
      continue;
    }
    const ConstView& own = s.x.data ? s.x : p.x;
    gemm_few_rows(ctx, bf16_of(s.w.w), bf16_of(own), s.y, p.finish == Finish::add, own.dim(1), scratch);
    if (p.finish == Finish::relu2) cuda::relu2(ctx, Relu2{.x = s.y, .y = s.y});
  }
  if (!ours.empty()) skinny90(ctx, skinny_finish(p.finish), p.x, ours, scratch);
  p.segments = rest;
  if (!rest.empty()) launch_product(ctx, p);
}

}  // namespace

void matvec(Context& ctx, const Matmul& a) { run(ctx, {.segments = a.segments, .x = a.x, .op = "matvec"}); }

void norm_matvec(Context& ctx, const NormMatvec& a) {
  run(ctx, {.segments = a.segments, .x = {}, .norm = &a, .op = "norm_matvec"});
}

void norm_matvec_relu2(Context& ctx, const NormMatvec& a) {
  run(ctx, {.segments = a.segments, .x = {}, .norm = &a, .finish = Finish::relu2, .op = "norm_matvec_relu2"});
}

void matvec_add(Context& ctx, const MatvecAdd& a) {
  const MatmulSegment segment{a.w, a.y};
  run(ctx, {.segments = {&segment, 1}, .x = a.x, .finish = Finish::add, .op = "matvec_add"});
}

// Partial sums of one launch; see plan_matvec for the bounds on parts.
size_t matvec_workspace(const Context& ctx, int64_t R, int64_t K, int64_t N) {
  const int64_t columns = std::min<int64_t>(R, kMaxColumns);
  const size_t partial = size_t(columns) * size_t(matvec_partial_rows(8 * N, K, device_of(ctx).sms)) * sizeof(float);
  return R >= kSkinnyMinRows ? std::max({partial, kGemmScratchBytes, skinny90_scratch_bytes(ctx)}) : partial;
}

}  // namespace kda::cuda
