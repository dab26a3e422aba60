// cli/bench_kda_case.h — inputs of the KDA ops for `kda bench kda`, their results in double, and running them.
#pragma once
#include <string>
#include <vector>

#include "base/tensor.h"
#include "kernels/backend.h"
#include "kernels/kda_prep.h"

namespace kda::cli {

struct KdaSizes {
  int64_t N, T;  // sequences, tokens of each
  int64_t H, K, V;
};

// Values already rounded to what the backend computes with.
struct KdaCase {
  std::string name;
  KdaSizes size;
  KdaGateParams gate;
  std::vector<float> q, k, f;         // [N,T,H,K]
  std::vector<float> v;               // [N,T,H,V]
  std::vector<float> b;               // [N,T,H]
  std::vector<float> A_log, dt_bias;  // [H] [H*K]
  std::vector<float> state;           // [N,H,V,K]
};

struct KdaResult {
  std::vector<double> o, state;  // [N,T,H,V] [N,H,V,K]
};

// Random normal values, A_log = log U(1,16), dt_bias 0.
KdaCase random_kda_case(const std::string& name, KdaSizes, KdaGateParams, Dtype activation);
// The cases of a file laid out as golden/kda_op.safetensors.
std::vector<KdaCase> golden_kda_cases(const std::string& path, Dtype activation);

// The recurrence in double, token by token.
KdaResult kda_in_double(const KdaCase&);
// The same by kda_prefill.
KdaResult run_kda_prefill(Context&, const KdaCase&);

// One token of each sequence by kda_decode, from projections; and in double.
struct KdaStep {
  KdaSizes size;                      // T = 1
  KdaCase inputs;                     // q, k, v before the convolution
  std::vector<float> g;               // [N,H*V]
  std::vector<float> conv;            // [2HK+HV,4]  q|k|v
  std::vector<float> g_bias, o_norm;  // [H*V] [V]
  std::vector<float> window;          // [N,3,2HK+HV]
};
KdaStep random_kda_step(KdaSizes, Dtype activation);
KdaResult kda_step_in_double(const KdaStep&);

double relative_distance(const std::vector<double>& got, const std::vector<double>& want);  // of L2 norms

// Values as a tensor of the backend, of dtype f32 or bf16.
Tensor to_backend(Context&, Dtype, Shape, const std::vector<float>&);
std::vector<double> from_backend(Context&, ConstView);
// A long tensor of random normal values, in which a few million of them repeat.
Tensor normal_values(Context&, Dtype, Shape, uint32_t seed);

}  // namespace kda::cli
