// kda_prefill on CUDA against the recurrence in double on the bf16-rounded inputs: every form, length and gate.
#include "tests/cuda.h"
#include "tests/golden.h"
#include "tests/kernels/kda_problem.h"

#ifdef KDA_CUDA
#include "kernels/cuda/kda_prefill.h"
#endif

namespace kda::test {
namespace {

enum class Gate { ordinary, strong, weak, mixed, extreme, saturated };

// o is rounded to bf16: 1.7e-3. Operands of the chunked form are fp16: 1.4e-4 for each of the four or five in a
// product.
constexpr double kOutput = 2.2e-3, kState = 1e-3;
// Token by token nothing is rounded but o.
constexpr double kGeneralState = 2e-5;

struct Prompt {
  int64_t H, K, V, slots;
  Pack pack;
  KdaGateParams gate = {};
  std::vector<float> q, k, v, f, b, A_log, dt_bias, state;
  std::vector<StateMark> marks;

  Prompt(const std::string& name, const std::vector<int64_t>& lengths, int64_t H_, int64_t K_, int64_t V_,
         Gate kind = Gate::ordinary, int64_t slots_ = 0)
      : H(H_), K(K_), V(V_), slots(slots_ ? slots_ : int64_t(lengths.size())), pack(lengths) {
    const int64_t T = pack.T();
    q = rounded(values(name + "/q", T * H * K, 2)), k = rounded(values(name + "/k", T * H * K, 2));
    v = rounded(values(name + "/v", T * H * V, 2)), f = values(name + "/f", T * H * K, 2);
    b = values(name + "/b", T * H, 2), A_log = values(name + "/A", H, 1.4f), dt_bias = values(name + "/dt", H * K);
    state = values(name + "/state", slots * H * V * K, 0.3f);
    for (float& a : A_log) a += 1.4f;
    const auto pick = values(name + "/pick", T * H * K);
    for (size_t i = 0; i < f.size(); ++i) {
      const float x = std::abs(f[i]), r = pick[i];
      if (kind == Gate::strong) f[i] = 20 * x;
      if (kind == Gate::weak) f[i] = -8 - 2 * x;
      if (kind == Gate::mixed) f[i] = r > 0.8f ? 30 * x : -9;  // mild pairs behind strong decays
      if (kind == Gate::extreme) f[i] = r < -0.8f ? 300 : r < -0.6f ? -300 : r < 0 ? -20 : x;
      if (kind == Gate::saturated) f[i] = -15;
      if (kind == Gate::saturated && i / size_t(H * K) % 5 == 0) k[i] = 0;
    }
    if (kind == Gate::saturated)
      for (float& x : b) x *= 50;
    f = rounded(f), b = rounded(b);
  }
};

// Tokens from .. to-1 get the key of the first of them, `spread` of their own added, and one gate logit and beta.
void repeat_keys(Prompt& p, int64_t from, int64_t to, float gate, float beta = 2, float spread = 0) {
  const int64_t D = p.H * p.K;
  p.gate.beta_scale = 2;
  const std::vector<float> own = p.k;
  for (int64_t i = from * D; i < to * D; ++i) {
    p.k[size_t(i)] = float(bf16(own[size_t(from * D + i % D)] + spread * own[size_t(i)]));
    p.f[size_t(i)] = gate;
  }
  for (int64_t i = from * p.H; i < to * p.H; ++i)
    p.b[size_t(i)] = float(bf16(beta == 2 ? 40.0f : std::log(beta / (2 - beta))));
}

struct Call {
  Context& ctx;
  const Prompt& p;
  TypedBuffer q, k, v, f, b, A_log, dt_bias, state, o;
  DeviceArray<int32_t> start, in, out;
  DeviceArray<StateMark> marks;
  KdaPrefill args;

