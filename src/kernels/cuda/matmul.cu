// kernels/cuda/matmul.cu — products for prompts by cuBLASLt: bf16 operands, fp32 sums, bf16 or f32 results. A plan
// (which kernel, how it is cut) is found once for each shape by the library's heuristic and kept. Plans that split a
// sum among blocks are left out. What that gives: for one shape, device and library version the bits of a row depend on
// that row alone, whatever runs beside it; cuBLASLt promises no more, so another number of rows may have another plan
// and sum in another order. Weights in 8 bits are widened to bf16 (scale included), panel by panel, in the workspace.
#include "kernels/matmul.h"

#include <cublasLt.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "kernels/cuda/device.h"
#include "kernels/cuda/gemm90.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vec.h"
#include "kernels/pointwise.h"

namespace kda::cuda {

namespace {

constexpr size_t kLibraryBytes = size_t(32) << 20;  // NVIDIA's advice for sm_90
constexpr size_t kPanelBytes = size_t(32) << 20;
// The heuristic's first choices, and cuBLASLt's number for its kernels for sm_90 (as 13.1 reports it). Few rows and a
// long K bring others to the front where sums may not be split, up to five times slower and in another order of
// summation.
constexpr int kCandidates = 32, kWgmmaFamily = 66;

void check(cublasStatus_t s, const char* what) {
  KDA_CHECK(s == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", what, ": ", cublasLtGetStatusString(s));
}
#define KDA_LT(call) check((call), #call)

struct Shape3 {
  int64_t N, R, K, ld;  // ld: of y
  bool f32;
  unsigned align_w, align_x, align_y;
  bool operator<(const Shape3& o) const {
    const auto all = [](const Shape3& s) {
      return std::tie(s.N, s.R, s.K, s.ld, s.f32, s.align_w, s.align_x, s.align_y);
    };
    return all(*this) < all(o);
  }
};

// y^T [N,R] = W [N,K] x^T: the library counts by columns, so W is given as its transpose.
struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  size_t workspace = 0;

  Plan(cublasLtHandle_t library, const Shape3& s) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    KDA_LT(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    KDA_LT(cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    KDA_LT(cublasLtMatrixLayoutCreate(&w, CUDA_R_16BF, uint64_t(s.K), uint64_t(s.N), s.K));
    KDA_LT(cublasLtMatrixLayoutCreate(&x, CUDA_R_16BF, uint64_t(s.K), uint64_t(s.R), s.K));
    KDA_LT(cublasLtMatrixLayoutCreate(&y, s.f32 ? CUDA_R_32F : CUDA_R_16BF, uint64_t(s.N), uint64_t(s.R), s.ld));
    cublasLtMatmulPreference_t wish = nullptr;
    KDA_LT(cublasLtMatmulPreferenceCreate(&wish));
    const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE;
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& v) {
      KDA_LT(cublasLtMatmulPreferenceSetAttribute(wish, what, &v, sizeof v));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kLibraryBytes);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, no_split);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.align_w);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.align_x);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.align_y);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.align_y);
    cublasLtMatmulHeuristicResult_t found[kCandidates];
    int n = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(library, product, w, x, y, y, wish, kCandidates, found, &n);
    cublasLtMatmulPreferenceDestroy(wish);
    KDA_CHECK(status == CUBLAS_STATUS_SUCCESS && n > 0, "matmul: cuBLASLt has no kernel for [", s.R, ",", s.K, "] x [",
              s.N, ",", s.K, "]^T in bf16 on this device (", cublasLtGetStatusString(status), ")");
    const auto wgmma = [](const cublasLtMatmulHeuristicResult_t& r) {
      int32_t id = -1;
      size_t written = 0;
      return cublasLtMatmulAlgoConfigGetAttribute(&r.algo, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof id, &written) ==
                 CUBLAS_STATUS_SUCCESS &&
             id == kWgmmaFamily;
    };
    const auto* const best = std::find_if(found, found + n, wgmma);
    algorithm = (best == found + n ? found : best)->algo;
    workspace = (best == found + n ? found : best)->workspaceSize;
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    cublasLtMatrixLayoutDestroy(y);
    cublasLtMatrixLayoutDestroy(x);
    cublasLtMatrixLayoutDestroy(w);
    cublasLtMatmulDescDestroy(product);
  }
};

struct Library {
  cublasLtHandle_t handle = nullptr;
  std::map<Shape3, Plan> plans;

  Library() { KDA_LT(cublasLtCreate(&handle)); }
  ~Library() {
    plans.clear();
    cublasLtDestroy(handle);
  }
  const Plan& plan(const Shape3& s) { return plans.try_emplace(s, handle, s).first->second; }
};

Library& library_of(Context& ctx) {
  Device& d = device_of(ctx);
  if (!d.gemm) d.gemm = std::make_shared<Library>();
  return *static_cast<Library*>(d.gemm.get());
}

unsigned alignment(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return unsigned(std::min<uintptr_t>(at & ~(at - 1), 256));
}

// y [R,N], rows ld apart
void product(Context& ctx, const __nv_bfloat16* w, const __nv_bfloat16* x, void* y, bool f32, int64_t R, int64_t N,
             int64_t K, int64_t ld, void* scratch) {
  Library& lib = library_of(ctx);
  const Plan& p = lib.plan({N, R, K, ld, f32, alignment(w), alignment(x), alignment(y)});
  const float one = 1, zero = 0;
  check(cublasLtMatmul(lib.handle, p.product, &one, w, p.w, x, p.x, &zero, y, p.y, y, p.y, &p.algorithm, scratch,
                       p.workspace, stream_of(ctx)),
        "cublasLtMatmul");
}

