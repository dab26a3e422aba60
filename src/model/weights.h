// model/weights.h — a model's weights arranged by layer, as the forward pass takes them.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "kernels/backend.h"

namespace kda {

// A matrix [N,K] as stored (f32, bf16, f16) or int8 with one f32 scale per row, and a bias where the model has one.
struct Linear {
  Tensor w;
  Tensor scale;  // f32 [N], int8 only
  Tensor bias;   // f32 [N], or empty
  WeightView view() const { return {w, scale ? ConstView(scale) : ConstView{}}; }
  int64_t N() const { return w.shape()[0]; }
  int64_t K() const { return w.shape()[1]; }
};

struct FullAttentionWeights {
  Linear q, k, v, o;
};

struct KdaWeights {
  Linear q, k, v, f0, f1, b, g0, g1, o;  // g1.bias joins the output gate
  Tensor q_conv, k_conv, v_conv;         // f32 [C,4]
  Tensor A_log, dt_bias;                 // f32 [H], [H*K]
  Tensor g_bias, o_norm;                 // f32 [H*V], [V]
};

struct MlpWeights {
  Linear gate;  // swiglu only
  Linear up, down;
};

struct LayerWeights {
  LayerSpec spec;
  Tensor mixer_norm, mlp_norm;  // f32 [D]
  FullAttentionWeights full;    // spec.mixer == full
  KdaWeights kda;               // spec.mixer == kda
  MlpWeights mlp;
};

struct Weights {
  ModelConfig config;
  Tensor embedding;  // [vocabulary,D]
  std::vector<LayerWeights> layers;
  Tensor final_norm;  // f32 [D]
  Linear head;        // the embedding's tensor where tied

  // Matrices streamed for one generated token, with scales, in bytes: what decoding is bound by.
  int64_t decode_bytes() const;
};

// Matrices stay where they lie (mapped); small vectors become f32 copies.
Weights arrange_weights(const Checkpoint&);

// Every tensor of the model's table by canonical name, in the table's order, for reading or replacing it (a tied head is
// visited once, as the embedding: whoever replaces that must also set head.w). Empty tensors are visited too.
void each_parameter(Weights&, const std::function<void(const std::string& name, Tensor&)>&);

// The matrices that --weights int8 turns into int8: q, k, v, o, the MLP's and the head. Gates and decays (f, g, b)
// stay as stored: they are 2 % of the bytes, and an error there is multiplied along the sequence.
struct NamedLinear {
  std::string name;  // canonical tensor name
  Linear* linear;
};
std::vector<NamedLinear> quantizable(Weights&);

}  // namespace kda
