// kernels/cuda/kda_prefill_tokens.cuh — a chunk token by token, in fp32: where the inverse of its triangular matrix is
// so large that the chunk's products, with operands of 11 bits, would lose too much. docs/CUDA-KDA.md.
#pragma once
#include "kernels/cuda/kda_prefill_group.cuh"
#include "kernels/cuda/kda_prefill_parts.cuh"

#ifdef __CUDACC__
namespace kda::cuda::prefill {

// What the error of a chunk's products grows with is the size of X = (1 + beta L)^-1: U is X's rows times what the
// tokens see of the state, and a key that comes back with beta near 2 makes that a long sum of alternating signs. The
// mean square of X's rows is 1 without any correlation, 2 at most with equal keys and beta at most 1, 2 with random
// keys and beta = 2, and 127 with equal keys and beta = 2. Above 1 + this:
inline constexpr float kLargeInverse = 7;

// What such a chunk's record has instead of W and K': the decays [token][K], f32; and factors of each token [3][64],
// f32, where E lies and once more in P: beta over the length of k, 1 over that length, K^-1/2 over q's. Instead of the
// inverse of each of U0's powers it has by_tokens(); the last word of E is that, or 0 in other records.
template <int K>
struct TokenRecord {
  static constexpr int64_t decays = Record<K>::w, in_e = Record<K>::e, in_p = Record<K>::p + 64 * 64;
  static constexpr int64_t sign = Record<K>::e + 1020;
};
__device__ inline float by_tokens() { return __uint_as_float(0x7f800000u); }  // infinity

// By one block of kThreads.
template <int K>
__device__ __forceinline__ void write_tokens(const Args& a, const int64_t token0, const int count, const int h,
                                             char* const record) {
  constexpr int C = K / 32;
  const int lane = int(threadIdx.x) & 31, w = int(threadIdx.x) >> 5, ch = lane * C;
  const float A = expf(a.A_log[h]);
  if (const int i = int(threadIdx.x); i < a.V / 16) {
    reinterpret_cast<float*>(record + Record<K>::scale(a.V))[i] = by_tokens();
    reinterpret_cast<float*>(record + Record<K>::p + spare_at(i / 4, 1))[i % 4] = by_tokens();
  }
#pragma unroll 1
  for (int t = w; t < count; t += kThreads / 32) {
    const int64_t row = (token0 + t) * a.H + h;
    Raw<C> qr, kr, f;
    qr.load(a.q + row * K + ch), kr.load(a.k + row * K + ch), f.load(a.f + row * K + ch);
    float q[C], k[C], z[C], qq = 0, kk = 0;
    qr.widen(q), kr.widen(k), f.widen(z);
    float* const d = reinterpret_cast<float*>(record + TokenRecord<K>::decays) + t * K + ch;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      qq += q[c] * q[c], kk += k[c] * k[c];
      const float x = z[c] + a.dt_bias[h * K + ch + c];
      d[c] = exp2_fast(a.bounded ? bounded_log2(x, A, a.lower_bound) : softplus_log2(x, A));
    }
#pragma unroll
    for (int m = 16; m; m /= 2) qq += shuffled(qq, m), kk += shuffled(kk, m);
    if (lane < 2) {
      float* const to = reinterpret_cast<float*>(record + (lane ? TokenRecord<K>::in_e : TokenRecord<K>::in_p)) + t;
      const float rk = rsqrtf(kk + kL2NormEps), x = __bfloat162float(a.b[row]);
      to[0] = a.beta_scale / (1.0f + expf(-x)) * rk, to[64] = rk;
      to[128] = rsqrtf(qq + kL2NormEps) * rsqrtf(float(K));
    }
  }
}

// By one warp, 16 rows of a state times `power` as load_rows has them, which becomes 1, the first of them row0 of v:
// `count` tokens of head h from token0 on. decays, factors: as above. Without `outputs`, no o; without `valued`, v is
// zero.
template <int K, bool outputs>
__device__ __forceinline__ void take_tokens(float (&S)[K / 8][4], float& power, const Args& a, const float* decays,
                                            const float* factors, const int64_t token0, const int count, const int h,
                                            const int row0, const bool valued) {
  constexpr int NT = K / 8;
  const int lane = int(threadIdx.x) & 31, g = lane >> 2, tq = lane & 3;
  const float by = inverse(power);
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) S[j][e] *= by;
  power = 1;
  const int64_t row = token0 * a.H + h;
  const uint32_t* k_at = reinterpret_cast<const uint32_t*>(a.k + row * K) + tq;
  const uint32_t* q_at = reinterpret_cast<const uint32_t*>(a.q + row * K) + tq;
  const __nv_bfloat16* v_at = a.v + row * a.V + row0 + g;
  __nv_bfloat16* o_at = a.o + row * a.V + row0 + g;
  uint32_t k[NT], q[NT], k_next[NT], q_next[NT];
  float v[2] = {}, v_next[2] = {};
  const auto ask = [&] {  // for the next token
#pragma unroll
    for (int j = 0; j < NT; ++j) k_next[j] = __ldg(k_at + 4 * j);
    if (valued) v_next[0] = __bfloat162float(v_at[0]), v_next[1] = __bfloat162float(v_at[8]);
    if (outputs) {
#pragma unroll
      for (int j = 0; j < NT; ++j) q_next[j] = __ldg(q_at + 4 * j);
    }
    k_at += a.H * (K / 2), q_at += a.H * (K / 2), v_at += a.H * a.V;
  };
  const auto over_quad = [](float x) {
    x += shuffled(x, 1);
    return x + shuffled(x, 2);
  };
  ask();
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      k[j] = k_next[j];
      if (outputs) q[j] = q_next[j];
    }
    v[0] = v_next[0], v[1] = v_next[1];
    if (t + 1 < count) ask();
    float seen[4] = {};
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(decays + t * K + 8 * j + 2 * tq);
      S[j][0] *= d.x, S[j][1] *= d.y, S[j][2] *= d.x, S[j][3] *= d.y;
      seen[0] += S[j][0] * low_bf16(k[j]), seen[1] += S[j][1] * high_bf16(k[j]);
      seen[2] += S[j][2] * low_bf16(k[j]), seen[3] += S[j][3] * high_bf16(k[j]);
    }
    const float rate = factors[t], rk = factors[64 + t];
    const float u0 = rate * (v[0] - rk * over_quad(seen[0] + seen[1]));
    const float u1 = rate * (v[1] - rk * over_quad(seen[2] + seen[3]));
    float out[4] = {};
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      S[j][0] += u0 * low_bf16(k[j]), S[j][1] += u0 * high_bf16(k[j]);
      S[j][2] += u1 * low_bf16(k[j]), S[j][3] += u1 * high_bf16(k[j]);
      if (outputs) {
        out[0] += S[j][0] * low_bf16(q[j]), out[1] += S[j][1] * high_bf16(q[j]);
        out[2] += S[j][2] * low_bf16(q[j]), out[3] += S[j][3] * high_bf16(q[j]);
      }
    }
    if (outputs) {
      const float rq = factors[128 + t], o0 = over_quad(out[0] + out[1]), o1 = over_quad(out[2] + out[3]);
      if (tq == 0) o_at[0] = __float2bfloat16(rq * o0), o_at[8] = __float2bfloat16(rq * o1);
      o_at += a.H * a.V;
    }
  }
}

}  // namespace kda::cuda::prefill
#endif
