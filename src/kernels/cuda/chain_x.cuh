// kernels/cuda/chain_x.cuh — what a link of a chain multiplies with, to shared memory when it is there (docs/CUDA.md).
#pragma once
#include <cuda_fp16.h>

#include "kernels/cuda/async.cuh"
#include "kernels/cuda/chain_values.cuh"
#include "kernels/cuda/kda_decode_kernel.cuh"
#include "kernels/cuda/matvec_kernel.cuh"

namespace kda::cuda {

#if __CUDA_ARCH__ >= 900

// Calls f(i, piece) for this thread's of `pieces` of 16 bytes, where they are awaited when they are there. Rows are
// given out upwards, so a late piece is awaited at the highest before the others are asked for again.
template <class E, int kTaken, class F>
__device__ inline void take_pieces(const void* from, int pieces, bool awaited, F f) {
  const uint4* const at = static_cast<const uint4*>(from);
  for (int base = threadIdx.x; base < pieces; base += kTaken * kChainTakers) {
    uint4 v[kTaken];
#pragma unroll
    for (int j = 0; j < kTaken; ++j)
      if (base + j * kChainTakers < pieces) v[j] = load16(at + base + j * kChainTakers);
    while (awaited) {
      int last = -1;
#pragma unroll
      for (int j = 0; j < kTaken; ++j)
        if (base + j * kChainTakers < pieces && has_mark<E>(v[j])) last = j;
      if (last < 0) break;
      const uint4 late = await16<E>(at + base + last * kChainTakers);
#pragma unroll
      for (int j = 0; j < kTaken; ++j)
        if (j == last)
          v[j] = late;
        else if (base + j * kChainTakers < pieces && has_mark<E>(v[j]))
          v[j] = load16(at + base + j * kChainTakers);
    }
#pragma unroll
    for (int j = 0; j < kTaken; ++j)
      if (base + j * kChainTakers < pieces) f(base + j * kChainTakers, v[j]);
  }
}

struct Power {
  float value, inverse;
};
// What x of a link leaves beside it in shared memory.
struct TakenX {
  float sums[kChainRows * kChainWarps], most[kChainSegments * kChainRows * kChainWarps];
  float factor[kChainSegments * kChainRows];  // by which the products of a row are to be multiplied

  // The power of two that a row whose largest value is the largest of its warps' `most`, times `times`, is divided by:
  // 2^14 to 2^15 are left, or less of what was below 2^-112. What is no number stays none.
  __device__ Power power(int row, float times) const {
    float m = 0;
#pragma unroll
    for (int i = 0; i < kChainWarps; ++i) m = fmaxf(m, most[row * kChainWarps + i]);
    const int exponent = max(int(__float_as_uint(m * times) >> 23) - 14, 1);
    return {__uint_as_float(exponent << 23), __uint_as_float(254 - exponent << 23)};
  }
};
__device__ inline float warp_most(float v) {
  for (int m = 16; m; m >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, m));
  return v;
}
__device__ inline uint32_t half2_of(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(h);
}
// Two bf16 as fp16, times `by`.
__device__ inline uint32_t scaled(uint32_t v, float by) { return half2_of(low_bf16(v) * by, high_bf16(v) * by); }

// Where a link's x goes in shared memory: rows [inputs * R, x_stride] as bf16, and beside weights of 8 bits, which are
// fp16 to the matrix unit, as that: bf16 values times a power of two to each row that makes the largest 2^14 to 2^15,
// so that what fp16 cannot hold is less than 2^-38 of it. From value K to x_width there are zeros.
template <Weight kEight>
struct XShared {
  const ChainProduct& link;
  TakenX& taken;
  const bool has_wide, has_eight;
  const int R, K, stride;
  uint8_t *const wide, *const eight;  // one place where the link has only one kind
  float4 *const raw, *const norm;     // x [R,K] before its norm, and the norm's weights [K]

  __device__ XShared(const ChainProduct& l, uint8_t* shared, TakenX& t)
      : link(l),
        taken(t),
        has_wide(kEight == Weight::bf16 || l.wide),
        has_eight(kEight != Weight::bf16 && l.eight),
        R(l.R),
        K(l.K),
        stride(l.x_stride),
        wide(shared),
        eight(shared + l.half_at),
        raw(reinterpret_cast<float4*>(eight + R * stride)),
        norm(raw + R * (K / 4)) {}

  __device__ void pad() {
    const int pieces = (link.x_width - K) / 8;
#pragma unroll 1
    for (int row = 0; pieces && row < link.inputs * R; ++row)
      for (int i = threadIdx.x; i < pieces; i += kChainTakers) {
        const int at = row * stride + K * 2 + 16 * i;
        *reinterpret_cast<uint4*>(wide + at) = *reinterpret_cast<uint4*>(eight + at) = {};
      }
  }

