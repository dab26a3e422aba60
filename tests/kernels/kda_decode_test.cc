#include "kernels/kda_decode.h"

#include "kernels/conv.h"
#include "kernels/kda.h"
#include "tests/kernels/kda_problem.h"

using namespace kda;
using namespace kda::test;

namespace {

// A KDA layer's own weights, and T tokens' projections for it.
struct Layer {
  int64_t T, H, K, V;
  KdaGateParams gate;
  float eps = 1e-5f;
  std::vector<float> q, k, v, f, b, g, q_conv, k_conv, v_conv, A, bias, g_bias, o_norm;

  Layer(const std::string& name, int64_t T_, int64_t H_, int64_t K_, int64_t V_, KdaGateParams gate_ = {})
      : T(T_), H(H_), K(K_), V(V_), gate(gate_) {
    const auto make = [&](const char* part, int64_t n, float size) { return values(name + part, n, size); };
    q = make("/q", T * H * K, 2), k = make("/k", T * H * K, 2), v = make("/v", T * H * V, 2);
    f = make("/f", T * H * K, 3), b = make("/b", T * H, 3), g = make("/g", T * H * V, 3);
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
        window(values(name + "/window", slots_ * 3 * l.channels())),
        S(values(name + "/S", slots_ * l.H * l.V * l.K, 0.3f)) {}
  bool operator==(const State&) const = default;
};

// Row t of the layer's tokens for each t of `tokens`, as one decode step.
std::vector<float> step(Context& ctx, const Layer& l, const std::vector<int64_t>& tokens,
                        const std::vector<int32_t>& in, const std::vector<int32_t>& out, State& s) {
  const int64_t N = int64_t(tokens.size()), HK = l.H * l.K, HV = l.H * l.V;
  const auto rows = [&](const std::vector<float>& x, int64_t D) {
    std::vector<float> y;
    for (int64_t t : tokens) y.insert(y.end(), x.begin() + t * D, x.begin() + (t + 1) * D);
    return y;
  };
  Buffer q(ctx, rows(l.q, HK)), k(ctx, rows(l.k, HK)), v(ctx, rows(l.v, HV)), f(ctx, rows(l.f, HK)),
      b(ctx, rows(l.b, l.H)), g(ctx, rows(l.g, HV)), qc(ctx, l.q_conv), kc(ctx, l.k_conv), vc(ctx, l.v_conv),
      A(ctx, l.A), bias(ctx, l.bias), gb(ctx, l.g_bias), on(ctx, l.o_norm), window(ctx, s.window), S(ctx, s.S),
      y(ctx, N * HV);
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
                   .slots = {in.data(), out.data()},
                   .y = y.view({N, HV})});
  EXPECT_TRUE(y.guards_intact() && window.guards_intact() && S.guards_intact());
  s.window = window.fetch(), s.S = S.fetch();
  return y.fetch();
}

// The whole layer over tokens [0,T) of one sequence in slot 0, in double.
Doubles reference(const Layer& l, const State& s, Doubles& S, Doubles& window) {
  const int64_t T = l.T, H = l.H, K = l.K, V = l.V, HK = H * K, C = l.channels();
  window = doubles(s.window);
  const auto conv = [&](const std::vector<float>& x, const std::vector<float>& w, int64_t first, int64_t n) {
    Doubles before;
    for (int64_t j = 0; j < 3; ++j)
      before.insert(before.end(), s.window.begin() + j * C + first, s.window.begin() + j * C + first + n);
    const auto r = ref::conv_silu(doubles(x), doubles(w), before, T, n);
    for (int64_t j = 0; j < 3; ++j) std::copy_n(r.window.begin() + j * n, n, window.begin() + j * C + first);
    return r.y;
  };
  const auto q = ref::unit_rows(conv(l.q, l.q_conv, 0, HK), K), k = ref::unit_rows(conv(l.k, l.k_conv, HK, HK), K);
  const auto v = conv(l.v, l.v_conv, 2 * HK, H * V);
  const auto g = ref::log_decay(doubles(l.f), doubles(l.A), doubles(l.bias), H, K,
                                l.gate.kind == KdaGate::softplus ? 0 : double(l.gate.lower_bound));
  const auto beta = ref::beta(doubles(l.b), l.gate.beta_scale);
  Doubles o(size_t(T * H * V));
  S = doubles(s.S);
  for (int64_t h = 0; h < H; ++h) {
    const auto cut = [&](const Doubles& x, int64_t D) { return ref::head(x, 0, T, H, h, D); };
    Doubles one(S.begin() + h * V * K, S.begin() + (h + 1) * V * K);
    const auto y = ref::recurrence(cut(q, K), cut(k, K), cut(v, V), cut(g, K), cut(beta, 1), one, K, V);
    for (int64_t t = 0; t < T; ++t) std::copy_n(y.begin() + t * V, V, o.begin() + (t * H + h) * V);
    std::copy(one.begin(), one.end(), S.begin() + h * V * K);
  }
  return ref::gated_norm(o, doubles(l.g), doubles(l.g_bias), doubles(l.o_norm), double(l.eps), H, V);
}

