// A recorded step of one or two rows, whose products and KDA steps go in one launch, against the same ops one by one.
#include <cmath>
#include <functional>

#include "kernels/kda_decode.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "tests/cuda.h"

using namespace kda;
using namespace kda::test;

namespace {

// Weights in a type, with scales where that has 8 bits.
struct Matrix {
  DeviceArray<uint8_t> bytes;
  DeviceArray<float> scale;
  Dtype type;
  int64_t N, K;

  static Matrix make(Context& ctx, const std::string& name, Dtype d, int64_t N, int64_t K) {
    const auto v = values(name, N * K);
    std::vector<uint8_t> bytes(v.size() * size_of(d));
    for (size_t i = 0; i < v.size(); ++i) {
      const bf16 b(v[i] / std::sqrt(float(K)) * 2);
      if (d == Dtype::bf16)
        std::memcpy(&bytes[2 * i], &b, 2);
      else
        bytes[i] = d == Dtype::i8 ? uint8_t(int8_t(std::lround(v[i] * 127)))
                                  : uint8_t(0x30 + int(v[i] * 8) % 8) | (v[i] < 0) << 7;
    }
    return {{ctx, bytes}, {ctx, std::vector<float>(size_t(N), 0.02f / std::sqrt(float(K)))}, d, N, K};
  }
  WeightView view() const {
    WeightView w{{bytes.data(), type, {N, K}}, {}};
    if (type != Dtype::bf16) w.scale = scale.view();
    return w;
  }
};

// Two layers as a model has them, with widths that leave ragged ends everywhere.
struct Model {
  static constexpr int64_t H = 3, W = 128, HW = H * W, D = 320, F = 704;
  struct Layer {
    Matrix q, k, v, f0, g0, b, f1, g1, o, up, down;
    Buffer q_conv, k_conv, v_conv, A, bias, g_bias, o_norm, norm;
    TypedBuffer window;
    Buffer state;
  };
  Context& ctx;
  int64_t R;
  std::vector<Layer> layers;
  TypedBuffer q, k, v, f_mid, g_mid, b, f, g, o, h, wide;
  Buffer x, start;
  DeviceArray<int32_t> slots;

  Model(Context& c, Dtype d, int64_t rows)
      : ctx(c),
        R(rows),
        q(c, Dtype::bf16, R * HW),
        k(c, Dtype::bf16, R * HW),
        v(c, Dtype::bf16, R * HW),
        f_mid(c, Dtype::bf16, R * W),
        g_mid(c, Dtype::bf16, R * W),
        b(c, Dtype::bf16, R * H),
        f(c, Dtype::bf16, R * HW),
        g(c, Dtype::bf16, R * HW),
        o(c, Dtype::bf16, R * HW),
        h(c, Dtype::bf16, R * F),
        wide(c, Dtype::bf16, R * F),
        x(c, values("chain/x", R * D, 0.05f)),
        start(c, values("chain/x", R * D, 0.05f)),
        slots(c, rows == 1 ? std::vector<int32_t>{1} : std::vector<int32_t>{2, 0}) {
    for (int l = 0; l < 2; ++l) {
      const std::string n = cat("chain/", l);
      const auto m = [&](const char* part, int64_t N, int64_t K, Dtype t) {
        return Matrix::make(c, n + part, t, N, K);
      };
      const auto vec = [&](const char* part, int64_t count) { return Buffer(c, values(n + part, count)); };
      layers.push_back({m("q", HW, D, d),
                        m("k", HW, D, d),
                        m("v", HW, D, d),
                        m("f0", W, D, Dtype::bf16),
                        m("g0", W, D, Dtype::bf16),
                        m("b", H, D, Dtype::bf16),
                        m("f1", HW, W, d),
                        m("g1", HW, W, d),
                        m("o", D, HW, d),
                        m("up", F, D, d),
                        m("down", D, F, d),
                        vec("qc", HW * 4),
                        vec("kc", HW * 4),
                        vec("vc", HW * 4),
                        vec("A", H),
                        vec("bias", HW),
                        vec("gb", HW),
                        vec("on", W),
                        vec("norm", D),
                        TypedBuffer(c, Dtype::bf16, rounded(values(n + "w", 3 * 3 * 3 * HW))),
                        Buffer(c, values(n + "S", 3 * HW * W, 0.3f))});
    }
  }

