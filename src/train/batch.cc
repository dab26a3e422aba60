#include "train/batch.h"

#include <algorithm>

namespace kda {

int64_t TrainBatch::counted() const {
  return std::count_if(labels.begin(), labels.end(), [](int32_t label) { return label >= 0; });
}

}  // namespace kda
