#include "train/calibrate.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/attention.h"
#include "kernels/conv.h"
#include "kernels/kda.h"
#include "kernels/kda_prep.h"
#include "kernels/matmul.h"
#include "kernels/rope.h"
#include "model/buffers.h"
#include "model/state.h"
#include "model/transformer.h"

namespace kda {

namespace {
constexpr int64_t kLeastTokens = 64;  // a query needs something to attend to
constexpr int64_t kStride = 8;        // every so many queries are measured
constexpr double kSharpBeta = 0.6, kEvenBeta = 0.3;
// Half-lives of a head's channels. Rotary positions: the teacher's channel compares tokens that are close beside its
// wavelength, so the memory is as long as one radian of its turn, but no longer than this often the head's distance.
constexpr double kShortest = 1.5, kReach = 4;
// Without positions: spread by this factor to either side of the head's distance.
constexpr double kSpread = 7.4;

View reshape(View v, Shape s) { return {v.data, v.dtype, s}; }

// In sixteen sums, which the compiler keeps in one register.
float dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float x : sums) sum += x;
  return sum;
}

double logit(double p) { return std::log(p / (1 - p)); }

// Sums over the sample for one layer.
struct Sums {
  std::vector<double> distance, log_distance, entropy;  // [H]  the second of ln(distance + 1); relative entropy
  double queries = 0;
  std::vector<double> input;  // [D]  of mixer inputs
  double tokens = 0;
  std::vector<double> product, square;  // [H*d]  student x teacher, student^2
};

// One sequence at a time: the teacher's forward pass, then each layer's own part on its inputs.
class Measurement {
 public:
  Measurement(Context& ctx, const Weights& teacher, const std::vector<bool>& layers, int64_t longest,
              const CalibrateOptions& options)
      : ctx_(ctx), model_(teacher), options_(options), pool_(ctx, teacher.config, 1) {
    pool_.reserve(ctx, 1, longest);
    buffers_ = plan_buffers(ctx, teacher, longest, 1, pool_.capacity());
    size_t scratch = buffers_.workspace.v.bytes();
    const int64_t D = teacher.config.width;
    for (size_t l = 0; l < layers.size(); ++l) {
      if (!layers[l]) continue;
      const LayerSpec& s = teacher.layers[l].spec;
      KDA_CHECK(s.mixer == Mixer::full && !s.qkv_bias, "calibrate: layer ", l, " is not full attention without biases");
      which_.push_back(int64_t(l));
      inputs_.push_back(host_tensor(Dtype::f32, {longest, D}));
      Sums& sums = sums_[int64_t(l)];
      sums.distance.resize(size_t(s.heads));
      sums.log_distance.resize(size_t(s.heads));
      sums.entropy.resize(size_t(s.heads));
      sums.input.resize(size_t(D));
      sums.product.resize(size_t(s.heads * s.head_dim));
      sums.square.resize(size_t(s.heads * s.head_dim));
      scratch = std::max({scratch, kda_forward_workspace_bytes(ctx, longest, s.heads, s.head_dim, s.head_dim),
                          matmul_workspace_bytes(ctx, longest, D, s.heads * s.head_dim),
                          attention_workspace_bytes(ctx, longest, s.heads, s.head_dim, longest)});
    }
    buffers_.workspace = host_tensor(Dtype::u8, {int64_t(scratch)});
    ctx_.workspace = buffers_.workspace;
  }

  std::map<int64_t, Sums>& sums() { return sums_; }

  template <class F>
  void run(const std::vector<int32_t>& ids, const F& part) {
    const int64_t T = int64_t(ids.size()), D = model_.config().width;
    const int32_t start[] = {0, int32_t(T)}, in[] = {-1}, out[] = {0}, past[] = {0};
    std::vector<Tap> taps;
    for (size_t i = 0; i < which_.size(); ++i)
      taps.push_back({which_[i], TapPoint::mixer_in, view(inputs_[i].v.as<float>(), {T, D})});
    model_.prefill(ctx_, buffers_, pool_, {ids, start, in, out, past}, taps);
    for (size_t i = 0; i < which_.size(); ++i) part(which_[i], taps[i].to);
    if (options_.progress) options_.progress(T);
  }

