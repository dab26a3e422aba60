// train/calibrate.h — what a teacher's attention says about the KDA layer that shall replace it, measured on sample
// text. After arXiv:2606.16429, with the differences named in docs/CONVERT.md.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "model/weights.h"

namespace kda {

// The last tap of the identity convolutions. SiLU follows them and is nearly linear (x/2) for inputs as small as this
// makes them: signs and directions of the teacher's q, k, v survive. q and k are made unit length afterwards.
inline constexpr float kIdentityTap = 0.1f;

// Of one layer. H heads of the teacher, d wide; D the model's width.
struct LayerCalibration {
  std::vector<double> distance;  // [H]    mean of how many tokens back a head attends; the first token, where heads
                                 // rest, left out
  std::vector<double> typical;   // [H]    the same as a geometric mean, plus 1
  std::vector<double> entropy;   // [H]    mean entropy of its attention, relative to the largest possible: 0 to 1
  // [H*d]  The memory of channel i halves over 1 / inv_freq(i mod d/2) tokens, at least 1.5 and at most 4 x distance
  // (A_log = 0); in a layer without positions over `typical` tokens, by channel from 7.4 times sooner to 7.4 times
  // later.
  std::vector<float> dt_bias;
  std::vector<float> b_proj;  // [H,D]  beta is 0.6 for a sharp head, 0.3 for an even one, at the mean input
  std::vector<float> g_bias;  // [H*d]  with o_norm: the least-squares scale of each channel to the teacher's
  std::vector<float> o_norm;  // [d]
};

struct CalibrateOptions {
  bool bounded_gate = false;
  double lower_bound = -5;
  std::function<void(int64_t tokens)> progress = {};  // told the tokens just done; 2 passes over the sample
};

// Runs the teacher over the sample twice, sequence by sequence, each from its start,
// and measures the layers asked for, which must be full attention. Memory: one sequence's inputs of these layers.
// Throws Error when no sequence has 64 tokens or more.
std::map<int64_t, LayerCalibration> calibrate(Context&, const Weights& teacher, const std::vector<bool>& layers,
                                              std::span<const std::vector<int32_t>> sample, const CalibrateOptions&);

}  // namespace kda
