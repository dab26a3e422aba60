// The fused ops of the table on the CPU (norms and sums with the products beside them; KDA of prompts from raw gates,
// with states kept on the way) against their parts in double.
#include <gtest/gtest.h>

#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "tests/kernels/kda_problem.h"
#include "tests/kernels/weight.h"
#include "tests/ref/norm.h"

namespace kda::test {
namespace {

constexpr double kEps = 1e-5;
const double kUnit = std::ldexp(1, -24);

// K roundings of a sum, and what rms_norm's own (norm_test.cc) put into each of its terms.
double product_tolerance(int64_t K) { return double(K + 4) * kUnit; }
double norm_tolerance(int64_t D) { return (4 + double(D) / 16) * kUnit; }

// max(p, 0)^2 of a product p that may be off by e = tolerance * terms: (2 |p| + e) e, and a rounding.
testing::AssertionResult near_relu2(const std::vector<float>& got, const ref::Product& p, double tolerance) {
  if (got.size() != p.y.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = tolerance * p.terms[i], r = std::max(p.y[i], 0.0), want = r * r;
    if (!(std::abs(double(got[i]) - want) <= (2 * std::abs(p.y[i]) + e) * e + kUnit * want))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << want;
  }
  return testing::AssertionSuccess();
}

std::vector<float> rows_of(const std::vector<float>& x, int64_t from, int64_t n, int64_t D) {
  return {x.begin() + from * D, x.begin() + (from + n) * D};
}

std::pair<std::vector<float>, std::vector<float>> add_norm(int threads, const std::vector<float>& x,
                                                           const std::vector<float>& add, const std::vector<float>& w,
                                                           bool in_place) {
  CpuContext ctx(threads);
  const int64_t D = int64_t(w.size()), R = int64_t(x.size()) / D;
  Buffer xs(ctx, x), a(ctx, add), ws(ctx, w), y(ctx, R * D);
  Buffer& to = in_place ? a : y;
  add_rms_norm(
      ctx, {.x = xs.view({R, D}), .add = a.view({R, D}), .w = ws.view({D}), .y = to.view({R, D}), .eps = float(kEps)});
  EXPECT_TRUE(xs.guards_intact() && to.guards_intact());
  return {xs.fetch(), to.fetch()};
}

TEST(Fused, AddRmsNormFollowsTheReference) {
  for (const int64_t D : {1, 3, 16, 17, 65, 256, 2560})
    for (const int64_t R : {0, 1, 2, 5}) {
      const auto x = values("x", R * D, 3), add = values("add", R * D, 2), w = values("w", D);
      Doubles sum;
      for (size_t i = 0; i < x.size(); ++i) sum.push_back(double(x[i]) + double(add[i]));
      const auto got = add_norm(2, x, add, w, false);
      EXPECT_TRUE(close(got.first, sum, kUnit, 5)) << R << "x" << D;
      // The sum's rounding is one more in each term.
      EXPECT_TRUE(
          close(got.second, ref::rms_norm(sum, doubles(w), kEps), norm_tolerance(D) + kUnit, std::sqrt(double(D))))
          << R << "x" << D;
      EXPECT_EQ(add_norm(3, x, add, w, true), got) << "in place";
    }
}

struct Sizes {
  int64_t R, K;
  std::vector<int64_t> N;
};
const std::vector<Sizes> kSizes{
    {1, 1, {1}}, {1, 33, {20}}, {2, 64, {65, 3}}, {5, 300, {64, 1, 129}}, {17, 130, {70, 8}}};
constexpr Dtype kTypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i8};

// Several matrices, their outputs, and the call that fills them.
struct Products {
  std::vector<Weight> w;
  std::vector<Buffer> y;
  std::vector<MatmulSegment> segments;