  Call(Context& c, const Prompt& x)
      : ctx(c),
        p(x),
        q(c, Dtype::bf16, x.q),
        k(c, Dtype::bf16, x.k),
        v(c, Dtype::bf16, x.v),
        f(c, Dtype::bf16, x.f),
        b(c, Dtype::bf16, x.b),
        A_log(c, Dtype::f32, x.A_log),
        dt_bias(c, Dtype::f32, x.dt_bias),
        state(c, Dtype::f32, x.state),
        o(c, Dtype::bf16, x.pack.T() * x.H * x.V),
        start(c, x.pack.start),
        in(c, x.pack.in),
        out(c, x.pack.out),
        marks(c, x.marks) {
    const int64_t T = p.pack.T(), H = p.H, K = p.K, V = p.V;
    args = {.q = q.view({T, H, K}),
            .k = k.view({T, H, K}),
            .v = v.view({T, H, V}),
            .f = f.view({T, H, K}),
            .b = b.view({T, H}),
            .A_log = A_log.view({H}),
            .dt_bias = dt_bias.view({H * K}),
            .gate = p.gate,
            .state = state.view({p.slots, H, V, K}),
            .slots = {in.data(), out.data()},
            .packing = {p.pack.start, start.data()},
            .marks = {p.marks, marks.data()},
            .o = o.view({T, H, V})};
  }
  KdaAnswer answer() {
    EXPECT_TRUE(o.guards_intact() && state.guards_intact());
    return {o.fetch(), state.fetch()};
  }
};

KdaAnswer run(Context& ctx, const Prompt& p) {
  Call r(ctx, p);
  kda_prefill(ctx, r.args);
  return r.answer();
}

std::pair<Doubles, Doubles> expected(const Prompt& p) {
  const int64_t H = p.H, K = p.K, V = p.V;
  Doubles o(size_t(p.pack.T() * H * V)), state = doubles(p.state);
  const Doubles before = state, q = ref::unit_rows(doubles(p.q), K), k = ref::unit_rows(doubles(p.k), K);
  const Doubles g = ref::log_decay(doubles(p.f), doubles(p.A_log), doubles(p.dt_bias), H, K,
                                   p.gate.kind == KdaGate::bounded ? double(p.gate.lower_bound) : 0);
  const Doubles beta = ref::beta(doubles(p.b), double(p.gate.beta_scale)), v = doubles(p.v);
  for (int64_t n = 0; n < p.pack.N(); ++n)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t first = p.pack.start[size_t(n)], last = p.pack.start[size_t(n) + 1];
      const int64_t in = p.pack.in[size_t(n)], out = p.pack.out[size_t(n)];
      const auto keep = [&](int64_t slot, const Doubles& S) {
        if (slot >= 0) std::copy(S.begin(), S.end(), state.begin() + (slot * H + h) * V * K);
      };
      Doubles S(size_t(V * K));
      if (in >= 0) std::copy_n(before.begin() + (in * H + h) * V * K, V * K, S.begin());
      int64_t from = first;
      const auto go_to = [&](int64_t to) {
        const auto cut = [&](const Doubles& x, int64_t D) { return ref::head(x, from, to, H, h, D); };
        const auto y = ref::recurrence(cut(q, K), cut(k, K), cut(v, V), cut(g, K), cut(beta, 1), S, K, V);
        for (int64_t t = from; t < to; ++t) std::copy_n(y.begin() + (t - from) * V, V, o.begin() + (t * H + h) * V);
        from = to;
      };
      for (const StateMark& m : p.marks)
        if (m.sequence == n) go_to(first + m.tokens), keep(m.slot, S);
      go_to(last);
      keep(out, S);
    }
  return {o, state};
}

void expect_answer(const std::pair<Doubles, Doubles>& want, const KdaAnswer& got, const std::string& what,
                   double state = kState, double output = kOutput) {
  EXPECT_LE(relative_l2(got.o, want.first), output) << what;
  EXPECT_LE(relative_l2(got.state, want.second), state) << what;
}

TEST(CudaKdaPrefill, FollowsTheRecurrenceAtEveryLengthAndWidth) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const std::pair<int64_t, int64_t> widths[] = {{64, 64}, {64, 128}, {128, 64}, {128, 128}, {20, 12}, {32, 48}};
  for (const int64_t T : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130})
    for (const auto& [K, V] : widths) {
      const std::string what = cat("T", T, "_K", K, "_V", V);
      const Prompt p("cuda/" + what, {T}, 2, K, V);
      expect_answer(expected(p), run(ctx, p), what, K % 64 ? kGeneralState : kState);
    }
}

