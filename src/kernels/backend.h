// kernels/backend.h — the table of kernels, one row per backend, and what every op is called with.
//
// A new op is a header (argument struct, maths), a door (kernels/x.cc: checks, then the table), a line here and a line
// in each backend. A backend without a body says nullptr; its door then throws `OP: no body in backend NAME`.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "base/tensor.h"

namespace kda {

struct Context;

// How products are taken on the CPU. fast: bf16 operands, fp32 sums where the CPU has bf16 instructions; exact: fp32.
enum class Precision { fast, exact };

// N sequences packed along T tokens: sequence n is tokens start[n] .. start[n+1]-1; empty ones are allowed.
// Built once per batch; doors check the host copy, bodies read the one in the backend's memory.
struct Packing {
  std::span<const int32_t> host_start;  // [N+1]
  const int32_t* start = nullptr;       // [N+1] in the backend's memory; on the CPU the same array
  int64_t N() const { return int64_t(host_start.size()) - 1; }
  int64_t T() const { return host_start.back(); }
  int64_t longest() const;
};

// Where each sequence's state lies in a pool: int32 [N] in the backend's memory. in = -1: starts from zeros;
// out = -1: not kept. in == out updates in place; no slot may be written by two sequences.
struct Slots {
  const int32_t* in = nullptr;
  const int32_t* out = nullptr;
};

// A state wanted inside a sequence (for prefix caches): that of sequence `sequence` after its first `tokens` tokens of
// this call goes to pool slot `slot`. tokens: a multiple of 64, > 0 and < the sequence's tokens; marks are sorted by
// (sequence, tokens); no slot is used twice or by anything else of the call.
struct StateMark {
  int32_t sequence, tokens, slot;
};
struct StateMarks {
  std::span<const StateMark> host;
  const StateMark* device = nullptr;  // the same in the backend's memory; on the CPU the same array
};

struct Embedding;
struct RmsNorm;
struct AddRmsNorm;
struct Matmul;
struct NormMatvec;
struct MatvecAdd;
struct AddRows;
struct AddBias;
struct Relu2;
struct SwiGlu;
struct Rope;
struct Attention;
struct Conv;
struct KdaPrep;
struct KdaForward;
struct KdaOutput;
struct KdaPrefill;
struct KdaDecode;
struct Sample;
struct QuantizeRows;
struct MatmulDx;
struct MatmulDw;
struct RmsNormBackward;
struct AddBiasBackward;
struct Relu2Backward;
struct SwiGluBackward;
struct EmbeddingBackward;
struct AttentionTrain;
struct AttentionBackward;
struct AdamW;
struct SumSquares;
struct ConvBackward;
struct KdaForwardKeep;
struct KdaBackward;
struct KdaPrepBackward;
struct KdaOutputBackward;
struct LogitsLoss;
struct HiddenLoss;
struct TopK;

// Bytes in host memory that go to a backend's: where they lie in a file too, so that a backend may read them from there.
struct HostBytes {
  const void* data;
  size_t bytes;
  int file = -1;       // open for reading, or -1
  int64_t offset = 0;  // in the file
};

struct Transfer {
  void* to;  // in the backend's memory
  HostBytes from;
};

// Work that was recorded once: run() makes the same launches on the same memory, with what its arrays hold then.
class Recorded {
 public:
  virtual ~Recorded() = default;
  virtual void run(Context&) = 0;
};

struct Backend {
  const char* name;
  Dtype activation;  // of everything between a layer's norm and what it adds to the residual stream, which is f32
  std::string (*unavailable)();  // why nothing of this backend answers here, in a sentence; empty when it does
  void (*open)(Context&);        // device, streams and handles of a new context; throws Error with the cause
  Tensor (*alloc)(Dtype, Shape);                                     // zeroed
  // Either way, in the order of the compute stream: src may be reused, and a dst on the host read, when it returns.
  void (*copy)(Context&, void* dst, const void* src, size_t bytes);
  // Many bytes from pageable host memory or files, near the speed of the slower of both sides where they come in one
  // call; in the order of the compute stream, the sources may be reused when it returns.
  void (*upload)(Context&, std::span<const Transfer>);
  // Records what `work` launches, without running it. nullptr where a backend runs at once.
  std::unique_ptr<Recorded> (*record)(Context&, const std::function<void()>& work);
  // Bytes of scratch: what X_workspace_bytes of kernels/X.h asks.
  size_t (*matmul_workspace)(const Context&, int64_t R, int64_t K, int64_t N);
  size_t (*matvec_workspace)(const Context&, int64_t R, int64_t K, int64_t N);
  size_t (*attention_workspace)(const Context&, int64_t T, int64_t H, int64_t d, int64_t capacity);
  size_t (*kda_prefill_workspace)(const Context&, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V);
  size_t (*kda_decode_workspace)(const Context&, int64_t N, int64_t H, int64_t K, int64_t V);
  size_t (*sample_workspace)(const Context&, int64_t R, int64_t vocabulary);
  void (*embedding)(Context&, const Embedding&);
  void (*rms_norm)(Context&, const RmsNorm&);
  void (*add_rms_norm)(Context&, const AddRmsNorm&);
  void (*matmul)(Context&, const Matmul&);
  void (*matmul_relu2)(Context&, const Matmul&);
  void (*matvec)(Context&, const Matmul&);
  void (*norm_matvec)(Context&, const NormMatvec&);
  void (*norm_matvec_relu2)(Context&, const NormMatvec&);
  void (*matvec_add)(Context&, const MatvecAdd&);
  void (*add_rows)(Context&, const AddRows&);
  void (*add_bias)(Context&, const AddBias&);
  void (*relu2)(Context&, const Relu2&);
  void (*swiglu)(Context&, const SwiGlu&);
  void (*rope)(Context&, const Rope&);
  void (*attention)(Context&, const Attention&);
  void (*conv_silu)(Context&, const Conv&);
  void (*kda_prep)(Context&, const KdaPrep&);
  void (*kda_forward)(Context&, const KdaForward&);
  void (*kda_prefill)(Context&, const KdaPrefill&);
  void (*kda_output)(Context&, const KdaOutput&);
  void (*kda_decode)(Context&, const KdaDecode&);
  void (*sample)(Context&, const Sample&);
  void (*quantize_rows)(Context&, const QuantizeRows&);
  // training
  void (*matmul_dx)(Context&, const MatmulDx&);
  void (*matmul_dw)(Context&, const MatmulDw&);
  void (*rms_norm_backward)(Context&, const RmsNormBackward&);
  void (*add_bias_backward)(Context&, const AddBiasBackward&);
  void (*relu2_backward)(Context&, const Relu2Backward&);
  void (*swiglu_backward)(Context&, const SwiGluBackward&);
  void (*embedding_backward)(Context&, const EmbeddingBackward&);
  void (*rope_backward)(Context&, const Rope&);
  void (*attention_train)(Context&, const AttentionTrain&);
  void (*attention_backward)(Context&, const AttentionBackward&);
  void (*adamw)(Context&, const AdamW&);
  void (*sum_squares)(Context&, const SumSquares&);
  void (*conv_silu_backward)(Context&, const ConvBackward&);
  void (*kda_forward_keep)(Context&, const KdaForwardKeep&);
  void (*kda_backward)(Context&, const KdaBackward&);
  void (*kda_prep_backward)(Context&, const KdaPrepBackward&);
  void (*kda_output_backward)(Context&, const KdaOutputBackward&);
  void (*logits_loss)(Context&, const LogitsLoss&);
  void (*hidden_loss)(Context&, const HiddenLoss&);
  void (*top_k)(Context&, const TopK&);
};

// What an op runs on. The workspace is scratch for one op at a time, sized beforehand with X_workspace_bytes.
struct Context {
  const Backend* backend = nullptr;
  ThreadPool* pool = nullptr;
  Precision precision = Precision::fast;
  Tensor workspace;             // u8 [bytes] in the backend's memory
  void* stream = nullptr;       // cudaStream_t for CUDA: compute
  void* copy_stream = nullptr;  // cudaStream_t for CUDA: copies
  std::shared_ptr<void> device; // what open() made: the backend's handles, its properties, cached plans
};

// Throws Error unless the context's workspace holds `bytes`; returns its start.
void* workspace(Context&, size_t bytes, const char* op);

const Backend& cpu_backend();
const Backend* cuda_backend();  // nullptr when built without CUDA (cuda/none.cc); see `unavailable`

// Used by the doors: throws unless the backend has a body for the op.
template <class F>
F body(Context& ctx, F f, const char* op) {
  KDA_CHECK(f, op, ": no body in backend ", ctx.backend->name);
  return f;
}

}  // namespace kda
