#include "kernels/conv.h"

#include "kernels/kda_check.h"

namespace kda {

void conv_silu(Context& ctx, const Conv& a) {
  constexpr const char* op = "conv_silu";
  KDA_CHECK(a.x.shape.rank == 2, op, ": x must be [T,C], got ", a.x.shape);
  KDA_CHECK(a.window.shape.rank == 3 && a.window.dim(1) == kConvTaps - 1, op, ": window must be [slots,", kConvTaps - 1,
            ",channels], got ", a.window.shape);
  const int64_t T = a.x.dim(0), C = a.x.dim(1), channels = a.window.dim(2);
  door::check_act(ctx, op, "x", a.x, {T, C});
  door::check(op, "w", a.w, {C, kConvTaps});
  door::check_act(ctx, op, "y", a.y, {T, C});
  door::check_act(ctx, op, "window", a.window, a.window.shape);
  KDA_CHECK(a.channel >= 0 && a.channel + C <= channels, op, ": channels ", a.channel, "..", a.channel + C,
            " of a window of ", channels);
  KDA_CHECK(!door::overlap(a.x, a.y), op, ": y may not be x's memory");
  door::check_packing(op, a.packing, T);
  door::check_slots(op, ctx, a.slots, a.packing.N(), a.window.dim(0));
  door::check_marks(op, a.marks, a.packing, a.window.dim(0));
  body(ctx, ctx.backend->conv_silu, op)(ctx, a);
}

}  // namespace kda