// Rows of 8-bit weights times their scale, in bf16. n elements at once.
template <class Q, int n>
__global__ void widen_rows(const Q* q, const float* scale, __nv_bfloat16* w, int64_t size, int64_t K) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * n;
  if (at >= size) return;
  const float s = scale[at / K];
  const auto g = *reinterpret_cast<const Group<Q, n>*>(q + at);
  float v[n];
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = float(g.e[i]) * s;
  if constexpr (n == 16) {
    store(w + at, reinterpret_cast<const float(&)[8]>(v[0]));
    store(w + at + 8, reinterpret_cast<const float(&)[8]>(v[8]));
  } else {
    store(w + at, v);
  }
}

template <class Q>
void widen_panel(Context& ctx, const void* q, const float* scale, __nv_bfloat16* w, int64_t rows, int64_t K) {
  const int64_t size = rows * K;
  const auto* from = static_cast<const Q*>(q);
  if (K % 16 == 0 && aligned(q, 16))
    launch("matmul", ctx, unsigned(ceil_div(size, 16 * 256)), 256, 0, widen_rows<Q, 16>, from, scale, w, size, K);
  else
    launch("matmul", ctx, unsigned(ceil_div(size, 256)), 256, 0, widen_rows<Q, 1>, from, scale, w, size, K);
}

int64_t panel_rows(int64_t K) { return std::max<int64_t>(int64_t(kPanelBytes) / (2 * K) / 128 * 128, 128); }

Gemm90Part part_of(const ConstView& w, const View& y) { return {bf16_of(w), bf16_of(y), w.dim(0), w.dim(0)}; }

void multiply(Context& ctx, const ConstView& x, const MatmulSegment& s, bool squared) {
  const int64_t R = x.dim(0), K = x.dim(1), N = s.w.w.dim(0);
  const bool f32 = s.y.dtype == Dtype::f32;
  const Dtype d = s.w.w.dtype;
  char* scratch = static_cast<char*>(workspace(ctx, matmul_workspace(ctx, R, K, N), "matmul"));
  bool fused = false;
  if (d == Dtype::bf16) {
    product(ctx, bf16_of(s.w.w), bf16_of(x), s.y.data, f32, R, N, K, N, scratch);
  } else {
    auto* const panel = reinterpret_cast<__nv_bfloat16*>(scratch + kLibraryBytes);
    const int64_t most = std::min(N, panel_rows(K)), element = int64_t(size_of(s.y.dtype));
    const auto part = [&](int64_t n) {
      return Gemm90Part{panel, static_cast<__nv_bfloat16*>(s.y.data) + n, std::min(most, N - n), N};
    };
    const Gemm90Part first = f32 ? Gemm90Part{} : part(0);
    fused = !f32 && N % 2 == 0 && gemm90_pays(ctx, {&first, 1}, R) && gemm90_takes(ctx, x.data, {&first, 1}, R, K);
    for (int64_t n = 0; n < N; n += most) {
      const int64_t rows = std::min(most, N - n);
      const char* const q = static_cast<const char*>(s.w.w.data) + n * K;
      const float* const scale = s.w.scale.as<float>() + n;
      if (d == Dtype::i8)
        widen_panel<int8_t>(ctx, q, scale, panel, rows, K);
      else
        widen_panel<__nv_fp8_e4m3>(ctx, q, scale, panel, rows, K);
      if (fused) {
        const Gemm90Part p = part(n);
        gemm90(ctx, squared ? Epilogue::relu2 : Epilogue::none, bf16_of(x), {&p, 1}, R, K);
      } else {
        product(ctx, panel, bf16_of(x), static_cast<char*>(s.y.data) + n * element, f32, R, rows, K, N, scratch);
      }
    }
  }
  if (squared && !fused) cuda::relu2(ctx, Relu2{.x = s.y, .y = s.y});
}

// The matrices in bf16 whose results are bf16 go together, where the device has a kernel of ours for it.
void run(Context& ctx, const Matmul& a, bool squared) {
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  if (R == 0) return;
  const auto together = [](const MatmulSegment& s) {
    return s.w.w.dim(0) > 0 && s.w.w.dim(0) % 2 == 0 && s.w.w.dtype == Dtype::bf16 && s.y.dtype == Dtype::bf16;
  };
  Gemm90Part parts[kGemm90Parts];
  size_t n = 0;
  for (const MatmulSegment& s : a.segments)
    if (together(s)) parts[n++] = part_of(s.w.w, s.y);
  const std::span<const Gemm90Part> all(parts, n);
  const bool ours = n > 0 && gemm90_pays(ctx, all, R) && gemm90_takes(ctx, a.x.data, all, R, K);
  if (ours) gemm90(ctx, squared ? Epilogue::relu2 : Epilogue::none, bf16_of(a.x), all, R, K);
  for (const MatmulSegment& s : a.segments)
    if (s.w.w.dim(0) > 0 && !(ours && together(s))) multiply(ctx, a.x, s, squared);
}

}  // namespace

size_t matmul_workspace(const Context&, int64_t, int64_t K, int64_t N) {
  return kLibraryBytes + 2 * size_t(K) * size_t(std::min(N, panel_rows(K)));
}

void matmul(Context& ctx, const Matmul& a) { run(ctx, a, false); }
void matmul_relu2(Context& ctx, const Matmul& a) { run(ctx, a, true); }

}  // namespace kda::cuda
