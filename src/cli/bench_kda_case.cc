#include "cli/bench_kda_case.h"

#include <algorithm>
#include <cmath>

#include "base/normal.h"
#include "checkpoint/safetensors.h"
#include "cli/json_input.h"
#include "kernels/kda.h"

namespace kda::cli {

namespace {

constexpr float kStepEps = 1e-5f;

double uniform(uint32_t seed, uint64_t i) {
  const auto w = Philox::block(seed, {uint32_t(i), uint32_t(i >> 32), 0, 1});
  return uniform53(w[0], w[1]);
}

std::vector<float> normal(uint32_t seed, int64_t n, float size = 1) {
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); i += 2) {
    const auto two = normals(Philox::block(seed, {uint32_t(i), uint32_t(uint64_t(i) >> 32), 0, 0}));
    x[i] = size * float(two[0]);
    if (i + 1 < x.size()) x[i + 1] = size * float(two[1]);
  }
  return x;
}

void round_to(Dtype t, std::vector<float>& x) {
  if (t == Dtype::bf16)
    for (float& v : x) v = float(bf16(v));
}

struct Gates {
  std::vector<double> decay;  // [K]
  double beta;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Head h of the token that begins at row `at` of [.,H,..].
Gates gates(const KdaCase& c, size_t at, int64_t h) {
  const int64_t K = c.size.K;
  const double rate = std::exp(double(c.A_log[size_t(h)]));
  Gates g{std::vector<double>(static_cast<size_t>(K)), c.gate.beta_scale * sigmoid(c.b[at + size_t(h)])};
  for (int64_t i = 0; i < K; ++i) {
    const double z = double(c.f[(at + size_t(h)) * size_t(K) + size_t(i)]) + c.dt_bias[size_t(h * K + i)];
    const double softplus = z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
    g.decay[size_t(i)] =
        std::exp(c.gate.kind == KdaGate::softplus ? -rate * softplus : c.gate.lower_bound * sigmoid(rate * z));
  }
  return g;
}

std::vector<double> unit(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  std::vector<double> y(x, x + n);
  for (double& v : y) v /= std::sqrt(sum + double(kL2NormEps));
  return y;
}

// One head, one token: S [V,K] moves on, o [V].
void recur(double* S, const Gates& g, const std::vector<double>& q, const std::vector<double>& k, const double* v,
           double* o, int64_t K, int64_t V) {
  for (int64_t j = 0; j < V; ++j) {
    double* s = S + j * K;
    double sk = 0, sq = 0;
    for (int64_t i = 0; i < K; ++i) sk += (s[i] *= g.decay[size_t(i)]) * k[size_t(i)];
    const double u = g.beta * (v[j] - sk);
    for (int64_t i = 0; i < K; ++i) sq += (s[i] += u * k[size_t(i)]) * q[size_t(i)];
    o[j] = sq / std::sqrt(double(K));
  }
}

std::vector<double> doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }

}  // namespace

KdaCase random_kda_case(const std::string& name, KdaSizes s, KdaGateParams gate, Dtype activation) {
  const int64_t n = s.N * s.T * s.H;
  KdaCase c{.name = name,
            .size = s,
            .gate = gate,
            .q = normal(1, n * s.K),
            .k = normal(2, n * s.K),
            .f = normal(3, n * s.K),
            .v = normal(4, n * s.V),
            .b = normal(5, n),
            .A_log = {},
            .dt_bias = std::vector<float>(size_t(s.H * s.K)),
            .state = normal(6, s.N * s.H * s.V * s.K, 0.3f)};
  for (int64_t h = 0; h < s.H; ++h) c.A_log.push_back(float(std::log(1 + 15 * uniform(7, uint64_t(h)))));
  for (auto* x : {&c.q, &c.k, &c.f, &c.v, &c.b}) round_to(activation, *x);
  return c;
}