  Products(Context& ctx, const Sizes& s, Dtype d) {
    w.reserve(s.N.size());
    for (const int64_t N : s.N) {
      w.emplace_back(cat("w", N, s.K), d, N, s.K);
      y.emplace_back(ctx, s.R * N);
    }
    for (size_t i = 0; i < s.N.size(); ++i) segments.push_back({.w = w[i].view, .y = y[i].view({s.R, s.N[i]})});
  }
};

TEST(Fused, MatmulRelu2FollowsTheReference) {
  for (const Sizes& s : kSizes)
    for (const Dtype d : kTypes) {
      CpuContext ctx(2, Precision::exact);
      const auto xs = values("x", s.R * s.K);
      const Buffer x(ctx, xs);
      Products p(ctx, s, d);
      matmul_relu2(ctx, {.x = x.view({s.R, s.K}), .segments = p.segments});
      for (size_t i = 0; i < s.N.size(); ++i) {
        EXPECT_TRUE(near_relu2(p.y[i].fetch(), ref::matmul(doubles(xs), p.w[i].values, s.R, s.N[i], s.K),
                               product_tolerance(s.K)))
            << s.R << "x" << s.N[i] << "x" << s.K << " " << name_of(d);
        EXPECT_TRUE(p.y[i].guards_intact());
      }
    }
}

TEST(Fused, NormMatvecFollowsTheReference) {
  for (const Sizes& s : kSizes)
    for (const Dtype d : kTypes)
      for (const bool relu2 : {false, true}) {
        SCOPED_TRACE(cat(s.R, "x", s.K, " ", name_of(d), relu2 ? " relu2" : ""));
        CpuContext ctx;
        const auto xs = values("x", s.R * s.K, 3), norm = values("norm", s.K);
        const Buffer x(ctx, xs), n(ctx, norm);
        Buffer h(ctx, s.R * s.K);
        Products p(ctx, s, d);
        const NormMatvec a{.x = x.view({s.R, s.K}),
                           .norm = n.view({s.K}),
                           .eps = float(kEps),
                           .segments = p.segments,
                           .h = h.view({s.R, s.K})};
        relu2 ? norm_matvec_relu2(ctx, a) : norm_matvec(ctx, a);
        const auto rows = ref::rms_norm(doubles(xs), doubles(norm), kEps);
        for (size_t i = 0; i < s.N.size(); ++i) {
          const auto want = ref::matmul(rows, p.w[i].values, s.R, s.N[i], s.K);
          const double tolerance = product_tolerance(s.K) + norm_tolerance(s.K);
          EXPECT_TRUE((relu2 ? near_relu2 : near)(p.y[i].fetch(), want, tolerance)) << "matrix " << i;
          EXPECT_TRUE(p.y[i].guards_intact());
        }
        EXPECT_TRUE(h.guards_intact());
      }
}

std::vector<float> added(Context& ctx, const std::vector<float>& xs, const Weight& w, const std::vector<float>& to) {
  const int64_t N = w.view.w.dim(0), K = w.view.w.dim(1), R = int64_t(xs.size()) / K;
  const Buffer x(ctx, xs);
  Buffer y(ctx, to), h(ctx, R * N);
  matvec_add(ctx, {.x = x.view({R, K}), .w = w.view, .y = y.view({R, N}), .h = h.view({R, N})});
  EXPECT_TRUE(y.guards_intact() && h.guards_intact());
  return y.fetch();
}

TEST(Fused, MatvecAddFollowsTheReference) {
  for (const Sizes& s : kSizes)
    for (const Dtype d : kTypes) {
      CpuContext ctx;
      const int64_t N = s.N[0];
      const auto xs = values("x", s.R * s.K), to = values("y", s.R * N, 5);
      const Weight w(cat("w", N, s.K), d, N, s.K);
      ref::Product want = ref::matmul(doubles(xs), w.values, s.R, N, s.K);
      for (size_t i = 0; i < to.size(); ++i) want.y[i] += double(to[i]), want.terms[i] += std::abs(double(to[i]));
      EXPECT_TRUE(near(added(ctx, xs, w, to), want, product_tolerance(s.K))) << s.R << "x" << s.K << " " << name_of(d);
    }
}

TEST(Fused, ARowDoesNotDependOnItsNeighboursNorOnThreads) {
  const int64_t R = 7, K = 130, N = 70;
  const auto xs = values("x", R * K), to = values("y", R * N);
  const Weight w("w", Dtype::bf16, N, K);
  CpuContext one(1), three(3);
  const auto all = added(three, xs, w, to);
  for (int64_t r = 0; r < R; ++r)
    EXPECT_EQ(added(one, rows_of(xs, r, 1, K), w, rows_of(to, r, 1, N)), rows_of(all, r, 1, N)) << r;
}

TEST(Fused, SabotageIsNoticed) {
  const ref::Product p{{3, -2, 0.5}, {4, 3, 2}};
  EXPECT_TRUE(near_relu2({9, 0, 0.25f}, p, 1e-6));
  EXPECT_FALSE(near_relu2({9.0001f, 0, 0.25f}, p, 1e-6));
  EXPECT_FALSE(near_relu2({9, 4, 0.25f}, p, 1e-6));  // without the max
  EXPECT_FALSE(near_relu2({3, 0, 0.5f}, p, 1e-6));   // without the square
  EXPECT_FALSE(near_relu2({std::nanf(""), 0, 0.25f}, p, 1e-6));
}

// KDA of a prompt from what the convolutions gave and raw gates; `as_problem` is what its recurrence sees.
struct Prompt {
  int64_t H, K, V, slots;
  Pack pack;
  KdaGateParams gate = {};
  std::vector<float> q, k, v, f, b, A_log, dt_bias, state;
  std::vector<StateMark> marks;

