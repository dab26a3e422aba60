#include "kernels/logits.h"

namespace kda {

void token_loss(Context& ctx, const TokenLoss& a) {
  KDA_CHECK(a.logits.shape.rank == 2 && a.logits.dim(1) > 0, "token_loss: logits must be [R,vocabulary], got ",
            a.logits.shape);
  KDA_CHECK(a.target.shape == Shape{a.logits.dim(0)} && a.target.dtype == Dtype::i32,
            "token_loss: target must be i32 [", a.logits.dim(0), "], got ", name_of(a.target.dtype), " ",
            a.target.shape);
  KDA_CHECK(a.loss.shape == a.target.shape && a.loss.dtype == Dtype::f32, "token_loss: loss must be f32 [",
            a.logits.dim(0), "], got ", name_of(a.loss.dtype), " ", a.loss.shape);
  body(ctx, ctx.backend->token_loss, "token_loss")(ctx, a);
}

}  // namespace kda