TEST(CudaKdaPrefill, FollowsTheRecurrenceAtEveryGate) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const Gate kind : {Gate::ordinary, Gate::strong, Gate::weak, Gate::mixed, Gate::extreme, Gate::saturated})
    for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {20, 12}}) {
      const std::string what = cat("gate", int(kind), "_K", K);
      Prompt p("cuda/" + what, {130, 7}, 2, K, V, kind);
      expect_answer(expected(p), run(ctx, p), what, K == 20 ? kGeneralState : kState);
      p.gate = {KdaGate::bounded, -5, 2};
      if (kind != Gate::saturated) expect_answer(expected(p), run(ctx, p), what + " bounded");
    }
}

TEST(CudaKdaPrefill, TakesRaggedPacksAnySlotsAndMarks) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {64, 128}, {20, 12}}) {
    Prompt p(cat("cuda/ragged", K), {17, 0, 1, 200, 0, 64, 129, 0}, 2, K, V, Gate::weak, 14);
    p.pack.in = {3, -1, -1, 0, 5, 8, 9, -1};
    p.pack.out = {3, 1, 2, 4, 6, -1, 9, 7};  // in place, zeros written, zeros to start, moved, copied unread, dropped
    p.marks = {{3, 64, 10}, {3, 192, 11}, {6, 64, 12}, {6, 128, 13}};
    expect_answer(expected(p), run(ctx, p), cat("K", K));
  }
}

TEST(CudaKdaPrefill, AnyRangeOfValues) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const float size : {1e-20f, 1e-6f, 1e4f, 1e20f}) {
    Prompt p("cuda/range", {200}, 2, 128, 64);
    for (float& x : p.v) x = float(bf16(x * size));
    for (float& x : p.state) x *= size;
    expect_answer(expected(p), run(ctx, p), cat(size));
    for (size_t i = 0; i < p.state.size(); ++i) p.state[i] *= 1e4f;  // far above what comes after
    expect_answer(expected(p), run(ctx, p), cat("state ", size));
  }
}

TEST(CudaKdaPrefill, TheSameAgainAndAloneAsInAPack) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const Prompt all("cuda/pack", {70, 133, 16}, 2, 128, 64);
  const auto packed = run(ctx, all);
  EXPECT_EQ(run(ctx, all), packed);
  Prompt alone = all;
  const auto cut = [&](const std::vector<float>& x, int64_t D) {
    return std::vector<float>(x.begin() + 70 * 2 * D, x.begin() + 203 * 2 * D);
  };
  alone.pack = Pack({133}), alone.slots = 1;
  alone.q = cut(all.q, 128), alone.k = cut(all.k, 128), alone.f = cut(all.f, 128), alone.v = cut(all.v, 64);
  alone.b = cut(all.b, 1);
  const int64_t S = 2 * 64 * 128;
  const auto slot = [&](const std::vector<float>& x) { return std::vector<float>(x.begin() + S, x.begin() + 2 * S); };
  alone.state = slot(all.state);
  const auto got = run(ctx, alone);
  EXPECT_EQ(got.o, cut(packed.o, 64));
  EXPECT_EQ(got.state, slot(packed.state));
}

