#include "model/upload.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "base/file.h"
#include "kernels/quantize.h"

namespace kda {

namespace {

constexpr int64_t kPiece = int64_t(1) << 20;  // elements that one task converts
constexpr int64_t kAlign = 256;
constexpr int64_t kGroup = int64_t(256) << 20;  // elements of matrices that are sent together before they are quantised

bool is_matrix(const std::string& name, const Tensor& t) {
  return name.ends_with("weight") && t.shape().rank == 2 && name.find("conv1d") == std::string::npos;
}

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

HostBytes bytes_of(const Tensor& t) {
  HostBytes b{t.v.data, t.v.bytes()};
  if (const MappedFile* f = MappedFile::behind(t.storage)) {
    b.file = f->descriptor();
    b.offset = static_cast<const std::byte*>(t.v.data) - f->data();
  }
  return b;
}

int64_t padded(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// One allocation for all of a model's tensors: hundreds of small ones would each wait for the device.
class Block {
 public:
  void plan(Dtype d, const Shape& s) { bytes_ += padded(s.size() * int64_t(size_of(d))); }
  void make(Context& ctx) { memory_ = ctx.backend->alloc(Dtype::u8, {bytes_}); }
  Tensor take(Dtype d, const Shape& s) {
    Tensor t{memory_.storage, {static_cast<std::byte*>(memory_.v.data) + used_, d, s}};
    used_ += padded(int64_t(t.v.bytes()));
    KDA_CHECK(used_ <= bytes_, "upload: ", used_, " bytes of weights, planned ", bytes_);
    return t;
  }

 private:
  Tensor memory_;
  int64_t bytes_ = 0, used_ = 0;
};

}  // namespace

Weights upload_weights(Context& ctx, Weights w, WeightFormat format,
                       const std::function<void(const std::string&)>& report) {
  // What goes over, in the order of the table; those that are quantised are known by their memory.
  struct Item {
    std::string name;
    Tensor* to;
    bool matrix;
    Tensor* scale;  // where it is quantised
  };
  std::vector<Item> items;
  std::map<const Tensor*, Tensor*> scales;
  if (format != WeightFormat::bf16) {
    // A tied head gets 8 bits of its own; the embedding stays as it is.
    for (const NamedLinear& m : quantizable(w)) scales[&m.linear->w] = &m.linear->scale;
  }
  const auto add = [&](const std::string& name, Tensor& t) {
    const auto s = scales.find(&t);
    if (t) items.push_back({name, &t, is_matrix(name, t), s == scales.end() ? nullptr : s->second});
  };
  each_parameter(w, add);
  if (w.config.tied_head && format != WeightFormat::bf16) add("lm_head.weight", w.head.w);

  const Dtype small = format == WeightFormat::f8 ? Dtype::f8_e4m3 : Dtype::i8;
  const auto kept_as = [&](const Item& i) { return !i.matrix ? Dtype::f32 : i.scale ? small : Dtype::bf16; };
  Block block;
  int64_t largest = 0, all = 0;  // elements of what is quantised
  for (const Item& i : items) {
    KDA_CHECK(i.matrix || i.to->dtype() == Dtype::f32, "upload: `", i.name, "` must be f32, got ",
              name_of(i.to->dtype()));
    block.plan(kept_as(i), i.to->shape());
    if (!i.scale) continue;
    block.plan(Dtype::f32, {i.to->shape()[0]});
    const int64_t size = padded(i.to->shape().size());
    largest = std::max(largest, size), all += size;
  }
  block.make(ctx);
  Tensor wide;  // matrices before they are quantised
  if (largest) wide = ctx.backend->alloc(Dtype::bf16, {std::max(largest, std::min(all, kGroup))});

  int64_t rounded = 0;
  std::string stored;
  std::vector<Transfer> waiting;
  std::vector<Tensor> sources;  // of what waits
  const auto send = [&] {
    ctx.backend->upload(ctx, waiting);
    waiting.clear();
    sources.clear();
  };
  std::vector<QuantizeRows> group;  // what is on its way to `wide`
  int64_t used = 0;                 // elements of `wide`
  const auto send_group = [&] {
    send();
    for (const QuantizeRows& q : group) quantize_rows(ctx, q);
    group.clear();
    used = 0;
  };
  for (const Item& i : items) {
    if (i.matrix && i.to->dtype() != Dtype::bf16) {
      ++rounded;
      stored = name_of(i.to->dtype());
    }
    const Tensor host = i.matrix ? as_bf16(*ctx.pool, *i.to) : *i.to;
    Tensor there = block.take(kept_as(i), host.shape());
    void* to = there.v.data;
    if (i.scale) {
      const int64_t size = padded(host.shape().size());
      if (used + size > wide.v.size()) send_group();
      to = wide.v.as<bf16>() + used;
      used += size;
      *i.scale = block.take(Dtype::f32, {host.shape()[0]});
      group.push_back({.w = View{to, Dtype::bf16, host.shape()}, .q = there, .scale = *i.scale});
    }
    waiting.push_back({to, bytes_of(host)});
    sources.push_back(host);
    if (host.storage != i.to->storage) send_group();  // a rounded copy: not all of them at once
    *i.to = std::move(there);
  }
  send_group();
  if (w.config.tied_head && format == WeightFormat::bf16) w.head.w = w.embedding;
  for (const Item& i : items) {
    if (!i.scale) continue;
    std::vector<float> scale(size_t(i.scale->shape()[0]));
    ctx.backend->copy(ctx, scale.data(), i.scale->v.data, i.scale->v.bytes());
    for (size_t n = 0; n < scale.size(); ++n)
      KDA_CHECK(scale[n] - scale[n] == 0, i.name, ": row ", n, " holds a value that is not finite");
  }
  if (rounded && report) report(cat(rounded, " matrices stored as ", stored, " are rounded to bf16 for this device"));
  return w;
}

}  // namespace kda