TEST(KdaDecode, TokenByTokenFollowsTheReference) {
  CpuContext ctx;
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{32, 64}, {64, 32}, {128, 128}, {20, 12}, {1, 1}, {17, 33}})
    for (const KdaGateParams gate : {KdaGateParams{}, {.kind = KdaGate::bounded, .beta_scale = 2}}) {
      const std::string what = cat("decode/K", K, "_V", V, "_gate", int(gate.kind));
      const Layer l(what, 20, 2, K, V, gate);
      State s(what, 1, l);
      Doubles S, window;
      const auto want = reference(l, s, S, window);
      std::vector<float> got;
      for (int64_t t = 0; t < l.T; ++t) {
        const auto y = step(ctx, l, {t}, {0}, {0}, s);
        got.insert(got.end(), y.begin(), y.end());
      }
      EXPECT_LE(relative_l2(got, want), kKdaTolerance) << what;
      EXPECT_LE(relative_l2(s.S, S), kKdaTolerance) << what;
      EXPECT_TRUE(close(s.window, window, 0, 1)) << what;
      got[got.size() / 2] += 1e-3f;
      EXPECT_GT(relative_l2(got, want), kKdaTolerance) << "sabotage";
    }
}

TEST(KdaDecode, AgreesWithTheOpsForPrompts) {
  CpuContext ctx;
  const Layer l("decode/parts", 37, 2, 32, 64);
  const int64_t T = l.T, H = l.H, K = l.K, V = l.V, HK = H * K, HV = H * V;
  State s("decode/parts", 1, l);
  const Pack pack({T});
  Buffer q(ctx, l.q), k(ctx, l.k), v(ctx, l.v), f(ctx, l.f), b(ctx, l.b), g(ctx, l.g), qc(ctx, l.q_conv),
      kc(ctx, l.k_conv), vc(ctx, l.v_conv), A(ctx, l.A), bias(ctx, l.bias), gb(ctx, l.g_bias), on(ctx, l.o_norm),
      window(ctx, s.window), S(ctx, s.S), q1(ctx, T * HK), k1(ctx, T * HK), v1(ctx, T * HV), o(ctx, T * HV);
  const View w = window.view({1, 3, l.channels()});
  conv_silu(ctx, {q.view({T, HK}), qc.view({HK, 4}), w, 0, pack.slots(), pack.packing(), q1.view({T, HK})});
  conv_silu(ctx, {k.view({T, HK}), kc.view({HK, 4}), w, HK, pack.slots(), pack.packing(), k1.view({T, HK})});
  conv_silu(ctx, {v.view({T, HV}), vc.view({HV, 4}), w, 2 * HK, pack.slots(), pack.packing(), v1.view({T, HV})});
  kda_prep(ctx, {q1.view({T, H, K}), k1.view({T, H, K}), f.view({T, H, K}), b.view({T, H}), A.view({H}),
                 bias.view({HK}), l.gate, f.view({T, H, K}), b.view({T, H})});
  kda_forward(ctx, {q1.view({T, H, K}), k1.view({T, H, K}), v1.view({T, H, V}), f.view({T, H, K}), b.view({T, H}),
                    S.view({1, H, V, K}), pack.slots(), pack.packing(), o.view({T, H, V})});
  kda_output(ctx, {o.view({T, H, V}), g.view({T, H, V}), gb.view({HV}), on.view({V}), o.view({T, H, V}), l.eps});

  std::vector<float> got;
  for (int64_t t = 0; t < T; ++t) {
    const auto y = step(ctx, l, {t}, {0}, {0}, s);
    got.insert(got.end(), y.begin(), y.end());
  }
  EXPECT_LE(relative_l2(got, o.fetch()), 1e-6);
  EXPECT_LE(relative_l2(s.S, S.fetch()), 1e-6);
  EXPECT_EQ(s.window, window.fetch());
}