std::vector<KdaCase> golden_kda_cases(const std::string& path, Dtype activation) {
  const SafetensorsFile file(path);
  const auto meta = file.metadata().find("cases");
  KDA_CHECK(meta != file.metadata().end(), path, ": has no metadata `cases`");
  std::vector<KdaCase> out;
  for (const auto& j : parse_json(meta->second, path + ": cases")) {
    const std::string i = std::to_string(j.at("index").get<int>()) + ".";
    const auto get = [&](const char* name) {
      const auto& e = file.tensors().at(i + name);
      const int64_t n = int64_t(e.end - e.begin) / 4;
      const Tensor t = file.tensor(i + name, {n});
      const float* p = ConstView(t).as<float>();
      return std::vector<float>(p, p + n);
    };
    const KdaSizes s{j.at("B"), j.at("T"), j.at("H"), j.at("K"), j.at("V")};
    KdaGateParams gate{.beta_scale = j.value("neg", false) ? 2.0f : 1.0f};
    if (j.contains("lower")) gate.kind = KdaGate::bounded, gate.lower_bound = j["lower"];
    KdaCase c{.name = j.value("name", "golden" + std::to_string(j.at("index").get<int>())),
              .size = s,
              .gate = gate,
              .q = get("q"),
              .k = get("k"),
              .f = get("g_raw"),
              .v = get("v"),
              .b = get("beta_raw"),
              .A_log = get("A_log"),
              .dt_bias = get("dt_bias"),
              .state = get("h0")};
    const auto kv = c.state;  // [N,H,K,V] there
    for (int64_t m = 0; m < s.N * s.H; ++m)
      for (int64_t a = 0; a < s.K; ++a)
        for (int64_t b = 0; b < s.V; ++b)
          c.state[size_t((m * s.V + b) * s.K + a)] = kv[size_t((m * s.K + a) * s.V + b)];
    for (auto* x : {&c.q, &c.k, &c.f, &c.v, &c.b}) round_to(activation, *x);
    out.push_back(std::move(c));
  }
  return out;
}

KdaResult kda_in_double(const KdaCase& c) {
  const auto [N, T, H, K, V] = c.size;
  const auto q = doubles(c.q), k = doubles(c.k), v = doubles(c.v);
  KdaResult r{std::vector<double>(v.size()), doubles(c.state)};
  for (int64_t n = 0; n < N; ++n)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = (n * T + t) * H + h;
        recur(&r.state[size_t((n * H + h) * V * K)], gates(c, size_t((n * T + t) * H), h), unit(&q[size_t(at * K)], K),
              unit(&k[size_t(at * K)], K), &v[size_t(at * V)], &r.o[size_t(at * V)], K, V);
      }
  return r;
}

KdaResult run_kda_prefill(Context& ctx, const KdaCase& c) {
  const auto [N, T, H, K, V] = c.size;
  const Dtype act = ctx.backend->activation;
  const Shape keys{N * T, H, K}, values{N * T, H, V}, state{N, H, V, K};
  const Tensor q = to_backend(ctx, act, keys, c.q), k = to_backend(ctx, act, keys, c.k),
               f = to_backend(ctx, act, keys, c.f), v = to_backend(ctx, act, values, c.v),
               b = to_backend(ctx, act, {N * T, H}, c.b), A = to_backend(ctx, Dtype::f32, {H}, c.A_log),
               bias = to_backend(ctx, Dtype::f32, {H * K}, c.dt_bias), S = to_backend(ctx, Dtype::f32, state, c.state),
               o = ctx.backend->alloc(act, values);
  std::vector<int32_t> start, slots;
  for (int64_t n = 0; n <= N; ++n) start.push_back(int32_t(n * T));
  for (int64_t n = 0; n < N; ++n) slots.push_back(int32_t(n));
  const Tensor d_start = ctx.backend->alloc(Dtype::i32, {N + 1}), d_slots = ctx.backend->alloc(Dtype::i32, {N});
  ctx.backend->copy(ctx, d_start.v.data, start.data(), start.size() * 4);
  ctx.backend->copy(ctx, d_slots.v.data, slots.data(), slots.size() * 4);
  const int32_t* slot = d_slots.v.as<int32_t>();
  ctx.workspace = ctx.backend->alloc(Dtype::u8, {int64_t(kda_prefill_workspace_bytes(ctx, N * T, N, H, K, V))});
  kda_prefill(ctx, {.q = q,
                    .k = k,
                    .v = v,
                    .f = f,
                    .b = b,
                    .A_log = A,
                    .dt_bias = bias,
                    .gate = c.gate,
                    .state = S,
                    .slots = {slot, slot},
                    .packing = {start, d_start.v.as<int32_t>()},
                    .o = o});
  return {from_backend(ctx, o), from_backend(ctx, S)};
}