  // From the same x, states as they are left.
  void run() {
    ctx.backend->copy(ctx, x.view({R, D}).data, start.view({R, D}).data, size_t(R * D) * 4);
    step();
  }
  void step() {
    const float eps = 1e-5f;
    const View xs = x.view({R, D}), hs = h.view({R, F});
    const View normed{hs.data, Dtype::bf16, {R, D}};
    for (Layer& l : layers) {
      const MatmulSegment in[] = {{l.q.view(), q.view({R, HW})},     {l.k.view(), k.view({R, HW})},
                                  {l.v.view(), v.view({R, HW})},     {l.f0.view(), f_mid.view({R, W})},
                                  {l.g0.view(), g_mid.view({R, W})}, {l.b.view(), b.view({R, H})}};
      norm_matvec(ctx, {.x = xs, .norm = l.norm.view({D}), .eps = eps, .segments = in, .h = normed});
      const MatmulSegment gates[] = {{l.f1.view(), f.view({R, HW}), f_mid.view({R, W})},
                                     {l.g1.view(), g.view({R, HW}), g_mid.view({R, W})}};
      matvec(ctx, {.x = f_mid.view({R, W}), .segments = gates});
      kda_decode(ctx, {.q = q.view({R, HW}),
                       .k = k.view({R, HW}),
                       .v = v.view({R, HW}),
                       .f = f.view({R, HW}),
                       .b = b.view({R, H}),
                       .g = g.view({R, HW}),
                       .q_conv = l.q_conv.view({HW, 4}),
                       .k_conv = l.k_conv.view({HW, 4}),
                       .v_conv = l.v_conv.view({HW, 4}),
                       .A_log = l.A.view({H}),
                       .dt_bias = l.bias.view({HW}),
                       .g_bias = l.g_bias.view({HW}),
                       .o_norm = l.o_norm.view({W}),
                       .gate = {},
                       .eps = eps,
                       .window = l.window.view({3, 3, 3 * HW}),
                       .state = l.state.view({3, H, W, W}),
                       .slots = {slots.data(), slots.data()},
                       .y = o.view({R, HW})});
      matvec_add(ctx, {o.view({R, HW}), l.o.view(), xs, normed});
      const MatmulSegment up{l.up.view(), wide.view({R, F})};
      norm_matvec_relu2(ctx, {.x = xs, .norm = l.norm.view({D}), .eps = eps, .segments = {&up, 1}, .h = normed});
      matvec_add(ctx, {wide.view({R, F}), l.down.view(), xs, normed});
    }
  }
};

TEST(CudaChain, ARecordedStepIsWhatItsOpsAreOneByOne) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (Dtype d : {Dtype::bf16, Dtype::f8_e4m3, Dtype::i8})
    for (int64_t R : {1, 2}) {
      const std::string what = cat(name_of(d), ", ", R, " rows");
      Model alone(ctx, d, R), chained(ctx, d, R);
      const auto recorded = ctx.backend->record(ctx, [&] { chained.step(); });
      for (int step = 0; step < 3; ++step) {
        alone.run();
        ctx.backend->copy(ctx, chained.x.view({R, Model::D}).data, chained.start.view({R, Model::D}).data,
                          size_t(R * Model::D) * 4);
        recorded->run(ctx);
        // The gates' products are summed in another order before their rounding to bf16: a unit of it in some.
        const auto got = chained.x.fetch();
        EXPECT_LE(relative_l2(got, wide(alone.x.fetch())), 4e-3) << what << " step " << step;
        for (size_t l = 0; l < 2; ++l) {
          const auto S = chained.layers[l].state.fetch();
          EXPECT_LE(relative_l2(S, wide(alone.layers[l].state.fetch())), 4e-3) << what << " layer " << l;
          EXPECT_LE(relative_l2(chained.layers[l].window.fetch(), wide(alone.layers[l].window.fetch())), 8e-3) << what;
          EXPECT_TRUE(chained.layers[l].state.guards_intact() && chained.layers[l].window.guards_intact());
        }
        EXPECT_LE(relative_l2(chained.f.fetch(), wide(alone.f.fetch())), 8e-3) << what;
        EXPECT_LE(relative_l2(chained.g.fetch(), wide(alone.g.fetch())), 8e-3) << what;
        EXPECT_GT(relative_l2(got, wide(chained.start.fetch())), 0.05) << "sabotage: the layers do something";
      }
    }
}

TEST(CudaChain, TwoStepsOfOneStateKeepTheirOrder) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  Model alone(ctx, Dtype::bf16, 1), chained(ctx, Dtype::bf16, 1);
  alone.step(), alone.step();
  ctx.backend->record(ctx, [&] { chained.step(), chained.step(); })->run(ctx);
  EXPECT_LE(relative_l2(chained.x.fetch(), wide(alone.x.fetch())), 4e-3);
  EXPECT_LE(relative_l2(chained.layers[0].state.fetch(), wide(alone.layers[0].state.fetch())), 4e-3);
}

