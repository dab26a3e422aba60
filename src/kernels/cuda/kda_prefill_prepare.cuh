// kernels/cuda/kda_prefill_prepare.cuh — what of a chunk of 64 tokens does not touch the state: gates, unit lengths,
// scores, the triangular solve. By one block for each chunk and head.
#pragma once
#include "kernels/cuda/kda_prefill_parts.cuh"
#include "kernels/cuda/kda_prefill_tokens.cuh"

#ifdef __CUDACC__
namespace kda::cuda::prefill {

// One block of kThreads: `count` tokens of head h from token0 on, into `record`. shared: Layout<K>::bytes.
template <int K>
__device__ __forceinline__ void prepare_chunk(const Args& a, char* const shared, const int64_t token0, const int count,
                                              const int h, char* const record) {
  using M = Layout<K>;
  constexpr int C = K / 32;  // channels of a lane
  char* const keys = shared + M::keys;
  float* const L = reinterpret_cast<float*>(shared + M::L);
  char* const P = shared + M::P;
  const auto beta = [&](int t) -> float& { return *reinterpret_cast<float*>(P + (t >> 4) * 128 + 64 + (t & 15) * 4); };
  float* const sums = L;  // [8][K] until the scores come

  const int H = a.H, V = a.V;
  int tid = int(threadIdx.x);
  asm volatile("" : "+r"(tid));  // a loop around this keeps no addresses in registers
  const int lane = tid & 31;
  const int w = __shfl_sync(~0u, tid >> 5, 0);  // the same in all lanes: branches on it are the warp's

  // ---- this warp's 8 tokens, this lane's C channels: q and k at unit length, decays
  const int ch = lane * C;
  Channels<C> q[8], k[8];
  float d[8][C];
  Raw<C> f[8];
  {
    Raw<C> qr[8], kr[8];
    const int64_t row = int64_t(H) * K, from = ((token0 + 8 * w) * H + h) * K + ch;
    const int last = max(count - 1 - 8 * w, -8 * w);  // a token that is there
#pragma unroll
    for (int t = 0; t < 8; ++t) qr[t].load(a.q + from + min(t, last) * row);
#pragma unroll
    for (int t = 0; t < 8; ++t) kr[t].load(a.k + from + min(t, last) * row);
#pragma unroll
    for (int t = 0; t < 8; ++t) f[t].load(a.f + from + min(t, last) * row);
    if (tid < 64) {
      const float x = tid < count ? __bfloat162float(a.b[(token0 + tid) * H + h]) : 0.0f;
      beta(tid) = tid < count ? a.beta_scale / (1.0f + expf(-x)) : 0.0f;
    }
    if (count < kChunk) {
#pragma unroll
      for (int t = 0; t < 8; ++t)
        if (t > last) qr[t].clear(), kr[t].clear(), f[t].clear();
    }
    float x[16];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      float qf[C], kf[C];
      qr[t].widen(qf), kr[t].widen(kf);
      x[t] = x[8 + t] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) x[t] += qf[c] * qf[c], x[8 + t] += kf[c] * kf[c];
    }
    fold<16>(x, lane);
    const float r = rsqrtf(x[0] + shuffled(x[0], 16) + kL2NormEps);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      float qf[C], kf[C];
      qr[t].widen(qf), kr[t].widen(kf);
      q[t].set(qf, __shfl_sync(~0u, r, t));
      k[t].set(kf, __shfl_sync(~0u, r, 8 + t));
    }
  }
  {
    const float A = expf(a.A_log[h]);
    float sum[C], bias[C];
#pragma unroll
    for (int c = 0; c < C; ++c) bias[c] = a.dt_bias[h * K + ch + c], sum[c] = 0;
    const auto decays = [&](auto log2_of) {
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        f[t].widen(d[t]);
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const float x = log2_of(d[t][c] + bias[c], 8 * w + t < count);
          sum[c] += x;
          d[t][c] = exp2_fast(x);
        }
      }
    };
    // Tokens beyond the sequence's end leave a state alone.
    if (a.bounded)
      decays([&](float z, bool there) { return bounded_log2(z, A, there ? a.lower_bound : 0.0f); });
    else
      decays([&](float z, bool there) { return softplus_log2(z, there ? A : 0.0f); });
