// The CUDA body of kda_decode.
#include "kernels/kda_decode.h"

#include <functional>

#include "tests/cuda.h"
#include "tests/ref/kda.h"

using namespace kda;
using namespace kda::test;

namespace {

using Doubles = std::vector<double>;

// A KDA layer's own weights, and T tokens' projections for it, rounded to bf16 where the device keeps them so.
struct Layer {
  int64_t T, H, K, V;
  KdaGateParams gate;
  float eps = 1e-5f;
  std::vector<float> q, k, v, f, b, g, q_conv, k_conv, v_conv, A, bias, g_bias, o_norm;

  Layer(const std::string& name, int64_t T_, int64_t H_, int64_t K_, int64_t V_, KdaGateParams gate_ = {})
      : T(T_), H(H_), K(K_), V(V_), gate(gate_) {
    const auto make = [&](const char* part, int64_t n, float size) { return values(name + part, n, size); };
    q = rounded(make("/q", T * H * K, 2)), k = rounded(make("/k", T * H * K, 2)), v = rounded(make("/v", T * H * V, 2));
    f = rounded(make("/f", T * H * K, 3)), b = rounded(make("/b", T * H, 3)), g = rounded(make("/g", T * H * V, 3));
    q_conv = make("/qc", H * K * 4, 1), k_conv = make("/kc", H * K * 4, 1), v_conv = make("/vc", H * V * 4, 1);
    A = make("/A", H, 1), bias = make("/bias", H * K, 2), g_bias = make("/gb", H * V, 1), o_norm = make("/on", V, 2);
  }
  int64_t channels() const { return 2 * H * K + H * V; }
};

struct State {
  int64_t slots;
  std::vector<float> window, S;
  State(const std::string& name, int64_t slots_, const Layer& l)
      : slots(slots_),
        window(rounded(values(name + "/window", slots_ * 3 * l.channels()))),
        S(values(name + "/S", slots_ * l.H * l.V * l.K, 0.3f)) {}
  bool operator==(const State&) const = default;
};

// What writes zeros over the first 64 slots at `slots` as the kernels do it: a step whose y that is. A step after it
// may begin before it has ended, and then sees the slots as they were.
class ZeroSlots {
 public:
  explicit ZeroSlots(Context& ctx) : ctx_(ctx), zeros_(ctx, Dtype::f32, std::vector<float>(4 * K)), none_(ctx, {-1}) {}
  void operator()(int32_t* slots) const {
    const auto x = [&](int64_t n) { return View{zeros_.view({1}).data, Dtype::bf16, {1, n}}; };
    const auto w = [&](Shape s) { return zeros_.view(s); };
    kda_decode(ctx_, {.q = x(K),
                      .k = x(K),
                      .v = x(K),
                      .f = x(K),
                      .b = x(1),
                      .g = x(K),
                      .q_conv = w({K, 4}),
                      .k_conv = w({K, 4}),
                      .v_conv = w({K, 4}),
                      .A_log = w({1}),
                      .dt_bias = w({K}),
                      .g_bias = w({K}),
                      .o_norm = w({K}),
                      .gate = {},
                      .eps = 1e-5f,
                      .window = View{zeros_.view({1}).data, Dtype::bf16, {1, 3, 3 * K}},  // not touched, as the state
                      .state = w({1, 1, K, K}),
                      .slots = {none_.data(), none_.data()},
                      .y = {slots, Dtype::bf16, {1, K}}});
  }