// Orders of ops in which a link must not begin before another has ended, or reads what two others wrote: each op's
// result is what it is one by one.
TEST(CudaChain, OpsMayComeInAnyOrder) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  constexpr int64_t D = 640;
  for (int64_t R : {1, 2}) {
    const Matrix a = Matrix::make(ctx, "order/a", Dtype::bf16, D, D), b = Matrix::make(ctx, "order/b", Dtype::i8, D, D),
                 narrow = Matrix::make(ctx, "order/narrow", Dtype::bf16, D, D / 2);
    struct Vectors {
      TypedBuffer x, y, z, h;
      Buffer sum;
    };
    const auto make = [&] {
      const auto v = [&](const char* name) { return TypedBuffer(ctx, Dtype::bf16, rounded(values(name, R * D))); };
      return Vectors{v("order/x"), v("order/y"), v("order/z"), TypedBuffer(ctx, Dtype::bf16, R * D),
                     Buffer(ctx, values("order/sum", R * D))};
    };
    const auto product = [&](const Matrix& w, TypedBuffer& from, TypedBuffer& to) {
      const MatmulSegment s{w.view(), to.view({R, D})};
      matvec(ctx, {.x = from.view({R, w.K}), .segments = {&s, 1}});
    };
    const auto add = [&](const Matrix& w, TypedBuffer& from, Vectors& v) {
      matvec_add(ctx, {from.view({R, D}), w.view(), v.sum.view({R, D}), v.h.view({R, D})});
    };
    const std::function<void(Vectors&)> orders[] = {
        [&](Vectors& v) { add(a, v.x, v), add(b, v.x, v), add(a, v.y, v); },  // sums, one after another
        [&](Vectors& v) { product(a, v.x, v.y), product(b, v.z, v.x); },      // x is read before it is written
        [&](Vectors& v) { product(a, v.x, v.y), product(b, v.z, v.y); },      // y is written twice
        [&](Vectors& v) { product(a, v.x, v.y), product(b, v.y, v.x), product(a, v.x, v.y), product(a, v.y, v.x); },
        [&](Vectors& v) { product(a, v.x, v.y), product(narrow, v.y, v.z); },  // a part of what was written
        [&](Vectors& v) { product(a, v.x, v.y), add(b, v.y, v), product(b, v.y, v.z), add(a, v.z, v); },
        [&](Vectors& v) { product(a, v.x, v.y), product(b, v.y, v.z), add(a, v.y, v), product(a, v.z, v.x); },
        [&](Vectors& v) {
          for (int i = 0; i < 80; ++i) product(i % 2 ? a : b, v.x, v.y), product(a, v.y, v.x);  // more than one launch
        },
    };
    // Memory that several tensors share in turn.
    const auto in_turn = [&](TypedBuffer& first, TypedBuffer& shared, TypedBuffer& last) {
      const auto at = [&](int64_t from) {
        return View{static_cast<bf16*>(shared.view({3 * R * D}).data) + from, Dtype::bf16, {R, D}};
      };
      const auto from_to = [&](const Matrix& w, ConstView from, View to) {
        const MatmulSegment s{w.view(), to};
        matvec(ctx, {.x = from, .segments = {&s, 1}});
      };
      from_to(a, first.view({R, D}), at(0));
      from_to(b, at(0), at(R * D));
      from_to(a, at(R * D), at(R * D / 2));
      from_to(b, at(R * D / 2), last.view({R, D}));
    };
    std::vector<float> results[2];
    for (bool chained : {false, true}) {
      TypedBuffer first(ctx, Dtype::bf16, rounded(values("order/x", R * D))), shared(ctx, Dtype::bf16, 3 * R * D),
          last(ctx, Dtype::bf16, R * D);
      if (chained)
        ctx.backend->record(ctx, [&] { in_turn(first, shared, last); })->run(ctx);
      else
        in_turn(first, shared, last);
      results[chained] = last.fetch();
    }
    EXPECT_EQ(results[0], results[1]) << R << " rows";
    for (const auto& order : orders) {
      Vectors alone = make(), chained = make();
      order(alone);
      const auto recorded = ctx.backend->record(ctx, [&] { order(chained); });
      recorded->run(ctx);
      const auto same = [&](auto& got, auto& want, const char* name) {
        EXPECT_EQ(got.fetch(), want.fetch()) << name << " of order " << &order - orders << ", " << R << " rows";
        EXPECT_TRUE(got.guards_intact());
      };
      same(chained.x, alone.x, "x"), same(chained.y, alone.y, "y"), same(chained.z, alone.z, "z");
      same(chained.sum, alone.sum, "sum");
    }
  }
}

