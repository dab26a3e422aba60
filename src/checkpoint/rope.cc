// Rotary frequencies, each step rounded to float32 where transformers' modeling_rope_utils.py has a float32 tensor, and
// in double where it has a Python number.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "checkpoint/config.h"

namespace kda {

namespace {
// theta^(2i/d), the exponent rounded as a float32 quotient.
float wavelength(double theta, int64_t i, int64_t d) {
  return float(std::pow(double(float(theta)), double(float(2 * i) / float(d))));
}

double mscale_of(double scale, double mscale) { return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0; }

void llama3(const RopeConfig& r, std::vector<float>& inv_freq) {
  const float low = float(r.original_max_position_embeddings / r.low_freq_factor);
  const float high = float(r.original_max_position_embeddings / r.high_freq_factor);
  const float factor = float(r.factor), span = float(r.high_freq_factor - r.low_freq_factor);
  for (float& f : inv_freq) {
    const float wave = float(2 * std::numbers::pi) / f;
    if (wave > low) {
      f = f / factor;
    } else if (!(wave < high)) {
      const float smooth = (float(r.original_max_position_embeddings) / wave - float(r.low_freq_factor)) / span;
      const float scaled = (1.0f - smooth) * f / factor, kept = smooth * f;
      f = scaled + kept;
    }
  }
}

void yarn(const RopeConfig& r, int64_t d, std::vector<float>& inv_freq) {
  const auto dimension = [&](double rotations) {
    return double(d) * std::log(r.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(r.theta));
  };
  double lo = dimension(r.beta_fast), hi = dimension(r.beta_slow);
  if (r.truncate) lo = std::floor(lo), hi = std::ceil(hi);
  lo = std::max(lo, 0.0);
  hi = std::min(hi, double(d - 1));
  if (lo == hi) hi += 0.001;
  for (int64_t i = 0; i < d / 2; ++i) {
    const float p = wavelength(r.theta, i, d);
    const float e = 1.0f / p, n = 1.0f / (float(r.factor) * p);
    const float ramp = std::clamp((float(i) - float(lo)) / float(hi - lo), 0.0f, 1.0f);
    const float k = 1.0f - ramp;
    const float interpolated = n * (1.0f - k), kept = e * k;
    inv_freq[size_t(i)] = interpolated + kept;
  }
}
}  // namespace

RopeTable rope_table(const RopeConfig& r, int64_t head_dim) {
  KDA_CHECK(head_dim > 0 && head_dim % 2 == 0, "rope_table: head_dim is ", head_dim, ", needed even and above 0");
  RopeTable t;
  t.inv_freq.resize(size_t(head_dim / 2));
  for (int64_t i = 0; i < head_dim / 2; ++i) t.inv_freq[size_t(i)] = 1.0f / wavelength(r.theta, i, head_dim);
  switch (r.kind) {
    case RopeKind::standard: break;
    case RopeKind::linear:
      for (float& f : t.inv_freq) f /= float(r.factor);
      break;
    case RopeKind::llama3: llama3(r, t.inv_freq); break;
    case RopeKind::yarn: {
      yarn(r, head_dim, t.inv_freq);
      double factor = mscale_of(r.factor, 1);
      if (r.mscale.value_or(0) != 0 && r.mscale_all_dim.value_or(0) != 0)
        factor = mscale_of(r.factor, *r.mscale) / mscale_of(r.factor, *r.mscale_all_dim);
      t.factor = float(r.attention_factor.value_or(factor));
      break;
    }
  }
  return t;
}

}  // namespace kda