TEST(KdaDecode, ASequenceIsTheSameInAnyBatchOnAnyThreadsInAnySlot) {
  CpuContext one(1), two(2), three(3);
  const Layer l("decode/batch", 4, 3, 20, 12);
  const State start("decode/batch", 6, l);
  const std::vector<int32_t> in{4, -1, 0, 2}, out{4, 1, 3, -1};
  State s = start, s1 = start, s3 = start, alone = start;
  const auto y = step(two, l, {0, 1, 2, 3}, in, out, s);
  EXPECT_EQ(step(one, l, {0, 1, 2, 3}, in, out, s1), y);
  EXPECT_EQ(step(three, l, {0, 1, 2, 3}, in, out, s3), y);
  EXPECT_EQ(s1, s);
  EXPECT_EQ(s3, s);
  std::vector<float> each;
  for (size_t n = 0; n < 4; ++n) {
    const auto r = step(two, l, {int64_t(n)}, {in[n]}, {out[n]}, alone);
    each.insert(each.end(), r.begin(), r.end());
  }
  EXPECT_EQ(each, y);
  EXPECT_EQ(alone, s);
}

TEST(KdaDecode, ZeroStateIsNotReadAndNaNStays) {
  CpuContext ctx;
  Layer l("decode/nan", 1, 1, 16, 16);
  State zero("decode/nan", 1, l), nan = zero;
  zero.S.assign(zero.S.size(), 0), zero.window.assign(zero.window.size(), 0);
  nan.S.assign(nan.S.size(), NAN), nan.window.assign(nan.window.size(), NAN);
  EXPECT_EQ(step(ctx, l, {0}, {-1}, {0}, nan), step(ctx, l, {0}, {0}, {0}, zero));
  EXPECT_EQ(nan, zero);
  l.f[3] = NAN;
  EXPECT_TRUE(std::isnan(step(ctx, l, {0}, {0}, {0}, zero)[0]));
}

TEST(KdaDecode, TheDoorRefuses) {
  CpuContext ctx;
  Layer l("decode/door", 2, 2, 8, 8);
  State s("decode/door", 2, l);
  EXPECT_NO_THROW(step(ctx, l, {0, 1}, {0, 1}, {0, 1}, s));
  const auto refused = [&](auto f) {
    try {
      f();
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused([&] {
              step(ctx, l, {0, 1}, {0, 1}, {1, 0}, s);
            }),
            "kda_decode: slot 1 is written by sequence 0 and used by sequence 1");
  EXPECT_EQ(refused([&] { step(ctx, l, {0}, {2}, {0}, s); }), "kda_decode: slots.in[0] = 2, the pool has 2");
  Layer bad = l;
  bad.gate.beta_scale = 0;
  EXPECT_EQ(refused([&] { step(ctx, bad, {0}, {0}, {0}, s); }), "kda_decode: beta_scale must be in (0,2], got 0");
  CpuContext small(2, Precision::exact, 64);
  EXPECT_EQ(refused([&] { step(small, l, {0}, {0}, {0}, s); }),
            cat("kda_decode: needs a workspace of ", kda_decode_workspace_bytes(small, 1, 2, 8, 8),
                " bytes, the context has 64"));
}

}  // namespace
