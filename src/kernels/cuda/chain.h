// kernels/cuda/chain.h — several ops of few rows in one launch (docs/CUDA.md).
//
// While a step is recorded, ops that can join the chain wait until another op, or the recording's end, launches them.
// Outside of a recording each is launched at once, as a chain of one.
// Memory that several of them write in turn is written by the last one only: an op must not read what is left of a
// tensor of which a later one has overwritten a part.
#pragma once
#include <span>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_decode_args.h"
#include "kernels/cuda/matvec_types.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"

namespace kda::cuda {

inline constexpr int kChainSegments = 6;  // of a link
inline constexpr int kChainRows = 2;      // rows of x that a link takes at most
inline constexpr int kChainSlot = 20480;  // bytes of a place in the ring, and of weights fetched at a time, at most
inline constexpr int kChainPiece = 64;    // bytes of a row that a warp takes at a time

inline constexpr uint32_t kMark = 0xffffffffu;  // what memory of values not there yet is full of; no result is it

// Pointers that lead to or from a later link of the same launch go to memory full of marks; `y` beside them is where
// other launches look, nullptr where a later link writes it anew.
struct ChainSegment {
  const uint8_t* w;
  const float* scale;  // nullptr for bf16
  void *y, *passed;
  const __nv_bfloat16* x;  // own input; nullptr where all share one
  int rows;
  // Rows are taken in groups of `group` (4 or 8), of which `first` is the segment's first within the link; of a row
  // `chunk` bytes are fetched at a time: all, or what the warps take in kChainTurns (chain_values.cuh).
  int first;
  uint16_t chunk;
  uint8_t group, input;  // which of the link's inputs
  bool f32;              // y's type
  Weight weight;
};

// The product of R rows of x with stacked rows of weights.
struct ChainProduct {
  int segments;
  int groups, fixed;  // of rows; how many of them each block has, the rest go to whoever is free
  int skipped;        // the first blocks, which have heads of the KDA step just before; 0 where more than half have
  int R, K, inputs;
  int x_width, x_stride;  // values: K, and zeros up to whole chunks of every segment; bytes of a row in shared memory
  Finish finish;
  bool wide, eight;  // weights of bf16, of 8 bits are among them
  uint8_t awaited;   // inputs, a bit for each, that a link before gives
  int half_at;       // where x as fp16, for those of 8 bits, begins behind x as bf16
  float eps, mean;   // mean: 1 / K
  const __nv_bfloat16* x;
  const float *residual, *norm;  // where not null: x is rms_norm(residual)
  const float* before;           // what y is added to; nullptr: nothing
  ChainSegment segment[kChainSegments];
};

// A KDA step, and where f_w is not null the products that give its f [R,H*K] = f_in f_w^T and g [R,H*V] = g_in g_w^T:
// with K = V = 128 and inputs as wide, the block that has a head finds them itself, which saves a link.
struct ChainKda {
  KdaDecodeArgs step;
  const uint8_t *f_w = nullptr, *g_w = nullptr;
  const float *f_scale = nullptr, *g_scale = nullptr;
  const __nv_bfloat16 *f_in = nullptr, *g_in = nullptr;
  __nv_bfloat16 *passed = nullptr, *f_out = nullptr, *g_out = nullptr;  // f and g for other launches, if not null
  uint8_t awaited = 0;  // of q, k, v, f or f_in, g or g_in, b, a bit for each, what a link before gives
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
  Weight eight = Weight::bf16;  // the type of its weights of 8 bits; bf16: there are none
  int slots = 0;                // of the ring
  int x_bytes = 0;              // of shared memory before it
  unsigned* tickets = nullptr;  // a mark for each link
  ChainLink link[kMaxLinks];
};
static_assert(sizeof(Chain) <= 32764 && sizeof(ChainLink) <= 512);

// Either adds to the chain, launching it at once unless a step is being recorded, or returns false: then the op is not
// for the chain (too many rows, widths or devices that it does not take; a KDA step that follows no product, which is
// faster alone).
bool chain_product(Context&, std::span<const MatmulSegment>, ConstView x, const NormMatvec* norm, Finish);
bool chain_kda_decode(Context&, const KdaDecodeArgs&);

}  // namespace kda::cuda