  __device__ void ask_for_norm() {
#pragma unroll 1
    for (int i = threadIdx.x; i < K / 4; i += kChainTakers)
      copy16(shared_address(norm + i), reinterpret_cast<const float4*>(link.norm) + i);
    commit_copies();
  }
  // rms_norm of the residual's rows; `pieces` of 4 values of each.
  __device__ void take_normed(int pieces, bool awaited) {
    const int tid = threadIdx.x, warp = tid / 32;
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      float4* const keep = raw + r * (K / 4);
      float sum = 0, most = 0;
      take_pieces<float, 2>(link.residual + int64_t(r) * K, pieces, awaited, [&](int i, uint4 bits) {
        wait_copies<0>();  // this thread's of the norm, which are those that it reads here
        const float4 v = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                          __uint_as_float(bits.w)},
                     w = norm[i];
        keep[i] = v;
        sum = fmaf(v.x, v.x, sum), sum = fmaf(v.y, v.y, sum), sum = fmaf(v.z, v.z, sum), sum = fmaf(v.w, v.w, sum);
        most = fmaxf(fmaxf(fmaxf(most, fabsf(v.x * w.x)), fmaxf(fabsf(v.y * w.y), fabsf(v.z * w.z))), fabsf(v.w * w.w));
      });
      sum = warp_total(sum), most = warp_most(most);
      if (tid % 32 == 0) taken.sums[r * kChainWarps + warp] = sum, taken.most[r * kChainWarps + warp] = most;
    }
    chain_sync();
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kChainWarps; ++i) sum += taken.sums[r * kChainWarps + i];
      const float factor = rsqrtf(sum * link.mean + link.eps);
      const Power power = has_eight ? taken.power(r, factor) : Power{};
      if (has_eight && tid == 0) taken.factor[r] = power.value;
#pragma unroll 1
      for (int i = tid; i < pieces; i += kChainTakers) {
        const uint2 v = norm_apply(raw[r * (K / 4) + i], norm[i], factor);
        if (has_wide) {
          uint32_t* const to = reinterpret_cast<uint32_t*>(wide + r * stride + 16 * (i / 2)) + i % 2;
          to[0] = v.x, to[2] = v.y;
        }
        if (has_eight) {
          uint32_t* const to = reinterpret_cast<uint32_t*>(eight + r * stride + 32 * (i / 4)) + i % 4;
          to[0] = scaled(v.x, power.inverse), to[4] = scaled(v.y, power.inverse);
        }
      }
    }
  }

  // The inputs' rows as they are; `pieces` of 8 values of each.
  __device__ void take_given(int pieces, bool awaited) {
    const int tid = threadIdx.x, warp = tid / 32, rows = link.inputs * R;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const int input = row / R;
      const __nv_bfloat16* from = (link.inputs > 1 ? link.segment[input].x : link.x) + int64_t(row % R) * K;
      uint32_t most = 0;  // of both halves' absolute values, whose order is that of their bits
      take_pieces<__nv_bfloat16, 4>(from, pieces, awaited && link.awaited >> input & 1, [&](int i, uint4 v) {
        *reinterpret_cast<uint4*>(wide + row * stride + 16 * i) = {v.x, v.z, v.y, v.w};
        most = __vmaxu2(__vmaxu2(most, v.x & 0x7fff7fffu), __vmaxu2(v.y & 0x7fff7fffu, v.z & 0x7fff7fffu));
        most = __vmaxu2(most, v.w & 0x7fff7fffu);
      });
      if (!has_eight) continue;
      const float m = warp_most(fmaxf(low_bf16(most), high_bf16(most)));
      if (tid % 32 == 0) taken.most[row * kChainWarps + warp] = m;
    }
    if (!has_eight) return;
    chain_sync();
    // A lane has a piece; of two, one lane stores the first halves and its neighbour the second.
    const bool second = tid % 2;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const Power power = taken.power(row, 1);
      if (tid == 0) taken.factor[row] = power.value;
#pragma unroll 1
      for (int base = warp * 32; base < pieces; base += kChainTakers) {
        const int i = base + tid % 32;
        const int at = row * stride + 16 * i;
        const uint4 v = i < pieces ? *reinterpret_cast<const uint4*>(wide + at) : uint4{};
        const uint2 low{scaled(v.x, power.inverse), scaled(v.y, power.inverse)},
            high{scaled(v.z, power.inverse), scaled(v.w, power.inverse)}, mine = second ? high : low;
        uint2 other = second ? low : high;
        other.x = __shfl_xor_sync(0xffffffffu, other.x, 1), other.y = __shfl_xor_sync(0xffffffffu, other.y, 1);
        if (i < pieces)
          *reinterpret_cast<uint4*>(eight + at) =
              second ? uint4{other.x, other.y, mine.x, mine.y} : uint4{mine.x, mine.y, other.x, other.y};
      }
    }
  }

  // Where x is awaited, first a part of it as it is found: so the instructions are there when x is,
  // and write everything anew.
  __device__ void take() {
    pad();
    if (link.norm) ask_for_norm();
#pragma unroll 1
    for (bool comes = !link.awaited;; comes = true) {
      const int limit = comes ? K : kChainTakers;  // pieces
      if (link.norm)
        take_normed(min(K / 4, limit), comes && link.awaited);
      else
        take_given(min(K / 8, limit), comes);
      chain_sync();
      if (comes) break;
    }
  }
};

#endif

}  // namespace kda::cuda