// More values than what a block runs through before they are there, 320 pieces of 16 bytes: 400 and 648.
TEST(CudaChain, LongInputsAreAwaitedWhole) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  constexpr int64_t D = 1600, F = 5184;
  for (Dtype d : {Dtype::bf16, Dtype::f8_e4m3, Dtype::i8})
    for (int64_t R : {1, 2}) {
      const Matrix in = Matrix::make(ctx, "long/in", d, D, D), up = Matrix::make(ctx, "long/up", d, F, D),
                   down = Matrix::make(ctx, "long/down", d, D, F);
      const Buffer norm(ctx, values("long/norm", D));
      TypedBuffer first(ctx, Dtype::bf16, rounded(values("long/x", R * D))), wide(ctx, Dtype::bf16, R * F),
          h(ctx, Dtype::bf16, R * F);
      const auto run = [&](bool chained) {
        Buffer x(ctx, values("long/sum", R * D));
        const View xs = x.view({R, D}), hs = h.view({R, D});
        const auto ops = [&] {
          const MatmulSegment to{up.view(), wide.view({R, F})};
          for (int layer = 0; layer < 2; ++layer) {
            matvec_add(ctx, {first.view({R, D}), in.view(), xs, hs});
            norm_matvec_relu2(ctx, {.x = xs, .norm = norm.view({D}), .eps = 1e-5f, .segments = {&to, 1}, .h = hs});
            matvec_add(ctx, {wide.view({R, F}), down.view(), xs, hs});
          }
        };
        if (chained)
          ctx.backend->record(ctx, ops)->run(ctx);
        else
          ops();
        return std::pair(x.fetch(), wide.fetch());
      };
      const auto alone = run(false);
      EXPECT_EQ(run(true), alone) << name_of(d) << ", " << R << " rows";
      EXPECT_NE(alone.first, values("long/sum", R * D)) << "sabotage: the ops do something";
    }
}

TEST(CudaChain, WhatIsNoNumberIsHandedOn) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  constexpr int64_t D = 640;
  const Matrix w = Matrix::make(ctx, "nan/w", Dtype::bf16, D, D), v = Matrix::make(ctx, "nan/v", Dtype::f8_e4m3, D, D);
  auto first = rounded(values("nan/x", D));
  first[5] = NAN;
  TypedBuffer x(ctx, Dtype::bf16, first), y(ctx, Dtype::bf16, D), z(ctx, Dtype::bf16, D), h(ctx, Dtype::bf16, D);
  Buffer sum(ctx, values("nan/sum", D)), norm(ctx, values("nan/norm", D));
  ctx.backend
      ->record(ctx,
               [&] {
                 const MatmulSegment to_y{w.view(), y.view({1, D})}, to_z{v.view(), z.view({1, D})};
                 matvec(ctx, {.x = x.view({1, D}), .segments = {&to_y, 1}});
                 matvec_add(ctx, {y.view({1, D}), v.view(), sum.view({1, D}), h.view({1, D})});
                 norm_matvec_relu2(ctx, {.x = sum.view({1, D}),
                                         .norm = norm.view({D}),
                                         .eps = 1e-5f,
                                         .segments = {&to_z, 1},
                                         .h = h.view({1, D})});
               })
      ->run(ctx);
  for (float q : y.fetch()) EXPECT_TRUE(std::isnan(q));
  for (float q : sum.fetch()) EXPECT_TRUE(std::isnan(q));
  for (float q : z.fetch()) EXPECT_TRUE(std::isnan(q));
}

TEST(CudaChain, RunsGiveTheSameBits) {
  KDA_NEEDS_CUDA();
  CudaContext ctx;
  for (int64_t R : {1, 2}) {
    Model a(ctx, Dtype::bf16, R), b(ctx, Dtype::bf16, R);
    ctx.backend->record(ctx, [&] { a.step(); })->run(ctx);
    ctx.backend->record(ctx, [&] { b.step(); })->run(ctx);
    EXPECT_EQ(a.x.fetch(), b.x.fetch());
    EXPECT_EQ(a.layers[1].state.fetch(), b.layers[1].state.fetch());
  }
}

}  // namespace