#pragma unroll
    for (int c = 0; c < C; ++c) sums[w * K + ch + c] = sum[c];
  }
  __syncthreads();

  // ---- pairs within 8 tokens, as if mild channels did not decay: exact products of the rounded q and k.
  const uint32_t base = shared_address(shared);
  const int g = lane >> 2, tq = lane & 3;
  float* const undecayed = sums + 8 * K + w * 128;  // [2,8,8]: of k, of q
  // At least half of what a channel holds outlives these 8 tokens.
  const auto mild = [&](int c) { return sums[w * K + ch + c] > -1; };
  {
    float x[4] = {};
    bool some = false, all = true;
#pragma unroll
    for (int c = 0; c < C; ++c) some |= mild(c), all &= mild(c);
    if (__any_sync(~0u, some)) {
      Channels<C> mask;
      float one[C];
#pragma unroll
      for (int c = 0; c < C; ++c) one[c] = mild(c) ? 1.0f : 0.0f;
      mask.set(one, 1);
#pragma unroll
      for (int t = 0; t < 8; ++t) {  // where only this warp writes, later
        char* const to = shared + at<K>(8 * w + t, ch / 8) + (ch % 8) * 2;
        (k[t] * mask).store(to), k[t].store(to + M::level), q[t].store(to + 2 * M::level);
      }
      __syncwarp();
      score_tile<K>(x, base, (lane & 8 ? 192 : 96) + 8 * w + (lane & 7), 8 * w + (lane & 7), lane);
      // A key that comes again and again with beta near 2 must keep its length: what rounding did to it goes to beta.
      const float square = lane & 4 ? x[1] : x[0];
      if (__all_sync(~0u, all) && tq == g >> 1 && square > 0.5f) beta(8 * w + g) /= square;
    }
    *reinterpret_cast<float2*>(undecayed + 8 * g + 2 * tq) = make_float2(x[0], x[1]);
    *reinterpret_cast<float2*>(undecayed + 64 + 8 * g + 2 * tq) = make_float2(x[2], x[3]);
    __syncwarp();
  }

  // ---- rows scaled to each level's border, K^, Q^, K'
  {
    // Factors from the other blocks of 8: to the border of 16, of 32, and to the chunk's start and end.
    Channels<C> f16, f32, before, behind;
    {
      float s16[C] = {}, s32[C] = {}, start[C] = {}, end[C] = {};
      const auto block = [&](float(&x)[C], int j) {
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = sums[j * K + ch + c];
      };
      const auto add = [&](float(&to)[C], const float(&x)[C]) {
#pragma unroll
        for (int c = 0; c < C; ++c) to[c] += x[c];
      };
      float x[C];
#pragma unroll 1
      for (int j = 0; j < w; ++j) {
        block(x, j);
        add(start, x);
        if (j >= (w & 4) && (w & 4)) add(s32, x);
        if ((w & 2) && j == (w ^ 1)) add(s16, x);
      }
#pragma unroll 1
      for (int j = w + 1; j < 8; ++j) {
        block(x, j);
        add(end, x);
        if (j < 4 && !(w & 4)) add(s32, x);
        if (!(w & 2) && j == (w ^ 1)) add(s16, x);
      }
      if (w == 0) {
        block(x, 0);
        float* const E = reinterpret_cast<float*>(record + Record<K>::e);
#pragma unroll
        for (int c = 0; c < C; ++c) {
          E[ch + c] = exp2f(x[c] + end[c]);
          reinterpret_cast<float*>(record + Record<K>::p + spare_at(ch / 4, 0))[ch % 4 + c] = E[ch + c];
        }
      }
#pragma unroll
      for (int c = 0; c < C; ++c)
        s16[c] = exp2_fast(s16[c]), s32[c] = exp2_fast(s32[c]), start[c] = exp2_fast(start[c]),
        end[c] = exp2_fast(end[c]);
      f16.set(s16, 1), f32.set(s32, 1), before.set(start, 1), behind.set(end, 1);
    }
    const int unit = ch / 8, byte = (ch % 8) * 2;
    const auto at_row = [&](int r, int t) { return at<K>(8 * r + t, unit) + byte; };  // of 8 rows, the t-th
    // p: what reaches each token of the state at the 8's start; then what of its write is left at their end.
    Channels<C> p[8];
    float whole[C];
#pragma unroll
    for (int c = 0; c < C; ++c) whole[c] = 1;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
      for (int c = 0; c < C; ++c) whole[c] *= d[t][c];
      p[t].set(whole, 1);
      const Channels<C> x = p[t] * before;
      (k[t] * x).store(keys + at_row(w, t));
      (q[t] * x).store(record + Record<K>::q + tile_at(8 * w + t, unit) + byte);
    }
    const auto rows = [&](int level, int r, auto scaled) {
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const Channels<C> x = scaled(t);
        (k[t] * x).store(shared + level * M::level + at_row(w, t));
        (q[t] * x).store(shared + level * M::level + at_row(8 + r, t));
      }
    };
    if (w & 1) rows(0, w >> 1, [&](int t) { return p[t]; });
    if (w & 2) rows(1, (w >> 2) * 2 + (w & 1), [&](int t) { return p[t] * f16; });
    if (w & 4) rows(2, w & 3, [&](int t) { return p[t] * f32; });