 private:
  static constexpr int64_t K = 128;
  Context& ctx_;
  TypedBuffer zeros_;
  DeviceArray<int32_t> none_;
};

// Row t of the layer's tokens for each t of `tokens`, as one decode step. before: launched on `in` right before it.
std::vector<float> step(Context& ctx, const Layer& l, const std::vector<int64_t>& tokens,
                        const std::vector<int32_t>& in, const std::vector<int32_t>& out, State& s,
                        const std::function<void(int32_t*)>& before = {}) {
  const int64_t N = int64_t(tokens.size()), HK = l.H * l.K, HV = l.H * l.V;
  const auto rows = [&](const std::vector<float>& x, int64_t D) {
    std::vector<float> y;
    for (int64_t t : tokens) y.insert(y.end(), x.begin() + t * D, x.begin() + (t + 1) * D);
    return TypedBuffer(ctx, Dtype::bf16, y);
  };
  TypedBuffer q = rows(l.q, HK), k = rows(l.k, HK), v = rows(l.v, HV), f = rows(l.f, HK), b = rows(l.b, l.H),
              g = rows(l.g, HV), window(ctx, Dtype::bf16, s.window), y(ctx, Dtype::bf16, N * HV);
  Buffer qc(ctx, l.q_conv), kc(ctx, l.k_conv), vc(ctx, l.v_conv), A(ctx, l.A), bias(ctx, l.bias), gb(ctx, l.g_bias),
      on(ctx, l.o_norm), S(ctx, s.S);
  const DeviceArray<int32_t> from(ctx, in), to(ctx, out);
  if (before) before(from.data());
  kda_decode(ctx, {.q = q.view({N, HK}),
                   .k = k.view({N, HK}),
                   .v = v.view({N, HV}),
                   .f = f.view({N, HK}),
                   .b = b.view({N, l.H}),
                   .g = g.view({N, HV}),
                   .q_conv = qc.view({HK, 4}),
                   .k_conv = kc.view({HK, 4}),
                   .v_conv = vc.view({HV, 4}),
                   .A_log = A.view({l.H}),
                   .dt_bias = bias.view({HK}),
                   .g_bias = gb.view({HV}),
                   .o_norm = on.view({l.V}),
                   .gate = l.gate,
                   .eps = l.eps,
                   .window = window.view({s.slots, 3, l.channels()}),
                   .state = S.view({s.slots, l.H, l.V, l.K}),
                   .slots = {from.data(), to.data()},
                   .y = y.view({N, HV})});
  EXPECT_TRUE(y.guards_intact() && window.guards_intact() && S.guards_intact());
  s.window = window.fetch(), s.S = S.fetch();
  return y.fetch();
}

// All the layer's tokens, one after another, of one sequence in slot 0.
std::vector<float> steps(Context& ctx, const Layer& l, State& s) {
  std::vector<float> y;
  for (int64_t t = 0; t < l.T; ++t) {
    const auto row = step(ctx, l, {t}, {0}, {0}, s);
    y.insert(y.end(), row.begin(), row.end());
  }
  return y;
}

// The whole layer over its tokens of one sequence in slot 0, in double.
Doubles reference(const Layer& l, const State& s, Doubles& S, Doubles& window) {
  const int64_t T = l.T, H = l.H, K = l.K, V = l.V, HK = H * K, C = l.channels();
  window = wide(s.window);
  const auto conv = [&](const std::vector<float>& x, const std::vector<float>& w, int64_t first, int64_t n) {
    Doubles before;
    for (int64_t j = 0; j < 3; ++j)
      before.insert(before.end(), s.window.begin() + j * C + first, s.window.begin() + j * C + first + n);
    const auto r = ref::conv_silu(wide(x), wide(w), before, T, n);
    for (int64_t j = 0; j < 3; ++j) std::copy_n(r.window.begin() + j * n, n, window.begin() + j * C + first);
    return r.y;
  };
  const auto q = ref::unit_rows(conv(l.q, l.q_conv, 0, HK), K), k = ref::unit_rows(conv(l.k, l.k_conv, HK, HK), K);
  const auto v = conv(l.v, l.v_conv, 2 * HK, H * V);
  const auto g = ref::log_decay(wide(l.f), wide(l.A), wide(l.bias), H, K,
                                l.gate.kind == KdaGate::softplus ? 0 : double(l.gate.lower_bound));
  const auto beta = ref::beta(wide(l.b), l.gate.beta_scale);
  Doubles o(size_t(T * H * V));
  S = wide(s.S);
  for (int64_t h = 0; h < H; ++h) {
    const auto cut = [&](const Doubles& x, int64_t D) { return ref::head(x, 0, T, H, h, D); };
    Doubles one(S.begin() + h * V * K, S.begin() + (h + 1) * V * K);
    const auto y = ref::recurrence(cut(q, K), cut(k, K), cut(v, V), cut(g, K), cut(beta, 1), one, K, V);
    for (int64_t t = 0; t < T; ++t) std::copy_n(y.begin() + t * V, V, o.begin() + (t * H + h) * V);
    std::copy(one.begin(), one.end(), S.begin() + h * V * K);
  }
  return ref::gated_norm(o, wide(l.g), wide(l.g_bias), wide(l.o_norm), double(l.eps), H, V);
}

// y is rounded to bf16 once, which is 2^-9 at most and a bit more than half of that as a root of a mean of squares.
constexpr double kOutput = 2e-3, kState = 5e-7;

TEST(CudaKdaDecode, TokenByTokenFollowsTheReference) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const std::pair<int64_t, int64_t> sizes[] = {{128, 128}, {64, 64}, {64, 128}, {128, 64},
                                               {32, 64},   {20, 12}, {1, 1},    {192, 33}};
  for (const auto& [K, V] : sizes)
    for (const KdaGateParams gate : {KdaGateParams{}, {.kind = KdaGate::bounded, .beta_scale = 2}}) {
      const std::string what = cat("decode/K", K, "_V", V, "_gate", int(gate.kind));
      const Layer l(what, 20, 2, K, V, gate);
      State s(what, 1, l);
      Doubles S, window;
      const auto want = reference(l, s, S, window);
      auto got = steps(ctx, l, s);
      EXPECT_LE(relative_l2(got, want), kOutput) << what;
      EXPECT_LE(relative_l2(s.S, S), kState) << what;
      EXPECT_TRUE(close(s.window, window, 0, 1)) << what;
      got[got.size() / 2] += 0.1f;
      EXPECT_GT(relative_l2(got, want), kOutput) << "sabotage";
      s.S[s.S.size() / 2] += 1e-3f;
      EXPECT_GT(relative_l2(s.S, S), kState) << "sabotage";
    }
}