TEST(CudaKdaPrefill, DoesNotReadWhatItMustNotAndSwallowsNoNan) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t K : {128, 20}) {
    Prompt p("cuda/unread", {140}, 1, K, K);
    p.pack.in = {-1};
    p.state.assign(p.state.size(), nan);
    expect_answer(expected(p), run(ctx, p), "zeros, not the slot");
    for (std::vector<float>* x : {&p.k, &p.f, &p.v}) {
      const float was = std::exchange((*x)[size_t(100 * K + 3)], nan);
      const auto got = run(ctx, p).o;
      EXPECT_TRUE(std::isnan(got[size_t(139 * K + 3)])) << "a NaN must not be swallowed";
      EXPECT_FALSE(std::isnan(got[size_t(63 * K)])) << "nor reach what came before its chunk";
      (*x)[size_t(100 * K + 3)] = was;
    }
  }
}

TEST(CudaKdaPrefill, GivesTheGoldenValues) {
  KDA_NEEDS_CUDA();
  KDA_NEED(path, "kda_op.safetensors");
  const GoldenFile file(path);
  CudaContext ctx;
  for (const auto& c : file.cases()) {
    const std::string name = std::to_string(c["index"].get<int>()) + ".";
    const int64_t B = c["B"], T = c["T"], H = c["H"], K = c["K"], V = c["V"];
    Prompt p("golden", std::vector<int64_t>(size_t(B), T), H, K, V);
    const auto get = [&](const char* what) { return file[name + what].floats(); };
    p.q = rounded(get("q")), p.k = rounded(get("k")), p.v = rounded(get("v")), p.f = rounded(get("g_raw"));
    p.b = rounded(get("beta_raw")), p.A_log = get("A_log"), p.dt_bias = get("dt_bias");
    if (c.contains("lower")) p.gate = {KdaGate::bounded, float(double(c["lower"]))};
    if (c.value("neg", false)) p.gate.beta_scale = 2;
    const auto h0 = get("h0");  // [B,H,K,V]
    for (size_t m = 0; m < h0.size(); m += size_t(K * V))
      for (int64_t d = 0; d < K; ++d)
        for (int64_t r = 0; r < V; ++r) p.state[m + size_t(r * K + d)] = h0[m + size_t(d * V + r)];
    expect_answer(expected(p), run(ctx, p), name);
  }
}

TEST(CudaKdaPrefill, FollowsTheRecurrenceOver100000Tokens) {
  KDA_NEEDS_CUDA();
  CudaContext ctx(size_t(1) << 30);
  const Prompt p("cuda/long", {100000}, 1, 64, 64, Gate::weak);
  expect_answer(expected(p), run(ctx, p), "100,000 tokens");
}

TEST(CudaKdaPrefill, TheWorkspaceIsBoundedAndAskedFor) {
  KDA_NEEDS_CUDA();
  CudaContext ctx(64);
  EXPECT_LE(kda_prefill_workspace_bytes(ctx, 1 << 20, 1, 20, 128, 128), size_t(896) << 20);
  EXPECT_GE(kda_prefill_workspace_bytes(ctx, 1 << 20, 1, 20, 128, 128),
            kda_prefill_workspace_bytes(ctx, 1 << 10, 1, 20, 128, 128));
  const Prompt p("cuda/work", {100}, 1, 128, 128);
  EXPECT_THROW(run(ctx, p), Error);
}

// Each comparison above must notice one wrong number and one wrong order of things.
TEST(CudaKdaPrefill, SabotageIsNoticed) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const Prompt p("cuda/sabotage", {70}, 1, 128, 64);
  const auto want = expected(p);
  auto got = run(ctx, p);
  got.o[77] += 0.2f, got.state[99] += 0.2f;
  EXPECT_GT(relative_l2(got.o, want.first), kOutput);
  EXPECT_GT(relative_l2(got.state, want.second), kState);
  Prompt late = p;  // the decay of the token before
  std::rotate(late.f.begin(), late.f.end() - 128, late.f.end());
  EXPECT_GT(relative_l2(run(ctx, late).o, want.first), 1e-2);
}