  Prompt(const std::string& name, const std::vector<int64_t>& lengths, int64_t H_, int64_t K_, int64_t V_,
         int64_t slots_)
      : H(H_), K(K_), V(V_), slots(slots_), pack(lengths) {
    const int64_t T = pack.T();
    q = values(name + "/q", T * H * K, 2), k = values(name + "/k", T * H * K, 2), v = values(name + "/v", T * H * V);
    f = values(name + "/f", T * H * K, 3), b = values(name + "/b", T * H, 2), A_log = values(name + "/A", H);
    dt_bias = values(name + "/dt", H * K, 2), state = values(name + "/state", slots * H * V * K, 0.3f);
  }
  KdaProblem as_problem() const {
    KdaProblem p("unused", {}, H, K, V);
    const auto narrow = [](const Doubles& x) { return std::vector<float>(x.begin(), x.end()); };
    p.slots = slots, p.pack = pack, p.v = v, p.state = state;
    p.q = narrow(ref::unit_rows(doubles(q), K)), p.k = narrow(ref::unit_rows(doubles(k), K));
    p.g = narrow(ref::log_decay(doubles(f), doubles(A_log), doubles(dt_bias), H, K,
                                gate.kind == KdaGate::bounded ? double(gate.lower_bound) : 0));
    p.beta = narrow(ref::beta(doubles(b), double(gate.beta_scale)));
    return p;
  }
};

KdaAnswer run(Context& ctx, const Prompt& p) {
  const int64_t T = p.pack.T(), H = p.H, K = p.K, V = p.V;
  const Buffer A(ctx, p.A_log), dt(ctx, p.dt_bias), v(ctx, p.v);
  Buffer q(ctx, p.q), k(ctx, p.k), f(ctx, p.f), b(ctx, p.b), state(ctx, p.state), o(ctx, T * H * V);
  kda_prefill(ctx, {.q = q.view({T, H, K}),
                    .k = k.view({T, H, K}),
                    .v = v.view({T, H, V}),
                    .f = f.view({T, H, K}),
                    .b = b.view({T, H}),
                    .A_log = A.view({H}),
                    .dt_bias = dt.view({H * K}),
                    .gate = p.gate,
                    .state = state.view({p.slots, H, V, K}),
                    .slots = p.pack.slots(),
                    .packing = p.pack.packing(),
                    .marks = {p.marks, p.marks.data()},
                    .o = o.view({T, H, V})});
  EXPECT_TRUE(o.guards_intact() && state.guards_intact());
  return {o.fetch(), state.fetch()};
}

// A marked state is what the sequence would leave behind if it ended there.
std::pair<Doubles, Doubles> expected(const Prompt& p) {
  const KdaProblem whole = p.as_problem();
  auto want = reference(whole);
  const int64_t one = p.H * p.V * p.K;
  for (const StateMark& m : p.marks) {
    KdaProblem part = whole;
    const size_t n = size_t(m.sequence), from = size_t(p.pack.start[n]), to = from + size_t(m.tokens);
    const auto cut = [&](std::vector<float>& x, int64_t width) {
      x = {x.begin() + int64_t(from) * width, x.begin() + int64_t(to) * width};
    };
    cut(part.q, p.H * p.K), cut(part.k, p.H * p.K), cut(part.v, p.H * p.V), cut(part.g, p.H * p.K), cut(part.beta, p.H);
    part.pack = Pack({m.tokens});
    part.pack.in = {p.pack.in[n]};
    part.pack.out = {m.slot};
    const auto state = reference(part).second;
    std::copy_n(state.begin() + m.slot * one, one, want.second.begin() + m.slot * one);
  }
  return want;
}

// The gates' own roundings come on top of the recurrence's.
constexpr double kPrefillTolerance = 2 * kKdaTolerance;

TEST(KdaPrefill, FollowsTheRecurrenceFromRawGates) {
  CpuContext ctx;
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{64, 64}, {20, 12}})
    for (const bool bounded : {false, true}) {
      Prompt p(cat("prefill", K), {130, 0, 7}, 2, K, V, 3);
      if (bounded) p.gate = {KdaGate::bounded, -5, 2};
      const auto want = expected(p);
      const KdaAnswer got = run(ctx, p);
      EXPECT_LE(relative_l2(got.o, want.first), kPrefillTolerance) << K << bounded;
      EXPECT_LE(relative_l2(got.state, want.second), kPrefillTolerance) << K << bounded;
    }
}

