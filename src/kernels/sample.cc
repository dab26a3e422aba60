#include "kernels/sample.h"

namespace kda {

void sample(Context& ctx, const Sample& a) {
  KDA_CHECK(a.logits.shape.rank == 2 && a.logits.dtype == Dtype::f32 && a.logits.dim(1) > 0,
            "sample: logits must be f32 [R,vocabulary], got ", name_of(a.logits.dtype), " ", a.logits.shape);
  KDA_CHECK(a.logits.dim(0) == 0 || (a.rows && a.ids), "sample: rows and ids must be given");
  body(ctx, ctx.backend->sample, "sample")(ctx, a);
}

size_t sample_workspace_bytes(const Context& ctx, int64_t R, int64_t vocabulary) {
  return ctx.backend->sample_workspace ? ctx.backend->sample_workspace(ctx, R, vocabulary) : 0;
}

}  // namespace kda