// Keys that come back while little is forgotten: with beta near 2 each token reflects the state, and what is wrong once
// in the same way with every token adds up over all of them. Such chunks are taken token by token in fp32, so the
// bounds are those of everything else. Just below the limit, where X's rows have a mean square of 8, products remain:
// roundings of u, 1.4e-4 each, are sqrt(8) times as large beside what a chunk adds, and grow with the root of the
// number of chunks.
TEST(CudaKdaPrefill, KeysThatComeBackWithLittleForgotten) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  const float never = -60;
  struct {
    const char* name;
    float beta, gate, spread;
    int64_t T;
    double output = kOutput, state = kState;
  } const cases[] = {{"equal keys", 2, never, 0, 200},
                     {"equal keys, long", 2, never, 0, 1000},
                     {"equal keys, very weak decay", 2, -10, 0, 1000},
                     {"beta 1.9", 1.9f, never, 0, 256},
                     {"beta 1.5", 1.5f, never, 0, 256, 4e-3, 4e-3},
                     {"beta 1", 1, never, 0, 256},
                     {"nearly equal keys", 2, never, 0.03f, 256},
                     {"similar keys", 2, never, 0.5f, 1000, 4e-3, 4e-3},
                     {"keys of their own", 2, never, 9, 256, 4e-3, 4e-3},
                     {"some decay", 2, -6, 0, 256},
                     {"equal keys for a while", 2, -10, 0, 1016}};  // the last chunk has 56 tokens
  for (const auto& c : cases)
    for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {64, 128}}) {
      if (K == 64 && c.spread > 0) continue;
      Prompt p(cat("cuda/again", c.name), {c.T}, 2, K, V);
      repeat_keys(p, 0, c.T, c.gate, c.beta, c.spread);
      expect_answer(expected(p), run(ctx, p), cat(c.name, " K", K), c.state, c.output);
    }
}

#ifdef KDA_CUDA
TEST(CudaKdaPrefill, EveryFormAgrees) {
  KDA_NEEDS_CUDA();
  CudaContext ctx(size_t(256) << 20);
  const bool flows = cuda::prefill_device(ctx).flows;
  for (const auto& [kind, again] :
       {std::pair{Gate::ordinary, false}, {Gate::weak, false}, {Gate::mixed, false}, {Gate::weak, true}}) {
    Prompt p(cat("cuda/forms", int(kind)), {300, 0, 65, 500}, 2, 128, 128, kind, 8);
    p.pack.in = {0, 1, -1, 3};
    p.marks = {{0, 64, 4}, {0, 256, 5}, {3, 192, 6}, {3, 448, 7}};
    if (again) repeat_keys(p, 70, 270, -10), repeat_keys(p, 300, 560, -10);  // of both kinds of chunks, marks in both
    const auto want = expected(p);
    for (const int segments : {1, 2, 3, 7})
      for (const int64_t pass_chunks : {1, 3, 8, 100}) {
        Call r(ctx, p);
        const int warps = segments % 2 ? 4 : 8;
        cuda::kda_prefill_as(ctx, r.args,
                             {.chunked = true, .pass_chunks = pass_chunks, .segments = segments, .warps = warps});
        expect_answer(want, r.answer(), cat(segments, " segments, ", pass_chunks, " chunks a pass"));
      }
    for (const int64_t ring : {2, 3, 12, 100})
      for (const int alone : {0, 1, 100}) {
        if (!flows) continue;
        Call r(ctx, p);
        cuda::kda_prefill_as(ctx, r.args, {.chunked = true, .pass_chunks = 1, .ring = ring, .alone = alone});
        expect_answer(want, r.answer(), cat("ring of ", ring, ", alone ", alone));
      }
    Call r(ctx, p);
    cuda::kda_prefill_as(ctx, r.args, {});
    expect_answer(want, r.answer(), "token by token", again ? 10 * kGeneralState : kGeneralState);
  }
}