TEST(KdaPrefill, KeepsTheStatesThatAreMarked) {
  CpuContext one(1), two(2);
  for (const auto& [K, V] : {std::pair<int64_t, int64_t>{64, 64}, {20, 12}}) {
    Prompt p(cat("marks", K), {17, 0, 1, 200, 0, 64, 129, 0}, 2, K, V, 14);
    p.pack.in = {3, -1, -1, 0, 5, 8, 9, -1};
    p.pack.out = {3, 1, 2, 4, 6, -1, 9, 7};
    const KdaAnswer plain = run(two, p);
    p.marks = {{3, 64, 10}, {3, 192, 11}, {6, 64, 12}, {6, 128, 13}};
    const auto want = expected(p);
    const KdaAnswer got = run(two, p);
    EXPECT_LE(relative_l2(got.o, want.first), kPrefillTolerance);
    EXPECT_LE(relative_l2(got.state, want.second), kPrefillTolerance);
    const int64_t each = p.H * p.V * p.K;
    for (int64_t s = 0; s < p.slots; ++s)
      EXPECT_LE(relative_l2(rows_of(got.state, s, 1, each),
                            Doubles(want.second.begin() + s * each, want.second.begin() + (s + 1) * each)),
                kPrefillTolerance)
          << "slot " << s;
    EXPECT_TRUE(run(one, p) == got) << "threads";
    EXPECT_LE(relative_l2(got.o, plain.o), kPrefillTolerance) << "marks change nothing else";
    // A mark one chunk off is another state.
    p.marks[0].tokens = 128;
    EXPECT_GT(relative_l2(run(two, p).state, want.second), 100 * kPrefillTolerance);
  }
}

TEST(KdaPrefill, TheDoorRefusesWrongMarks) {
  CpuContext ctx;
  Prompt p("door", {130}, 1, 16, 16, 4);
  for (const StateMark& bad : {StateMark{0, 63, 1}, {0, 0, 1}, {0, 192, 1}, {1, 64, 1}, {0, 64, 4}, {0, 64, -1}}) {
    p.marks = {bad};
    EXPECT_THROW(run(ctx, p), Error) << bad.sequence << " " << bad.tokens << " " << bad.slot;
  }
  p.marks = {{0, 128, 1}, {0, 64, 2}};
  EXPECT_THROW(run(ctx, p), Error) << "not sorted";
}

}  // namespace
}  // namespace kda::test