  // Rotated queries [T,H,d] and keys [T,G,d], values [T,G,d].
  struct Heads {
    Tensor q, k, v;
  };
  Heads heads(int64_t layer, View x, bool rotate) {
    const LayerWeights& w = model_.weights().layers[size_t(layer)];
    const LayerSpec& s = w.spec;
    const int64_t T = x.dim(0), d = s.head_dim;
    Heads h{host_tensor(Dtype::f32, {T, s.heads * d}), host_tensor(Dtype::f32, {T, s.kv_heads * d}),
            host_tensor(Dtype::f32, {T, s.kv_heads * d})};
    const MatmulSegment segments[] = {{w.full.q.view(), h.q}, {w.full.k.view(), h.k}, {w.full.v.view(), h.v}};
    matmul(ctx_, {.x = x, .segments = segments});
    if (!rotate || !s.rope) return h;
    const RopeTable table = rope_table(model_.config().rope, d);
    std::vector<int32_t> position(static_cast<size_t>(T));
    for (size_t t = 0; t < position.size(); ++t) position[t] = int32_t(t);
    for (const auto& [t, n] : {std::pair(h.q, s.heads), std::pair(h.k, s.kv_heads)})
      rope(ctx_, {.x = reshape(t, {T, n, d}),
                  .position = {position.data(), Dtype::i32, {T}},
                  .inv_freq = view(table.inv_freq.data(), {d / 2}),
                  .factor = table.factor});
    return h;
  }