// Small enough for racecheck.
TEST(CudaKdaPrefill, EveryFormInSmall) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{128, 128}, {64, 64}}) {
    Prompt p(cat("cuda/small", K), {70, 0, 20}, 1, K, V, Gate::weak);
    repeat_keys(p, 70, 90, -10);  // the last chunk token by token
    const auto want = expected(p);
    std::vector<cuda::PrefillPlan> plans = {
        {}, {.chunked = true, .pass_chunks = 1}, {.chunked = true, .pass_chunks = 5, .segments = 2}};
    if (V == 128) plans.push_back({.chunked = true, .pass_chunks = 5, .warps = 8});
    if (cuda::prefill_device(ctx).flows) plans.push_back({.chunked = true, .pass_chunks = 1, .ring = 2});
    for (size_t i = 0; i < plans.size(); ++i) {
      Call r(ctx, p);
      cuda::kda_prefill_as(ctx, r.args, plans[i]);
      expect_answer(want, r.answer(), cat("K", K, " plan ", i));
    }
  }
}

// Chunk numbers without tokens lie between those that the blocks of the flowing form wait for.
TEST(CudaKdaPrefill, AFlowWithGaps) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  if (!cuda::prefill_device(ctx).flows) GTEST_SKIP() << "no code for this device";
  std::vector<int64_t> lengths(50, 0);
  lengths[0] = 64, lengths[1] = 65, lengths[4] = 1, lengths[30] = 100, lengths[49] = 3;
  const Prompt p("cuda/gaps", lengths, 2, 64, 64, Gate::weak);
  const auto want = expected(p);
  for (const int64_t ring : {2, 3, 5, 30}) {
    Call r(ctx, p);
    cuda::kda_prefill_as(ctx, r.args, {.chunked = true, .pass_chunks = 1, .ring = ring});
    expect_answer(want, r.answer(), cat("ring of ", ring));
  }
}

// sm_90: 132 multiprocessors, 227 KB.
TEST(CudaKdaPrefill, TheFormIsChosenFromSizesAndTheChip) {
  const auto plan = [](int64_t N, int64_t longest, int64_t H, int64_t K = 128, int64_t V = 128, int64_t shared = 232448,
                       bool flows = false) {
    return cuda::plan_prefill({132, shared, flows}, N * longest, N, longest, H, K, V);
  };
  EXPECT_GT(plan(1, 32768, 20).segments, 1) << "few chains";
  EXPECT_EQ(plan(4, 8192, 20).segments, 1) << "enough chains";
  EXPECT_EQ(plan(1, 64, 20).segments, 1) << "too short to gain";
  EXPECT_EQ(plan(1, 8192, 66).segments, 1) << "one chain for each multiprocessor";
  EXPECT_EQ(plan(4, 8192, 20).warps, 8) << "records far beyond the L2 cache";
  EXPECT_EQ(plan(1, 8192, 20).warps, 4);
  EXPECT_EQ(plan(4, 8192, 20, 128, 64).warps, 4) << "a block has no more rows than a head";
  const auto flowing = [&](int64_t N, int64_t longest, int64_t H) {
    const auto p = plan(N, longest, H, 128, 128, 232448, true);
    EXPECT_EQ(p.ring > 0 ? 1 : p.segments, p.segments) << "one or the other";
    return p.ring > 0;
  };
  EXPECT_TRUE(flowing(1, 32768, 20)) << "few chains, and work enough to hide them behind";
  EXPECT_TRUE(flowing(1, 8192, 20));
  EXPECT_FALSE(flowing(8, 8192, 20)) << "enough chains";
  EXPECT_FALSE(flowing(1, 32768, 4)) << "the chains would take longer than all else";
  EXPECT_FALSE(flowing(1, 64, 20));
  EXPECT_FALSE(flowing(1, 8192, 80)) << "more chains than multiprocessors";
  EXPECT_FALSE(plan(1, 8192, 20, 96).chunked);
  EXPECT_FALSE(plan(1, 8192, 20, 128, 256).chunked);
  EXPECT_FALSE(plan(1, 8192, 20, 128, 128, 100 << 10).chunked) << "sm_86: too little shared memory";
  EXPECT_TRUE(plan(1, 8192, 20, 128, 128, 163 << 10).chunked) << "sm_80";
}
#endif

}  // namespace
}  // namespace kda::test
