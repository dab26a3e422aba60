#include "kernels/attention.h"

namespace kda {

void attention(Context& ctx, const Attention& a) {
  KDA_CHECK(a.q.shape.rank == 3, "attention: q must be [T,H,d], got ", a.q.shape);
  const int64_t T = a.q.dim(0), H = a.q.dim(1), d = a.q.dim(2);
  KDA_CHECK(a.k.shape.rank == 3 && a.k.dim(0) == T && a.k.dim(2) == d, "attention: k must be [", T, ",G,", d, "], got ",
            a.k.shape);
  const int64_t G = a.k.dim(1);
  KDA_CHECK(G > 0 && H % G == 0, "attention: the ", G, " key heads must divide the ", H, " query heads");
  KDA_CHECK(a.v.shape == a.k.shape, "attention: v must be ", a.k.shape, " as k is, got ", a.v.shape);
  KDA_CHECK(a.o.shape == a.q.shape, "attention: o must be ", a.q.shape, " as q is, got ", a.o.shape);
  KDA_CHECK(a.k_cache.shape.rank == 4 && a.k_cache.dim(2) == G && a.k_cache.dim(3) == d,
            "attention: k_cache must be [slots,capacity,", G, ",", d, "], got ", a.k_cache.shape);
  KDA_CHECK(a.v_cache.shape == a.k_cache.shape, "attention: v_cache must be ", a.k_cache.shape, " as k_cache is, got ",
            a.v_cache.shape);
  for (const ConstView& x : {a.k, a.v, ConstView(a.o), ConstView(a.k_cache), ConstView(a.v_cache)})
    KDA_CHECK(x.dtype == a.q.dtype, "attention: all must be ", name_of(a.q.dtype), " as q is, got ", name_of(x.dtype),
              " ", x.shape);
  KDA_CHECK(a.q.dtype == ctx.backend->activation, "attention: q must be ", name_of(ctx.backend->activation), ", got ",
            name_of(a.q.dtype));
  const auto& start = a.packing.host_start;
  KDA_CHECK(!start.empty() && start.front() == 0 && start.back() == T, "attention: the packing must run from 0 to the ",
            T, " tokens of q");
  for (size_t n = 1; n < start.size(); ++n)
    KDA_CHECK(start[n] >= start[n - 1], "attention: sequence ", n - 1, " of the packing ends before it starts");
  KDA_CHECK(a.packing.longest() <= a.k_cache.dim(1), "attention: ", a.packing.longest(),
            " new tokens of one sequence, the cache holds ", a.k_cache.dim(1));
  KDA_CHECK(a.packing.N() == 0 || (a.slot && a.past), "attention: slot and past must be given");
  body(ctx, ctx.backend->attention, "attention")(ctx, a);
}

size_t attention_workspace_bytes(const Context& ctx, int64_t T, int64_t H, int64_t d, int64_t capacity) {
  return ctx.backend->attention_workspace(ctx, T, H, d, capacity);
}

}  // namespace kda