  // How far and how evenly each head attends.
  void attention_shape(int64_t layer, View x) {
    const LayerSpec& s = model_.weights().layers[size_t(layer)].spec;
    const int64_t T = x.dim(0), D = x.dim(1), H = s.heads, G = s.kv_heads, d = s.head_dim;
    const Heads h = heads(layer, x, true);
    const float *q = h.q.v.as<float>(), *k = h.k.v.as<float>();
    Sums& sums = sums_.at(layer);
    const int64_t first = kLeastTokens - 1, count = (T - first + kStride - 1) / kStride;
    std::vector<double> logs(static_cast<size_t>(T));
    for (size_t i = 0; i < logs.size(); ++i) logs[i] = std::log(double(i + 1));
    ctx_.pool->run(H, [&](int64_t head, int) {
      std::vector<double> p(static_cast<size_t>(T));
      for (int64_t t = first; t < T; t += kStride) {
        double most = -1e300, all = 0, rest = 0;
        for (int64_t i = 0; i <= t; ++i) {
          const float *a = q + (t * H + head) * d, *b = k + (i * G + head / (H / G)) * d;
          most = std::max(most, p[size_t(i)] = double(dot(a, b, d)) / std::sqrt(double(d)));
        }
        double score = 0, distance = 0, log_distance = 0;  // weighted sums: of the score, distance, ln(distance + 1)
        for (int64_t i = 0; i <= t; ++i) {
          const double e = std::exp(p[size_t(i)] - most);
          all += e;
          score += e * (p[size_t(i)] - most);
          if (i == 0) {
            rest = e;  // where heads rest that have nothing to look for: no distance
          } else {
            distance += e * double(t - i);
            log_distance += e * logs[size_t(t - i)];
          }
        }
        if (const double mass = all - rest; mass > 1e-6 * all) {
          sums.distance[size_t(head)] += distance / mass;
          sums.log_distance[size_t(head)] += log_distance / mass;
        }
        sums.entropy[size_t(head)] += (std::log(all) - score / all) / std::log(double(t + 1));
      }
    });
    sums.queries += double(count);
    const float* in = x.as<float>();
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < D; ++c) sums.input[size_t(c)] += in[t * D + c];
    sums.tokens += double(T);
  }

  // What the student's heads give with the decays found, against the teacher's.
  void compare_heads(int64_t layer, View x, const LayerCalibration& found, double eps) {
    const LayerSpec& s = model_.weights().layers[size_t(layer)].spec;
    const int64_t T = x.dim(0), H = s.heads, G = s.kv_heads, d = s.head_dim, HK = H * d;
    const int32_t start[] = {0, int32_t(T)}, in[] = {-1}, out[] = {0}, past[] = {0};
    const Packing packing{start, start};
    const Slots slots{in, out};
    const auto rows = [&](int64_t width) { return host_tensor(Dtype::f32, {T, width}); };

    const Heads rotated = heads(layer, x, true);
    const Tensor target = rows(HK), k_cache = host_tensor(Dtype::f32, {1, T, G, d}),
                 v_cache = host_tensor(Dtype::f32, {1, T, G, d});
    attention(ctx_, {.q = reshape(rotated.q, {T, H, d}),
                     .k = reshape(rotated.k, {T, G, d}),
                     .v = reshape(rotated.v, {T, G, d}),
                     .k_cache = k_cache,
                     .v_cache = v_cache,
                     .slot = out,
                     .past = past,
                     .packing = packing,
                     .o = reshape(target, {T, H, d})});

    Heads plain = heads(layer, x, false);
    for (Tensor* t : {&plain.k, &plain.v}) {
      const Tensor wide = rows(HK);
      for (int64_t r = 0; r < T * H; ++r)
        std::copy_n(t->v.as<float>() + (r / H * G + r % H / (H / G)) * d, d, wide.v.as<float>() + r * d);
      *t = wide;
    }
    const Tensor taps = host_tensor(Dtype::f32, {HK, 4}), window = host_tensor(Dtype::f32, {1, 3, HK});
    for (int64_t c = 0; c < HK; ++c) taps.v.as<float>()[c * 4 + 3] = kIdentityTap;
    for (Tensor* t : {&plain.q, &plain.k, &plain.v}) {
      const Tensor y = rows(HK);
      conv_silu(ctx_, {.x = *t, .w = taps, .window = window, .slots = slots, .packing = packing, .y = y});
      *t = y;
    }
    const Tensor f = rows(HK), b = rows(H), o = rows(HK), state = host_tensor(Dtype::f32, {1, H, d, d});
    const WeightView b_proj{view(found.b_proj.data(), {H, x.dim(1)}), {}};
    const MatmulSegment segment{b_proj, b};
    matmul(ctx_, {.x = x, .segments = {&segment, 1}});
    const std::vector<float> A_log(static_cast<size_t>(H));
    const Shape wide{T, H, d};
    kda_prep(ctx_, {.q = reshape(plain.q, wide),
                    .k = reshape(plain.k, wide),
                    .f = reshape(f, wide),
                    .b = b,
                    .A_log = view(A_log.data(), {H}),
                    .dt_bias = view(found.dt_bias.data(), {HK}),
                    .gate = {.kind = options_.bounded_gate ? KdaGate::bounded : KdaGate::softplus,
                             .lower_bound = float(options_.lower_bound)},
                    .log_decay = reshape(f, wide),
                    .beta = b});
    kda_forward(ctx_, {.q = reshape(plain.q, wide),
                       .k = reshape(plain.k, wide),
                       .v = reshape(plain.v, wide),
                       .log_decay = reshape(f, wide),
                       .beta = b,
                       .state = state,
                       .slots = slots,
                       .packing = packing,
                       .o = reshape(o, wide)});

    const float *got = o.v.as<float>(), *want = target.v.as<float>();
    Sums& sums = sums_.at(layer);
    for (int64_t r = 0; r < T * H; ++r) {
      double square = 0;
      for (int64_t c = 0; c < d; ++c) square += double(got[r * d + c]) * got[r * d + c];
      const double norm = 1 / std::sqrt(square / double(d) + eps);
      for (int64_t c = 0; c < d; ++c) {
        const size_t at = size_t(r % H * d + c);
        const double y = got[r * d + c] * norm;
        sums.product[at] += y * want[r * d + c];
        sums.square[at] += y * y;
      }
    }
  }

 private:
  Context& ctx_;
  Transformer model_;
  const CalibrateOptions& options_;
  StatePool pool_;
  Buffers buffers_;
  std::vector<int64_t> which_;
  std::vector<Tensor> inputs_;
  std::map<int64_t, Sums> sums_;
};

// Tokens after which channel i of head h has forgotten half.
double half_life(const LayerCalibration& c, size_t h, size_t i, std::span<const float> inv_freq) {
  if (!inv_freq.empty())
    return std::max(std::min(1 / double(inv_freq[i % inv_freq.size()]), kReach * c.distance[h]), kShortest);
  const double turn = double(i) * std::numbers::phi, u = turn - std::floor(turn);  // even, in no order
  return std::max(c.typical[h], 0.5) * std::pow(kSpread, 1 - 2 * u);
}