#pragma unroll
    for (int c = 0; c < C; ++c) whole[c] = 1;
#pragma unroll
    for (int t = 7; t >= 0; --t) {
      p[t].set(whole, 1);
      (k[t] * (p[t] * behind)).store(record + Record<K>::k + tile_at(8 * w + t, unit) + byte);
#pragma unroll
      for (int c = 0; c < C; ++c) whole[c] *= d[t][c];
    }
    const auto columns = [&](int level, auto scaled) {
#pragma unroll
      for (int t = 0; t < 8; ++t) (k[t] * scaled(t)).store(shared + level * M::level + at_row(w, t));
    };
    if (!(w & 1)) columns(0, [&](int t) { return p[t]; });
    if (!(w & 2)) columns(1, [&](int t) { return p[t] * f16; });
    if (!(w & 4)) columns(2, [&](int t) { return p[t] * f32; });
  }

  __syncwarp();  // nothing of what follows moves up: it would not fit into registers
  // ---- pairs within 8 tokens: what products of the decays themselves take from the above. {L,P} of 28 pairs i < t and
  // P of two tokens with themselves in each of the last four, summed over the lanes: lane l gets number l.
  __half2 near[32];
  {
    // lost: what decays take of a mild channel; of others, what they leave, with a minus.
    Channels<C> decay[8], loss[8], none;
    {
      float x[C];
      bool is_mild[C];
#pragma unroll
      for (int c = 0; c < C; ++c) is_mild[c] = mild(c), x[c] = is_mild[c] ? 0.0f : -1.0f;
      none.set(x, 1);
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        decay[t].set(d[t], 1);
#pragma unroll
        for (int c = 0; c < C; ++c) x[c] = is_mild[c] ? 1.0f - d[t][c] : 0.0f;
        loss[t].set(x, 1);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      Channels<C> lost = none;
#pragma unroll
      for (int t = i + 1; t < 8; ++t) {
        lost = lost.times_plus(decay[t], loss[t]);
        const Channels<C> key = k[i] * lost;
        const __half2 kk = key.dot(k[t]), qk = key.dot(q[t]);
        near[i * 7 - i * (i - 1) / 2 + t - i - 1] = __hadd2(__lows2half2(kk, qk), __highs2half2(kk, qk));
      }
    }
#pragma unroll
    for (int t = 0; t < 8; t += 2) {
      const __half2 x = k[t].dot(q[t]), y = k[t + 1].dot(q[t + 1]);
      near[28 + t / 2] = __hadd2(__lows2half2(x, y), __highs2half2(x, y));
    }
    fold<32>(near, lane);
  }
  // This lane's pair: row t, column i of the 8.
  int pair_i = 0, pair_t = lane;
