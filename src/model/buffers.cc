#include "model/buffers.h"

#include <algorithm>

#include "kernels/attention.h"
#include "kernels/kda.h"
#include "kernels/kda_decode.h"
#include "kernels/matmul.h"

namespace kda {

namespace {
constexpr int64_t kAlign = 256;
}

int64_t Arena::bytes(Dtype t, Shape s) { return (s.size() * int64_t(size_of(t)) + kAlign - 1) / kAlign * kAlign; }

View Arena::take(Dtype t, Shape s) {
  const int64_t n = bytes(t, s);
  KDA_CHECK(used_ + n <= int64_t(memory_.v.bytes()), "activations: ", used_ + n, " bytes wanted, ", memory_.v.bytes(),
            " planned");
  std::byte* p = static_cast<std::byte*>(memory_.v.data) + used_;
  used_ += n;
  return {p, t, s};
}

int64_t Buffers::bytes() const {
  int64_t n = arena_bytes;
  for (const Tensor* t : {&x, &workspace, &ids, &position, &start, &slot_in, &slot_out, &past, &picked})
    if (*t) n += int64_t(t->v.bytes());
  return n;
}

Buffers plan_buffers(Context& ctx, const Weights& w, int64_t rows, int64_t sequences, int64_t capacity) {
  const int64_t D = w.config.width, R = rows;
  const Dtype act = ctx.backend->activation;
  const auto bytes = [&](int64_t width) { return Arena::bytes(act, {R, width}); };
  int64_t arena = 0;
  size_t scratch = 0;
  const auto product = [&](const Linear& m) {
    if (!m.w) return;
    scratch = std::max({scratch, matmul_workspace_bytes(ctx, R, m.K(), m.N()),
                        matvec_workspace_bytes(ctx, sequences, m.K(), m.N())});
  };
  product(w.head);
  for (const LayerWeights& l : w.layers) {
    const LayerSpec& s = l.spec;
    const int64_t h = bytes(D);
    int64_t mixer = h;
    if (s.mixer == Mixer::full) {
      mixer += 2 * bytes(s.heads * s.head_dim) + 2 * bytes(s.kv_heads * s.head_dim);
      for (const Linear* m : {&l.full.q, &l.full.k, &l.full.v, &l.full.o}) product(*m);
      scratch = std::max(scratch, attention_workspace_bytes(ctx, R, s.heads, s.head_dim, capacity));
    } else {
      const int64_t HK = s.kda_heads * s.K, HV = s.kda_heads * s.V;
      mixer += 5 * bytes(HK) + 4 * bytes(HV) + bytes(l.kda.f0.N()) + bytes(l.kda.g0.N()) + bytes(s.kda_heads);
      const KdaWeights& k = l.kda;
      for (const Linear* m : {&k.q, &k.k, &k.v, &k.f0, &k.f1, &k.b, &k.g0, &k.g1, &k.o}) product(*m);
      scratch = std::max({scratch, kda_prefill_workspace_bytes(ctx, R, sequences, s.kda_heads, s.K, s.V),
                          kda_decode_workspace_bytes(ctx, sequences, s.kda_heads, s.K, s.V)});
    }
    const int64_t mlp = h + (w.config.activation == Activation::swiglu ? 2 : 1) * bytes(s.mlp_width);
    for (const Linear* m : {&l.mlp.gate, &l.mlp.up, &l.mlp.down}) product(*m);
    arena = std::max({arena, mixer, mlp});
  }
  arena = std::max(arena, Arena::bytes(Dtype::f32, {sequences, D}) + Arena::bytes(act, {sequences, D}));  // for logits
  const auto alloc = ctx.backend->alloc;
  Buffers b;
  b.rows = rows;
  b.sequences = sequences;
  b.activation = act;
  b.capacity = capacity;
  b.x = alloc(Dtype::f32, {R, D});
  b.ids = alloc(Dtype::i32, {R});
  b.position = alloc(Dtype::i32, {R});
  b.start = alloc(Dtype::i32, {sequences + 1});
  b.slot_in = alloc(Dtype::i32, {sequences});
  b.slot_out = alloc(Dtype::i32, {sequences});
  b.past = alloc(Dtype::i32, {sequences});
  b.picked = alloc(Dtype::i32, {sequences});
  b.arena = Arena(alloc(Dtype::u8, {arena}));
  b.arena_bytes = arena;
  b.workspace = alloc(Dtype::u8, {int64_t(scratch)});
  return b;
}

}  // namespace kda
