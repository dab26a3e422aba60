#include "model/upload.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/quantize.h"

namespace kda {

namespace {

constexpr int64_t kPiece = int64_t(1) << 20;  // elements that one task converts

// A host matrix in bf16: itself, or a rounded copy.
Tensor as_bf16(ThreadPool& pool, const Tensor& t) {
  if (t.dtype() == Dtype::bf16) return t;
  Tensor out = host_tensor(Dtype::bf16, t.shape());
  const int64_t n = t.shape().size();
  const auto convert = [&](const auto* from) {
    bf16* to = out.v.as<bf16>();
    pool.run((n + kPiece - 1) / kPiece, [&](int64_t task, int) {
      for (int64_t i = task * kPiece; i < std::min(n, (task + 1) * kPiece); ++i) to[i] = bf16(float(from[i]));
    });
  };
  t.dtype() == Dtype::f32 ? convert(t.v.as<float>()) : convert(t.v.as<f16>());
  return out;
}

}  // namespace

Weights upload_weights(Context& ctx, Weights w, WeightFormat format,
                       const std::function<void(const std::string&)>& report) {
  int64_t rounded = 0;
  std::string which;
  const auto send = [&](const std::string& name, const Tensor& host) {
    try {
      Tensor there = ctx.backend->alloc(host.dtype(), host.shape());
      ctx.backend->upload(ctx, there.v.data, host.v.data, host.v.bytes());
      return there;
    } catch (const Error& e) {
      throw Error(cat("loading `", name, "`, ", host.v.bytes(), " bytes: ", e.what()));
    }
  };
  // Large matrices first: they are quantised from a bf16 copy over there, which is freed at once.
  if (format != WeightFormat::bf16) {
    const Dtype to = format == WeightFormat::i8 ? Dtype::i8 : Dtype::f8_e4m3;
    for (const NamedLinear& m : quantizable(w)) {
      const Tensor wide = send(m.name, as_bf16(*ctx.pool, m.linear->w));
      Tensor q = ctx.backend->alloc(to, wide.shape()), scale = ctx.backend->alloc(Dtype::f32, {wide.shape()[0]});
      quantize_rows(ctx, {.w = wide, .q = q, .scale = scale});
      std::vector<float> scales(size_t(wide.shape()[0]));  // the copy also waits for the quantisation
      ctx.backend->copy(ctx, scales.data(), scale.v.data, scale.v.bytes());
      for (size_t n = 0; n < scales.size(); ++n)
        KDA_CHECK(scales[n] - scales[n] == 0, m.name, ": row ", n, " holds a value that is not finite");
      m.linear->w = q;
      m.linear->scale = scale;
    }
  }
  each_parameter(w, [&](const std::string& name, Tensor& t) {
    if (!t || t.dtype() == Dtype::i8 || t.dtype() == Dtype::f8_e4m3) return;
    const bool matrix = name.ends_with("weight") && t.shape().rank == 2 && name.find("conv1d") == std::string::npos;
    if (matrix && t.dtype() != Dtype::bf16) {
      ++rounded;
      which = name_of(t.dtype());
    }
    t = send(name, matrix ? as_bf16(*ctx.pool, t) : t);
  });
  if (w.config.tied_head && format == WeightFormat::bf16) w.head.w = w.embedding;
  if (rounded && report) report(cat(rounded, " matrices stored as ", which, " are rounded to bf16 for this device"));
  return w;
}

}  // namespace kda