KdaStep random_kda_step(KdaSizes s, Dtype activation) {
  s.T = 1;
  const int64_t HV = s.H * s.V, C = 2 * s.H * s.K + HV;
  KdaStep x{.size = s,
            .inputs = random_kda_case("step", s, {}, activation),
            .g = normal(11, s.N * HV),
            .conv = normal(12, C * 4, 0.5f),
            .g_bias = normal(13, HV, 0.1f),
            .o_norm = normal(14, s.V, 0.1f),
            .window = normal(15, s.N * 3 * C)};
  for (float& w : x.o_norm) w += 1;
  round_to(activation, x.g), round_to(activation, x.window);
  return x;
}

KdaResult kda_step_in_double(const KdaStep& x) {
  const auto [N, T, H, K, V] = x.size;
  const int64_t HK = H * K, HV = H * V, C = 2 * HK + HV;
  const KdaCase& c = x.inputs;
  KdaResult r{std::vector<double>(size_t(N * HV)), doubles(c.state)};
  for (int64_t n = 0; n < N; ++n) {
    std::vector<double> y(static_cast<size_t>(C));
    for (int64_t i = 0; i < C; ++i) {
      const double now = i < HK       ? c.q[size_t(n * HK + i)]
                         : i < 2 * HK ? c.k[size_t(n * HK + i - HK)]
                                      : c.v[size_t(n * HV + i - 2 * HK)];
      double sum = x.conv[size_t(i * 4 + 3)] * now;
      for (int64_t j = 0; j < 3; ++j) sum += double(x.conv[size_t(i * 4 + j)]) * x.window[size_t((n * 3 + j) * C + i)];
      y[size_t(i)] = sum * sigmoid(sum);
    }
    for (int64_t h = 0; h < H; ++h) {
      double* o = &r.o[size_t((n * H + h) * V)];
      recur(&r.state[size_t((n * H + h) * V * K)], gates(c, size_t(n * H), h), unit(&y[size_t(h * K)], K),
            unit(&y[size_t(HK + h * K)], K), &y[size_t(2 * HK + h * V)], o, K, V);
      double sum = 0;
      for (int64_t j = 0; j < V; ++j) sum += o[j] * o[j];
      for (int64_t j = 0; j < V; ++j)
        o[j] *= x.o_norm[size_t(j)] / std::sqrt(sum / double(V) + double(kStepEps)) *
                sigmoid(double(x.g[size_t(n * HV + h * V + j)]) + x.g_bias[size_t(h * V + j)]);
    }
  }
  return r;
}

double relative_distance(const std::vector<double>& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) error += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
  return std::sqrt(error / norm);
}

Tensor to_backend(Context& ctx, Dtype t, Shape s, const std::vector<float>& x) {
  const Tensor y = ctx.backend->alloc(t, s);
  if (t == Dtype::f32) {
    ctx.backend->copy(ctx, y.v.data, x.data(), y.v.bytes());
  } else {
    std::vector<bf16> narrow;
    for (float v : x) narrow.emplace_back(v);
    ctx.backend->copy(ctx, y.v.data, narrow.data(), y.v.bytes());
  }
  return y;
}

std::vector<double> from_backend(Context& ctx, ConstView v) {
  std::vector<double> out;
  if (v.dtype == Dtype::f32) {
    std::vector<float> x(size_t(v.size()));
    ctx.backend->copy(ctx, x.data(), v.data, v.bytes());
    out.assign(x.begin(), x.end());
  } else {
    std::vector<bf16> x(size_t(v.size()));
    ctx.backend->copy(ctx, x.data(), v.data, v.bytes());
    for (bf16 y : x) out.push_back(double(float(y)));
  }
  return out;
}

Tensor normal_values(Context& ctx, Dtype t, Shape s, uint32_t seed) {
  const int64_t period = std::min<int64_t>(s.size(), (1 << 21) + 12345);
  const Tensor some = to_backend(ctx, t, {period}, normal(seed, period)), all = ctx.backend->alloc(t, s);
  const size_t piece = some.v.bytes();
  for (size_t at = 0; at < all.v.bytes(); at += piece)
    ctx.backend->copy(ctx, static_cast<std::byte*>(all.v.data) + at, some.v.data, std::min(piece, all.v.bytes() - at));
  return all;
}

}  // namespace kda::cli
