// kernels/cuda/chain.h — several ops of few rows in one launch (docs/CUDA.md).
//
// While a step is recorded, ops that can join the chain wait until another op, or the recording's end, launches them.
// Outside of a recording each is launched at once, as a chain of one.
#pragma once
#include <span>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_decode_args.h"
#include "kernels/cuda/matvec_types.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"

namespace kda::cuda {

inline constexpr int kChainRows = 2;         // rows of x that a link takes at most
inline constexpr int kChainSlot = 8 * 2624;  // bytes of a place in the ring: 8 rows of a chunk
inline constexpr int kChainChunk = 2560;     // bytes of a row fetched at a time, at most

// Bytes between the rows of a chunk: an odd number of 64, so that rows lie in different banks.
__host__ __device__ inline int chain_stride(int chunk) { return chunk % 128 ? chunk : chunk + 64; }

struct ChainSegment {
  const uint8_t* w;
  const float* scale;  // nullptr for bf16
  void* y;
  const __nv_bfloat16* x;  // own input; nullptr where all share one
  int first, rows;         // within the link's rows
  Weight weight;
  uint16_t input;  // which of the link's inputs
  bool f32;        // y's type
};

// The product of R rows of x with stacked rows of weights.
struct ChainProduct {
  int segments;
  int rows_each, rows_more;  // of weights to a block, and the blocks that take one more
  int R, K, inputs, x_stride;
  Finish finish;
  bool wide, eight;  // weights of bf16, of 8 bits are among them
  int half_at;       // where x as fp16, for those of 8 bits, begins behind x as bf16
  float eps;
  const __nv_bfloat16* x;
  const float *residual, *norm;  // where not null: x is rms_norm(residual)
  ChainSegment segment[kMaxSegments];
};

// A KDA step, and where f_w is not null the products that give its f [R,H*K] = f_in f_w^T and g [R,H*V] = g_in g_w^T:
// with K = V = 128 and inputs as wide, the block that has a head finds them itself, which saves a link.
struct ChainKda {
  KdaDecodeArgs step;
  const uint8_t *f_w = nullptr, *g_w = nullptr;
  const float *f_scale = nullptr, *g_scale = nullptr;
  const __nv_bfloat16 *f_in = nullptr, *g_in = nullptr;
  Weight weight = Weight::bf16;
};
inline constexpr int kGateWidth = 128;

struct alignas(16) ChainLink {
  bool is_kda = false;
  union {
    ChainProduct product;
    ChainKda kda;
  };
  ChainLink() : product{} {}
  explicit ChainLink(const ChainProduct& p) : product(p) {}
  explicit ChainLink(const ChainKda& k) : is_kda(true), kda(k) {}
};
inline constexpr int kMaxLinks = int((32764 - 64) / sizeof(ChainLink));

// A kernel's arguments, at most 32,764 bytes.
struct Chain {
  int links = 0;
  int slots = 0;    // of the ring
  int x_bytes = 0;  // of shared memory before it
  unsigned* arrived = nullptr;
  ChainLink link[kMaxLinks];
};
static_assert(sizeof(Chain) <= 32764 && sizeof(ChainLink) <= 512);

// Either adds to the chain, launching it at once unless a step is being recorded, or returns false: then the op is not
// for the chain (too many rows, widths or devices that it does not take; a KDA step that follows no product, which is
// faster alone).
bool chain_product(Context&, std::span<const MatmulSegment>, ConstView x, const NormMatvec* norm, Finish);
bool chain_kda_decode(Context&, const KdaDecodeArgs&);

}  // namespace kda::cuda