#pragma unroll
  for (int row = 7; row > 0; --row)
    if (pair_t >= row && pair_i == 7 - row) pair_t -= row, ++pair_i;
  pair_t += pair_i + 1;
  const float2 lost = __half22float2(near[0]);
  float pair_L = 0, pair_P = 0;
  if (lane < 28)
    pair_L = undecayed[8 * pair_t + pair_i] - lost.x, pair_P = undecayed[64 + 8 * pair_t + pair_i] - lost.y;
  __syncthreads();

  // ---- scores: L times beta of its row, P
  const auto p_at = [&](int t, int i) -> __half& {
    return *reinterpret_cast<__half*>(P + at64(t, i / 8) + (i % 8) * 2);
  };
  if (lane < 28) {
    const int t = 8 * w + pair_t, i = 8 * w + pair_i;
    L[at_f(t, i)] = beta(t) * pair_L;
    p_at(t, i) = __float2half(pair_P);
  } else {
    const int t = 8 * w + 2 * (lane - 28);
    p_at(t, t) = __low2half(near[0]);
    p_at(t + 1, t + 1) = __high2half(near[0]);
  }
  // Rows t, t+8 and columns i, i+1 of a tile
  const auto put = [&](const float(&c)[4], int t, int t8, int i, bool is_q, bool is_q8) {
    if (is_q)
      *reinterpret_cast<uint32_t*>(P + at64(t, i / 8) + (i % 8) * 2) = half2_bits(c[0], c[1]);
    else
      *reinterpret_cast<float2*>(L + at_f(t, i)) = make_float2(beta(t) * c[0], beta(t) * c[1]);
    if (is_q8)
      *reinterpret_cast<uint32_t*>(P + at64(t8, i / 8) + (i % 8) * 2) = half2_bits(c[2], c[3]);
    else
      *reinterpret_cast<float2*>(L + at_f(t8, i)) = make_float2(beta(t8) * c[2], beta(t8) * c[3]);
  };
  {
    float c[4];
    {  // 32 apart: two tiles of rows of k and of q, four tiles of columns
      const int m = w & 3;
      const bool is_q = m & 2;
      const int a_row = (is_q ? 64 : 32) + 16 * (m & 1) + (lane & 15);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int col = 8 * (2 * (w >> 2) + j), t = 32 + 16 * (m & 1) + g;
        score_tile<K>(c, base + 2 * M::level, a_row, col + (lane & 7), lane);
        put(c, t, t + 8, col + 2 * tq, is_q, is_q);
      }
    }
    {  // 16 apart: two squares
      const int square = w >> 2, col = 32 * square + 8 * (w & 1), t = 32 * square + 16 + g;
      const bool is_q = w & 2;
      score_tile<K>(c, base + M::level, (is_q ? 64 + 16 * square : 32 * square + 16) + (lane & 15), col + (lane & 7),
                    lane);
      put(c, t, t + 8, col + 2 * tq, is_q, is_q);
    }
    if (w < 4) {  // 8 apart: four squares, k above q in one tile
      const int t = 16 * w + 8 + g;
      score_tile<K>(c, base, (lane & 8 ? 64 + 8 * w : 16 * w + 8) + (lane & 7), 16 * w + (lane & 7), lane);
      put(c, t, t, 16 * w + 2 * tq, false, true);
    } else {  // above the diagonal in P's blocks of 8
      const int i = tid - 128;
      if (i < 64)
        for (int c8 = i % 8 + 1; c8 < 8; ++c8)
          *reinterpret_cast<__half*>(P + at64(i, i / 8) + c8 * 2) = __float2half(0.0f);
    }
  }
  __syncthreads();

  // ---- v comes while the solve runs; the levels are over
  {
    const int shift = V == 128 ? 4 : 3;
    for (int i = tid; i < 64 << shift; i += kThreads) {
      const int r = i >> shift, u = i & ((1 << shift) - 1);
      const bool there = r < count;
      copy_async_or_zero(base + M::v + r * V * 2 + ((u ^ (r & 7)) * 16),
                         a.v + ((token0 + (there ? r : 0)) * H + h) * V + u * 8, there);
    }
    copy_async_commit();
  }

  // ---- X = (I + beta L)^-1 by halves: squares of 16, then 32, then 64
  float* const X = reinterpret_cast<float*>(shared + M::X);
  if (tid < 64) {
    const int r0 = tid & 48, col = tid & 15;
    float x[16];
#pragma unroll
    for (int t = 0; t < 16; ++t) {
      float s = t == col ? 1.0f : 0.0f;
#pragma unroll
      for (int i = 0; i < t; i += 4) {
        const float4 l = *reinterpret_cast<const float4*>(L + at_f(r0 + t, r0 + i));
        s -= l.x * x[i];
        if (i + 1 < t) s -= l.y * x[i + 1];
        if (i + 2 < t) s -= l.z * x[i + 2];
        if (i + 3 < t) s -= l.w * x[i + 3];
      }
      x[t] = s;
      X[at_f(r0 + t, r0 + col)] = s;
    }
  } else {
    // P to the record meanwhile, with zeros above its diagonal
    for (int i = tid - 64; i < 512; i += kThreads - 64) {
      if (i < 256 && ((i ^ (i >> 3)) & 6) == 4) continue;  // spare_at
      uint4 x = *reinterpret_cast<const uint4*>(P + i * 16);
      if (((i ^ (i >> 3)) & 7) > i >> 6) x = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(record + Record<K>::p + i * 16) = x;
    }
  }
  __syncthreads();
  // X10 = -X11 (L10 X00): 16 below 16, twice, then 32 below 32; 8 columns for each warp. A warp reads back only what it
  // wrote itself of the inner product.
  float* const product = reinterpret_cast<float*>(shared + M::product);
  if (w < 4) {
    const int top = 32 * (w >> 1), n = w & 1;
    float c[4] = {};
    for (int s = n; s < 2; ++s) product8(c, L, top + 16, top + 8 * s, X, top + 8 * s, top + 8 * n, g, tq);
    put8(product, 0, 8 * w, c, 1, g, tq);
    __syncwarp();
    c[0] = c[1] = c[2] = c[3] = 0;
    for (int s = 0; s < 2; ++s) product8(c, X, top + 16, top + 16 + 8 * s, product, 8 * s, 8 * w, g, tq);
    put8(X, top + 16, top + 8 * n, c, -1, g, tq);
  }
  __syncthreads();
  {
    const int n = w & 3, m = 16 * (w >> 2);
    float c[4] = {};
    for (int s = n; s < 4; ++s) product8(c, L, 32 + m, 8 * s, X, 8 * s, 8 * n, g, tq);
    put8(product, m, 8 * n, c, 1, g, tq);
    asm volatile("bar.sync %0, 64;" ::"r"(1 + n) : "memory");  // both warps of these columns
    c[0] = c[1] = c[2] = c[3] = 0;
    for (int s = 0; s < (m ? 4 : 2); ++s) product8(c, X, 32 + m, 32 + 8 * s, product, 8 * s, 8 * n, g, tq);
    put8(X, 32 + m, 8 * n, c, -1, g, tq);
  }
  __syncthreads();
  // T = X diag(beta), in two fp16 for the keys and two bf16 for v. Up to the end of each square of 16 on the diagonal.
  float squares = 0;  // of X
  for (int i = tid; i < 320; i += kThreads) {
    const int m = i < 128   ? 3
                  : i < 224 ? 2
                  : i < 288 ? 1
                            : 0,
              at_unit = i - (i < 128   ? 0
                             : i < 224 ? 128
                             : i < 288 ? 224
                                       : 288);
    const int r = 16 * m + (at_unit & 15), u = at_unit >> 4;
    const float4 x0 = *reinterpret_cast<const float4*>(X + at_f(r, 8 * u)),
                 x1 = *reinterpret_cast<const float4*>(X + at_f(r, 8 * u + 4));
    squares += x0.x * x0.x + x0.y * x0.y + x0.z * x0.z + x0.w * x0.w;
    squares += x1.x * x1.x + x1.y * x1.y + x1.z * x1.z + x1.w * x1.w;
    const float4 b0 = *reinterpret_cast<const float4*>(&beta(8 * u)),
                 b1 = *reinterpret_cast<const float4*>(&beta(8 * u + 4));
    const float y[8] = {x0.x * b0.x, x0.y * b0.y, x0.z * b0.z, x0.w * b0.w,
                        x1.x * b1.x, x1.y * b1.y, x1.z * b1.z, x1.w * b1.w};
    uint32_t t[4], t_rest[4], high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      t[e] = half2_bits(y[2 * e], y[2 * e + 1]);
      const float2 taken = half2_floats(t[e]);
      t_rest[e] = half2_bits(y[2 * e] - taken.x, y[2 * e + 1] - taken.y);
      const __nv_bfloat162 top = __floats2bfloat162_rn(y[2 * e], y[2 * e + 1]);
      const float2 back = __bfloat1622float2(top);
      const __nv_bfloat162 rest = __floats2bfloat162_rn(y[2 * e] - back.x, y[2 * e + 1] - back.y);
      high[e] = *reinterpret_cast<const uint32_t*>(&top);
      low[e] = *reinterpret_cast<const uint32_t*>(&rest);
    }
    *reinterpret_cast<uint4*>(shared + M::T + at64(r, u)) = make_uint4(t[0], t[1], t[2], t[3]);
    *reinterpret_cast<uint4*>(shared + M::T_rest + at64(r, u)) = make_uint4(t_rest[0], t_rest[1], t_rest[2], t_rest[3]);
    *reinterpret_cast<uint4*>(shared + M::T_high + at64(r, u)) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(shared + M::T_low + at64(r, u)) = make_uint4(low[0], low[1], low[2], low[3]);
  }
