// The golden operator vectors through prep, forward and all the way back.
#include "tests/golden.h"
#include "tests/kernels/kda_gradient.h"

using namespace kda;
using namespace kda::test;

namespace {

// States are stored [B,H,K,V].
std::vector<float> transposed(const std::vector<float>& s, int64_t K, int64_t V) {
  std::vector<float> y(s.size());
  for (size_t m = 0; m < s.size(); m += size_t(K * V))
    for (int64_t d = 0; d < K; ++d)
      for (int64_t r = 0; r < V; ++r) y[m + size_t(r * K + d)] = s[m + size_t(d * V + r)];
  return y;
}

TEST(KdaBackward, GivesTheGoldenGradients) {
  KDA_NEED(path, "kda_op.safetensors");
  const GoldenFile file(path);
  CpuContext ctx;
  double worst = 0;
  for (const auto& c : file.cases()) {
    const int64_t B = c["B"], n = c["T"], H = c["H"], K = c["K"], V = c["V"], T = B * n;
    const std::string name = std::to_string(c["index"].get<int>()) + ".";
    const auto get = [&](const std::string& what) { return file[name + what].floats(); };
    const float lower = c.value("lower", 0.0f);
    const KdaGateParams gate{.kind = lower == 0 ? KdaGate::softplus : KdaGate::bounded,
                             .lower_bound = lower,
                             .beta_scale = c.value("neg", false) ? 2.0f : 1.0f};
    const auto qs = get("q"), ks = get("k"), fs = get("g_raw"), bs = get("beta_raw");
    KdaProblem p("", std::vector<int64_t>(size_t(B), n), H, K, V);
    p.v = get("v"), p.state = transposed(get("h0"), K, V);
    Buffer A(ctx, get("A_log")), bias(ctx, get("dt_bias"));
    const Shape thk{T, H, K}, th{T, H};
    {
      Buffer q(ctx, qs), k(ctx, ks), f(ctx, fs), b(ctx, bs);
      kda_prep(ctx, {q.view(thk), k.view(thk), f.view(thk), b.view(th), A.view({H}), bias.view({H * K}), gate,
                     f.view(thk), b.view(th)});
      p.q = q.fetch(), p.k = k.fetch(), p.g = f.fetch(), p.beta = b.fetch();
    }
    const auto got = run_backward(ctx, p, get("d_o"), transposed(get("d_hT"), K, V));
    Buffer q(ctx, qs), k(ctx, ks), f(ctx, fs), b(ctx, bs);
    Buffer dq(ctx, got.d.q), dk(ctx, got.d.k), df(ctx, got.d.g), db(ctx, got.d.beta);
    Buffer dA(ctx, std::vector<float>(size_t(H))), d_bias(ctx, std::vector<float>(size_t(H * K)));
    kda_prep_backward(ctx, {q.view(thk), k.view(thk), f.view(thk), b.view(th), A.view({H}), bias.view({H * K}), gate,
                            dq.view(thk), dk.view(thk), df.view(thk), db.view(th), dA.view({H}), d_bias.view({H * K})});
    const auto expect = [&](const std::string& what, const std::vector<float>& x, const std::vector<float>& want) {
      const double error = relative_l2(x, want);
      worst = std::max(worst, error);
      EXPECT_LE(error, 1e-5) << name << what;
      auto bad = x;
      bad[bad.size() / 2] +=
          1e-3f * *std::max_element(bad.begin(), bad.end(), [](float l, float r) { return std::abs(l) < std::abs(r); });
      EXPECT_GT(relative_l2(bad, want), 1e-5) << name << what << ": one wrong number must be noticed";
    };
    expect("o", got.forward.o, get("o"));
    expect("hT", got.forward.state, transposed(get("hT"), K, V));
    expect("d_q", dq.fetch(), get("d_q"));
    expect("d_v", got.d.v, get("d_v"));
    expect("d_g_raw", df.fetch(), get("d_g_raw"));
    expect("d_beta_raw", db.fetch(), get("d_beta_raw"));
    expect("d_A_log", dA.fetch(), get("d_A_log"));
    expect("d_dt_bias", d_bias.fetch(), get("d_dt_bias"));
    expect("d_h0", got.d.state, transposed(get("d_h0"), K, V));
    // Keys of zero have a gradient a thousand times the others' (1/sqrt(1e-6)): each kind on its own.
    std::vector<float> zero, zero_want, other, other_want;
    const auto got_k = dk.fetch(), want_k = get("d_k");
    for (size_t i = 0; i < ks.size(); i += size_t(K)) {
      const auto at = [&](const std::vector<float>& x) { return x.begin() + int64_t(i); };
      const bool none = std::all_of(at(ks), at(ks) + K, [](float x) { return x == 0; });
      auto &to = none ? zero : other, &to_want = none ? zero_want : other_want;
      to.insert(to.end(), at(got_k), at(got_k) + K);
      to_want.insert(to_want.end(), at(want_k), at(want_k) + K);
    }
    EXPECT_EQ(zero.empty(), !c.value("sat", false));
    if (!zero.empty()) expect("d_k of zero keys", zero, zero_want);
    expect("d_k", other, other_want);
  }
  RecordProperty("worst_relative_l2_e9", int(worst * 1e9));
}

}  // namespace
