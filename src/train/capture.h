// train/capture.h — a teacher run over a data set, its likeliest next tokens kept: what `kda capture` does.
#pragma once
#include <functional>

#include "model/weights.h"
#include "train/stored_teacher.h"

namespace kda {

struct CaptureSizes {
  int64_t sequence_length = 0;  // rows are cut into pieces of at most so many tokens, each from an empty state
  int64_t max_tokens = 0;       // 0: all
  int64_t batch_tokens = 4096;  // run at once, or one piece where that is longer
};

// Tokens that will be captured; pieces of a single token, which predict nothing, are left out.
int64_t capture_tokens(const Rows&, const CaptureSizes&);

// Runs the teacher over the pieces that `writer` does not have yet. What is written does not depend on where an earlier
// capture was interrupted. progress(tokens): so many are in the folder. The codec is the header's.
void capture(Context&, const Weights& teacher, const Rows&, const CaptureSizes&, const LogprobCodec&, CaptureWriter&,
             const std::function<void(int64_t)>& progress = {});

}  // namespace kda
