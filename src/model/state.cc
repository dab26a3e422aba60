#include "model/state.h"

#include <algorithm>

#include "base/error.h"

namespace kda {

StatePool::StatePool(Context& ctx, const ModelConfig& config, int64_t slots) {
  for (const LayerSpec& s : config.layers)
    sizes_.push_back({s.mixer, s.kda_heads, s.K, s.V, s.kv_heads, s.head_dim});
  layers_.resize(sizes_.size());
  reserve(ctx, slots, 0);
}

View StatePool::slot(const Tensor& pool, int32_t slot) {
  const Shape& s = pool.shape();
  KDA_CHECK(slot >= 0 && slot < s[0], "state slot ", slot, " of ", s[0]);
  Shape one;
  one.rank = s.rank - 1;
  for (int i = 1; i < s.rank; ++i) one.dim[size_t(i - 1)] = s[i];
  const size_t bytes = size_t(one.size()) * size_of(pool.dtype());
  return {static_cast<std::byte*>(pool.v.data) + size_t(slot) * bytes, pool.dtype(), one};
}

void StatePool::reserve(Context& ctx, int64_t slots, int64_t tokens) {
  KDA_CHECK(!divided_, "state pool: reserve() after divide()");
  const int64_t more_slots = std::max(slots, slots_);
  // Keys and values grow by half at least, so that a long generation moves each token a few times only.
  const int64_t more_tokens = tokens <= capacity_ ? capacity_ : std::max({tokens, capacity_ + capacity_ / 2, int64_t(64)});
  if (more_slots == slots_ && more_tokens == capacity_) return;
  const Dtype act = ctx.backend->activation;
  const auto grow = [&](Tensor& pool, Dtype dtype, Shape shape) {
    Tensor larger = ctx.backend->alloc(dtype, shape);
    for (int32_t s = 0; pool && s < slots_; ++s) {
      const View from = slot(pool, s);
      ctx.backend->copy(ctx, slot(larger, s).data, from.data, from.bytes());
    }
    pool = std::move(larger);
  };
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Sizes& z = sizes_[l];
    if (z.mixer == Mixer::full) {
      grow(layers_[l].k, act, {more_slots, more_tokens, z.G, z.d});
      grow(layers_[l].v, act, {more_slots, more_tokens, z.G, z.d});
    } else if (more_slots > slots_) {
      grow(layers_[l].S, Dtype::f32, {more_slots, z.H, z.V, z.K});
      grow(layers_[l].window, act, {more_slots, 3, 2 * z.H * z.K + z.H * z.V});
    }
  }
  slots_ = more_slots;
  capacity_ = more_tokens;
  room_ = slots_ * capacity_;
}

void StatePool::divide(int64_t slots, int64_t tokens) {
  KDA_CHECK(slots >= 1 && slots <= slots_ && slots * tokens <= room_, "state pool: ", room_, " tokens in at most ",
            slots_, " slots divided into ", slots, " times ", tokens);
  for (LayerState& s : layers_)
    for (Tensor* pool : {&s.k, &s.v})
      if (*pool) pool->v.shape = {slots, tokens, pool->v.dim(2), pool->v.dim(3)};
  capacity_ = tokens;
  divided_ = true;
}

void StatePool::copy(Context& ctx, int32_t from, int32_t to, int64_t tokens) {
  if (from == to) return;
  for (const LayerState& s : layers_) {
    for (const Tensor* pool : {&s.S, &s.window})
      if (*pool) {
        const View a = slot(*pool, from);
        ctx.backend->copy(ctx, slot(*pool, to).data, a.data, a.bytes());
      }
    for (const Tensor* pool : {&s.k, &s.v})
      if (*pool) {
        KDA_CHECK(tokens <= capacity_, "state copy of ", tokens, " tokens from a pool of ", capacity_);
        const View a = slot(*pool, from);
        const size_t used = size_t(tokens * a.dim(1) * a.dim(2)) * size_of(a.dtype);
        ctx.backend->copy(ctx, slot(*pool, to).data, a.data, used);
      }
  }
}

int64_t StatePool::bytes() const {
  int64_t n = 0;
  for (const LayerState& s : layers_)
    for (const Tensor* t : {&s.S, &s.window, &s.k, &s.v})
      if (*t) n += int64_t(t->v.bytes());
  return n;
}

}  // namespace kda