// dt_bias and b_proj.
LayerCalibration decays(const Sums& sums, const LayerSpec& s, const RopeConfig& rope, const CalibrateOptions& options) {
  const size_t H = size_t(s.heads), d = size_t(s.head_dim), D = sums.input.size();
  LayerCalibration c;
  const std::vector<float> inv_freq = s.rope ? rope_table(rope, s.head_dim).inv_freq : std::vector<float>();
  std::vector<double> mean(D);
  double length = 0;
  for (size_t i = 0; i < D; ++i) length += (mean[i] = sums.input[i] / sums.tokens) * mean[i];
  for (size_t h = 0; h < H; ++h) {
    c.distance.push_back(sums.distance[h] / sums.queries);
    c.typical.push_back(std::exp(sums.log_distance[h] / sums.queries));
    c.entropy.push_back(std::clamp(sums.entropy[h] / sums.queries, 0.0, 1.0));
    for (size_t i = 0; i < d; ++i) {
      const double r = std::log(2.0) / half_life(c, h, i, inv_freq);
      const double bias =
          options.bounded_gate ? logit(std::min(r / -options.lower_bound, 0.9)) : std::log(std::expm1(r));
      c.dt_bias.push_back(float(bias));
    }
    // No bias of its own: the logit lies along the mean input.
    const double b = logit(kSharpBeta + (kEvenBeta - kSharpBeta) * c.entropy[h]);
    for (size_t i = 0; i < D; ++i) c.b_proj.push_back(length > 0 ? float(b * mean[i] / length) : 0);
  }
  return c;
}

// The norm takes any scale of v away again, so the scale lies behind it: o_norm is common to the heads, the output
// gate's bias brings it down to each channel's own.
void scales(const Sums& sums, const LayerSpec& s, LayerCalibration& c) {
  const size_t H = size_t(s.heads), d = size_t(s.head_dim);
  std::vector<double> a(H * d);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = std::max(sums.square[i] > 0 ? sums.product[i] / sums.square[i] : 0.0, 1e-4);
  c.o_norm.resize(d);
  c.g_bias.resize(H * d);
  for (size_t i = 0; i < d; ++i) {
    double most = 0;
    for (size_t h = 0; h < H; ++h) most = std::max(most, a[h * d + i]);
    c.o_norm[i] = float(2 * most);  // the gate of the largest is at 1/2
    for (size_t h = 0; h < H; ++h)
      c.g_bias[h * d + i] = float(logit(std::clamp(a[h * d + i] / (2 * most), 1e-3, 0.999)));
  }
}
}  // namespace

std::map<int64_t, LayerCalibration> calibrate(Context& ctx, const Weights& teacher, const std::vector<bool>& layers,
                                              std::span<const std::vector<int32_t>> sample,
                                              const CalibrateOptions& options) {
  KDA_CHECK(layers.size() == teacher.layers.size(), "calibrate: ", layers.size(), " marks for ", teacher.layers.size(),
            " layers");
  int64_t longest = 0;
  for (const auto& ids : sample) longest = std::max(longest, int64_t(ids.size()));
  KDA_CHECK(longest >= kLeastTokens, "calibrate: the longest sample text has ", longest, " tokens, needed ",
            kLeastTokens, " or more");
  Measurement m(ctx, teacher, layers, longest, options);
  const auto each = [&](const auto& part) {
    for (const auto& ids : sample)
      if (int64_t(ids.size()) >= kLeastTokens) m.run(ids, part);
  };
  std::map<int64_t, LayerCalibration> out;
  each([&](int64_t l, View x) { m.attention_shape(l, x); });
  for (const auto& [l, sums] : m.sums())
    out[l] = decays(sums, teacher.layers[size_t(l)].spec, teacher.config.rope, options);
  each([&](int64_t l, View x) { m.compare_heads(l, x, out.at(l), teacher.config.norm_eps); });
  for (const auto& [l, sums] : m.sums()) scales(sums, teacher.layers[size_t(l)].spec, out.at(l));
  return out;
}

}  // namespace kda