// More heads than the device holds at once: another kernel.
TEST(CudaKdaDecode, ManyHeadsFollowTheReference) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const KdaGateParams gate : {KdaGateParams{}, {.kind = KdaGate::bounded, .beta_scale = 2}}) {
    const std::string what = cat("decode/heads", int(gate.kind));
    const Layer l(what, 4, 300, 128, 128, gate);
    State s(what, 1, l);
    Doubles S, window;
    const auto want = reference(l, s, S, window);
    const auto got = steps(ctx, l, s);
    EXPECT_LE(relative_l2(got, want), kOutput) << what;
    EXPECT_LE(relative_l2(s.S, S), kState) << what;
    EXPECT_TRUE(close(s.window, window, 0, 1)) << what;
  }
}

TEST(CudaKdaDecode, ExtremeGates) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (float size : {1e4f, -1e4f}) {
    Layer l("extreme", 6, 2, 128, 128);
    for (float& f : l.f) f = std::abs(f) * size;
    l.f = rounded(l.f);
    State s("extreme", 1, l);
    Doubles S, window;
    const auto want = reference(l, s, S, window);
    const auto got = steps(ctx, l, s);
    EXPECT_LE(relative_l2(got, want), kOutput) << size;
    EXPECT_LE(relative_l2(s.S, S), kState) << size;
  }
}

// Few heads in a launch are each shared by a cluster's blocks, many are not, and very many have a kernel of their own.
TEST(CudaKdaDecode, ASequenceIsTheSameInAnyBatchInAnySlot) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [K, V, H, N] : {std::array<int64_t, 4>{128, 128, 20, 3},
                                   {128, 128, 20, 5},
                                   {128, 128, 20, 9},
                                   {128, 128, 20, 15},
                                   {64, 64, 3, 4},
                                   {20, 12, 3, 4}}) {
    const Layer l(cat("decode/batch", K), N, H, K, V);
    const State start(cat("decode/batch", K), N + 1, l);
    std::vector<int64_t> tokens;
    std::vector<int32_t> in, out;
    for (int64_t n = 0; n < N; ++n) {
      tokens.push_back(n);
      in.push_back(n == 1 ? -1 : int32_t((n + 2) % N));
      out.push_back(n == 2 ? -1 : n == 3 ? int32_t(N) : int32_t((n + 2) % N));
    }
    State s = start, alone = start;
    const auto y = step(ctx, l, tokens, in, out, s);
    std::vector<float> each;
    for (size_t n = 0; n < size_t(N); ++n) {
      const auto r = step(ctx, l, {int64_t(n)}, {in[n]}, {out[n]}, alone);
      each.insert(each.end(), r.begin(), r.end());
    }
    EXPECT_EQ(each, y) << K;
    EXPECT_EQ(alone, s) << K;
    EXPECT_FALSE(s == start);
  }
}

// A step begins while the launch before it still runs; what that one writes, the slots not less than the rest, counts.
TEST(CudaKdaDecode, SlotsAreThoseOfTheLaunchBefore) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const ZeroSlots zero(ctx);
  for (int64_t N : {1, 3, 5, 15}) {
    const Layer l("decode/slots", N, 20, 128, 128);
    const State start("decode/slots", N + 1, l);
    std::vector<int64_t> tokens;
    std::vector<int32_t> out;
    for (int64_t n = 0; n < N; ++n) tokens.push_back(n), out.push_back(int32_t(n + 1));
    const std::vector<int32_t> zeros(64);
    State want = start;
    const auto y = step(ctx, l, tokens, zeros, out, want);
    for (int32_t wrong : {-1, int32_t(N), 1 << 30, -7})
      for (int round = 0; round < 3; ++round) {
        State s = start;
        EXPECT_EQ(step(ctx, l, tokens, std::vector<int32_t>(64, wrong), out, s, zero), y) << N << " " << wrong;
        EXPECT_EQ(s, want) << N << " " << wrong;
      }
    State other = start;
    EXPECT_NE(step(ctx, l, tokens, std::vector<int32_t>(64, int32_t(N)), out, other), y) << "sabotage";
  }
}

TEST(CudaKdaDecode, ZeroStateIsNotReadAndNaNStays) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (int64_t K : {128, 16}) {
    Layer l("decode/nan", 1, 1, K, K);
    State zero("decode/nan", 1, l), nan = zero;
    zero.S.assign(zero.S.size(), 0), zero.window.assign(zero.window.size(), 0);
    nan.S.assign(nan.S.size(), NAN), nan.window.assign(nan.window.size(), NAN);
    EXPECT_EQ(step(ctx, l, {0}, {-1}, {0}, nan), step(ctx, l, {0}, {0}, {0}, zero));
    EXPECT_EQ(nan, zero);
    l.f[3] = NAN;
    EXPECT_TRUE(std::isnan(step(ctx, l, {0}, {0}, {0}, zero)[0]));
  }
}

}  // namespace
