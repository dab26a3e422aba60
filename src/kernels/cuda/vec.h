// kernels/cuda/vec.h — device code: groups of elements moved by one access, widened to float.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kda::cuda {

// n elements in one access of sizeof(E) * n bytes; the address must be a multiple of that.
template <class E, int n>
struct alignas(sizeof(E) * n) Group {
  E e[n];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
template <class E>
__device__ inline E narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <int n, class E>
__device__ inline void load(float (&to)[n], const E* from) {
  const auto g = *reinterpret_cast<const Group<E, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = widen(g.e[i]);
}
// f32 goes four at a time, the widest access there is.
template <int n>
__device__ inline void load(float (&to)[n], const float* from) {
  if constexpr (n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 g = *reinterpret_cast<const float4*>(from + i);
      to[i] = g.x, to[i + 1] = g.y, to[i + 2] = g.z, to[i + 3] = g.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}
template <int n, class E>
__device__ inline void store(E* to, const float (&from)[n]) {
  if constexpr (sizeof(E) == 4 && n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4)
      *reinterpret_cast<float4*>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
  } else {
    Group<E, n> g;
#pragma unroll
    for (int i = 0; i < n; ++i) g.e[i] = narrow<E>(from[i]);
    *reinterpret_cast<Group<E, n>*>(to) = g;
  }
}

// n of bf16 as they came, so that many can be on their way in few registers; widened where they are used.
template <int n>
struct Raw;
template <>
struct Raw<8> {
  uint4 bits = {};
  __device__ void load(const __nv_bfloat16* from) { bits = *reinterpret_cast<const uint4*>(from); }
  __device__ float operator[](int i) const {
    const uint32_t two = i < 2 ? bits.x : i < 4 ? bits.y : i < 6 ? bits.z : bits.w;
    return __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
  }
};
template <>
struct Raw<1> {
  float value = 0;
  __device__ void load(const __nv_bfloat16* from) { value = __bfloat162float(*from); }
  __device__ float operator[](int) const { return value; }
};

// For results that are rounded to bf16: exp's few units of error in the last place of f32 are far below that.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Whether an address allows accesses of `bytes`.
inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace kda::cuda
