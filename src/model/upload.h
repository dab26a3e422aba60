// model/upload.h — a model's weights in the memory of a backend.
#pragma once
#include <functional>
#include <string>

#include "model/weights.h"

namespace kda {

// bf16: every matrix; i8, f8: those that quantizable() lists, with one f32 scale a row, the others bf16.
enum class WeightFormat { bf16, i8, f8 };

// Takes weights in host memory (mapped files) and returns them in that of the context's backend: matrices as `format` says
// (f32 and f16 are rounded to bf16 first), vectors f32. Needs room for the result and one matrix more.
// report: lines about what was rounded. Throws Error naming the tensor, what it needs and what is free.
Weights upload_weights(Context&, Weights, WeightFormat, const std::function<void(const std::string&)>& report = {});

}  // namespace kda