#pragma unroll
  for (int m = 16; m; m /= 2) squares += shuffled(squares, m);
  if (lane == 0) L[at_f(w / 4, 64 + w % 4)] = squares;  // behind a row
  copy_async_wait<0>();
  __syncthreads();
  {
    const float4 x = *reinterpret_cast<const float4*>(L + at_f(0, 64)),
                 y = *reinterpret_cast<const float4*>(L + at_f(1, 64));
    squares = ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
  }
  const bool large = squares - 64 > kLargeInverse * float(count);  // not where it is a NaN
  if (tid == 0) *reinterpret_cast<float*>(record + TokenRecord<K>::sign) = large ? by_tokens() : 0.0f;
  if (large) {
    write_tokens<K>(a, token0, count, h, record);
    return;
  }

  // ---- W = -T K^: 32 channels and two of the four tiles of 16 tokens for each warp
  const uint32_t keys_base = shared_address(keys);
  if ((w & 3) < K / 32) {
    const int slice = w & 3;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int m = part ? 3 - (w >> 2) : (w >> 2);
      float c[4][4] = {};
      for (int s = 0; s <= m; ++s) {
        uint32_t t[4], t_rest[4], b[4];
        ldmatrix(t, base + M::T + at64(16 * m + (lane & 15), 2 * s + (lane >> 4)));
        ldmatrix(t_rest, base + M::T_rest + at64(16 * m + (lane & 15), 2 * s + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          ldmatrix_t(b, keys_base + at<K>(16 * s + (lane & 15), slice * 4 + 2 * j + (lane >> 4)));
          mma(c[2 * j], t, b[0], b[1]);
          mma(c[2 * j + 1], t, b[2], b[3]);
          mma(c[2 * j], t_rest, b[0], b[1]);
          mma(c[2 * j + 1], t_rest, b[2], b[3]);
        }
      }
      // A quad's four lanes have two of every 8 channels: each takes the 8 of one tile.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = half2_bits(-c[i][2 * half], -c[i][2 * half + 1]);
        transpose_quad(x, lane);
        *reinterpret_cast<uint4*>(record + Record<K>::w + tile_at(16 * m + 8 * half + g, 4 * slice + tq)) =
            make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
  // ---- U0 = T v, transposed: 16 values for each warp
  if (w < V / 16) {
    float c[8][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t v[4];
      const int r = 16 * s + (lane & 7) + ((lane >> 4) << 3), u = 2 * w + ((lane >> 3) & 1);
      ldmatrix_t(v, base + M::v + r * V * 2 + ((u ^ (r & 7)) * 16));
#pragma unroll
      for (int j = 2 * s; j < 8; j += 2) {  // tokens 8 j .. 8 j + 15
        uint32_t b[4];
        const int row = 8 * j + (lane & 7) + ((lane >> 4) << 3), col = 2 * s + ((lane >> 3) & 1);
        ldmatrix(b, base + M::T_high + at64(row, col));
        mma_bf16(c[j], v, b[0], b[1]);
        mma_bf16(c[j + 1], v, b[2], b[3]);
        ldmatrix(b, base + M::T_low + at64(row, col));
        mma_bf16(c[j], v, b[0], b[1]);
        mma_bf16(c[j + 1], v, b[2], b[3]);
      }
    }
    // A power of two brings the largest of them to 2^10 .. 2^11: fp16 then holds any range of v.
    float most = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(c[j][e]));
#pragma unroll
    for (int m = 16; m; m /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, m));
    const int exponent = most > 0 ? max(int(__float_as_uint(most) >> 23) - 127, -100) : -100;
    const float scale = __uint_as_float(uint32_t(127 + 10 - exponent) << 23);
    char* const to = record + Record<K>::u + (w * 4 * 32 + lane) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<uint4*>(to + j * 512) = make_uint4(
          half2_bits(c[2 * j][0] * scale, c[2 * j][1] * scale), half2_bits(c[2 * j][2] * scale, c[2 * j][3] * scale),
          half2_bits(c[2 * j + 1][0] * scale, c[2 * j + 1][1] * scale),
          half2_bits(c[2 * j + 1][2] * scale, c[2 * j + 1][3] * scale));
    if (lane == 0) {
      const float back = __uint_as_float(uint32_t(127 - 10 + exponent) << 23);
      reinterpret_cast<float*>(record + Record<K>::scale(V))[w] = back;
      reinterpret_cast<float*>(record + Record<K>::p + spare_at(w / 4, 1))[w % 4] = back;
    }
  }
}

}  // namespace kda::cuda::prefill
#endif
