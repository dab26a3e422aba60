#include "train/objective.h"

namespace kda {

const char* name_of(LossFunction f) {
  switch (f) {
    case LossFunction::cross_entropy: return "cross_entropy";
    case LossFunction::kl: return "kl";
    case LossFunction::jsd: return "jsd";
    case LossFunction::tvd: return "tvd";
    case LossFunction::hinge: return "hinge";
    case LossFunction::logistic_ranking: return "logistic_ranking";
    case LossFunction::hs_mse: return "hs_mse";
    case LossFunction::hs_cosine: return "hs_cosine";
    case LossFunction::mixer_mse: return "mixer_mse";
  }
  return "?";
}

void LossSums::add(const LossSums& other) {
  tokens += other.tokens;
  total += other.total;
  if (terms.size() < other.terms.size()) terms.resize(other.terms.size());
  for (size_t i = 0; i < other.terms.size(); ++i) terms[i] += other.terms[i];
  if (layers.size() < other.layers.size()) layers.resize(other.layers.size());
  for (size_t i = 0; i < other.layers.size(); ++i) {
    if (layers[i].size() < other.layers[i].size()) layers[i].resize(other.layers[i].size());
    for (size_t l = 0; l < other.layers[i].size(); ++l) layers[i][l] += other.layers[i][l];
  }
}

}  // namespace kda
