// kernels/cuda/chain.cu — what joins the chain, and its launch.
#include <algorithm>
#include <vector>

#include "kernels/cuda/chain_kernel.cuh"

namespace kda::cuda {
namespace {

constexpr int kMinSlots = 4;
constexpr size_t kTicketBytes = 512, kAlign = 128;
static_assert(kMaxLinks * sizeof(unsigned) <= kTicketBytes);

struct Range {
  const void* at;
  size_t bytes;

  bool operator==(const Range&) const = default;
  bool overlaps(const Range& r) const {
    const auto a = reinterpret_cast<uintptr_t>(at), b = reinterpret_cast<uintptr_t>(r.at);
    return a < b + r.bytes && b < a + bytes;
  }
};

// What a link gives: where other launches look for it, and later links of this one.
struct Output {
  Range range;
  void **y, **passed;     // of the link; passed may be nullptr: it cannot be
  bool read = false;      // by a later link, all of it
  bool replaced = false;  // a later link writes there, or to a part of it: nobody reads it any more
};

// A link may begin anywhere once what it reads is there. That orders writes behind reads too: who reads all that was
// written so far comes after all that was read for it. What does not follow so begins a new launch.
struct Pending {
  Chain chain;
  std::vector<Output> outputs;
  std::vector<Range> reads;  // of what was there before
  size_t passed = 0;         // bytes, from kTicketBytes on
  int static_shared = 0;     // of the kernel

  Output* source(const Range& r) {
    for (auto o = outputs.rbegin(); o != outputs.rend(); ++o)
      if (!o->replaced && o->range.overlaps(r)) return &*o;
    return nullptr;
  }
  // Whether a link that reads `in`, and at last `adds` where that is not empty, and writes `out` may join.
  bool takes(std::span<const Range> in, std::span<const Range> out, const Range& adds) {
    if (chain.links == kMaxLinks) return false;
    size_t more = 0;
    const auto can_read = [&](const Range& r) {
      const Output* const from = source(r);
      if (!from) return true;
      if (from->range != r || !from->passed) return false;
      if (!*from->passed) more += r.bytes + kAlign;
      return true;
    };
    if (!std::all_of(in.begin(), in.end(), can_read) || (adds.bytes && !can_read(adds))) return false;
    const bool all_read = std::all_of(outputs.begin(), outputs.end(), [&](const Output& o) {
      return o.read || std::find(in.begin(), in.end(), o.range) != in.end();
    });
    if (adds.bytes && source(adds) && !all_read) return false;
    for (const Range& r : out) {
      const auto dead = [&](const Output& o) { return o.replaced || o.read || !o.range.overlaps(r); };
      const auto read_before = [&](const Range& from) { return from.overlaps(r); };
      if (!std::all_of(outputs.begin(), outputs.end(), dead)) return false;
      if (!all_read && std::any_of(reads.begin(), reads.end(), read_before)) return false;
    }
    return kTicketBytes + passed + more <= kChainMemory;
  }
  // Where the link at hand is to look for it, and whether it must wait there.
  const void* read(const Device& device, const Range& r, bool& awaited) {
    Output* const from = source(r);
    if ((awaited = from)) {
      if (!*from->passed) {
        *from->passed = static_cast<char*>(device.chain_memory) + kTicketBytes + passed;
        passed += (r.bytes + kAlign - 1) / kAlign * kAlign;
      }
      from->read = true;
      return *from->passed;
    }
    reads.push_back(r);
    return r.at;
  }
  void write(const Range& r, void** y, void** passed_to, bool read_already = false) {
    for (Output& o : outputs)
      if (!o.replaced && o.range.overlaps(r)) o.replaced = true, *o.y = nullptr;
    outputs.push_back({r, y, passed_to, read_already});
  }
};

using ChainKernel = void (*)(const Chain);
ChainKernel kernel_for(Weight eight) {
  switch (eight) {
    case Weight::f8: return chain_kernel<Weight::f8>;
    case Weight::i8: return chain_kernel<Weight::i8>;
    case Weight::bf16: break;
  }
  return chain_kernel<Weight::bf16>;
}

Pending& pending(Device& device) {
  if (!device.chain) {
    auto p = std::make_shared<Pending>();
    cudaFuncAttributes kernel{};
    for (Weight eight : {Weight::bf16, Weight::f8, Weight::i8}) {
      check(cudaFuncGetAttributes(&kernel, kernel_for(eight)), "chain of mat-vecs");
      p->static_shared = std::max(p->static_shared, int(kernel.sharedSizeBytes));
    }
    device.chain = std::move(p);
  }
  return *static_cast<Pending*>(device.chain.get());
}

int ring_bytes(Device& device) { return int(device.shared_bytes) - pending(device).static_shared; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the last link gives the step's f and g and nothing else, in the form that the step can find them itself.
bool gives_gates(const Chain& chain, const KdaDecodeArgs& a) {
  if (chain.links == 0 || chain.link[chain.links - 1].is_kda) return false;
  const ChainProduct& p = chain.link[chain.links - 1].product;
  const ChainSegment &f = p.segment[0], &g = p.segment[1];
  return p.segments == 2 && p.inputs == 2 && p.K == kGateWidth && p.R == a.N && p.finish == Finish::write &&
         f.y == a.f && g.y == a.g && !f.f32 && !g.f32 && f.weight == g.weight && f.rows == a.H * a.K &&
         g.rows == a.H * a.V;
}

void added(Context& ctx) {
  Device& device = device_of(ctx);
  device.chain_waits = true;
  if (!device.recording) launch_chain(ctx);
}

}  // namespace

void launch_chain(const Context& ctx) {
  Device& device = device_of(ctx);
  Pending& p = pending(device);
  Chain& chain = p.chain;
  device.chain_waits = false;
  const auto stream = static_cast<cudaStream_t>(ctx.stream);
  chain.slots = std::min(kMaxSlots, (ring_bytes(device) - chain.x_bytes) / kChainSlot);
  chain.tickets = static_cast<unsigned*>(device.chain_memory);
  const size_t bytes = size_t(chain.x_bytes) + size_t(chain.slots) * kChainSlot, marked = kTicketBytes + p.passed;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;  // blocks wait for each other
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(device.sms));
  config.blockDim = dim3(kChainThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  const ChainKernel kernel = kernel_for(chain.eight);
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (e == cudaSuccess) e = cudaMemsetAsync(device.chain_memory, int(kMark & 0xff), marked, stream);
  if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, chain);
  chain.links = chain.x_bytes = 0;
  chain.eight = Weight::bf16;
  p.outputs.clear(), p.reads.clear();
  p.passed = 0;
  check(e, "chain of mat-vecs");
}

bool chain_product(Context& ctx, std::span<const MatmulSegment> segments, ConstView x, const NormMatvec* norm,
                   Finish finish) {
  Device& device = device_of(ctx);
  const int64_t R = segments[0].y.dim(0), K = segments[0].w.w.dim(1);
  const bool own = segments[0].x.data && segments.size() > 1;
  if (device.arch < 90 || R < 1 || R > kChainRows || int64_t(segments.size()) > kChainSegments) return false;
  ChainProduct link{};
  link.R = int(R), link.K = int(K), link.inputs = own ? int(segments.size()) : 1, link.finish = finish;
  std::vector<Range> in, out;  // of what other ops write and read
  if (norm) {
    link.norm = norm->norm.as<float>(), link.eps = norm->eps, link.mean = 1.0f / float(K);
    in.push_back({norm->x.data, size_t(R * K * 4)});
    if (!aligned(link.norm)) return false;
  } else if (!own) {
    in.push_back({x.data, size_t(R * K * 2)});
  }
  if (K > 1 << 16) return false;
  int64_t groups = 0;
  Weight eight = Weight::bf16;
  for (size_t i = 0; i < segments.size(); ++i) {
    const MatmulSegment& s = segments[i];
    const Weight weight = weight_of(s.w.w.dtype);
    const bool wide = weight == Weight::bf16;
    if (!wide && link.eight && weight != eight) return false;
    if (!wide) eight = weight;
    (wide ? link.wide : link.eight) = true;
    if (s.w.w.dim(1) != K || !s.x.data == own || (K << wide) % kChainPiece || !aligned(s.w.w.data)) return false;
    if (own) in.push_back({s.x.data, size_t(R * K * 2)});
    // 8 rows to a group where a chunk holds them whole, else 4.
    const int64_t bytes = K << wide, rows = s.w.w.dim(0), group = 8 * bytes > kChainSlot ? 4 : 8;
    const int64_t chunk = kChainTurns * kChainWarps * kChainPiece * kChainColumns / group;
    link.x_width = std::max(link.x_width, int(ceil_div(bytes, chunk) * chunk >> wide));
    if (rows > 1 << 30) return false;
    link.segment[i] = {.w = static_cast<const uint8_t*>(s.w.w.data),
                       .scale = s.w.scale.data ? s.w.scale.as<float>() : nullptr,
                       .y = s.y.data,
                       .rows = int(rows),
                       .first = int(groups),
                       .chunk = uint16_t(std::min(chunk, bytes)),
                       .group = uint8_t(group),
                       .input = uint8_t(i),
                       .f32 = s.y.dtype == Dtype::f32,
                       .weight = weight};
    out.push_back({s.y.data, size_t(R * rows) * size_of(s.y.dtype)});
    groups += ceil_div(rows, group);
    if (groups > 1 << 30) return false;
  }
  if (groups == 0) return true;
  link.x_stride = link.x_width * 2 + 64;  // rows in different banks
  const int64_t x_rows = link.inputs * R * link.x_stride;
  link.half_at = link.wide && link.eight ? int(x_rows) : 0;
  const int64_t x_bytes = link.half_at + x_rows + (norm ? (R + 1) * K * 4 : 0);
  if (x_bytes > ring_bytes(device) - kMinSlots * kChainSlot) return false;
  link.segments = int(segments.size());
  if (!std::all_of(in.begin(), in.end(), [](const Range& r) { return aligned(r.at); })) return false;
  Pending& p = pending(device);
  const Range adds = finish == Finish::add ? out[0] : Range{};
  const bool other = link.eight && p.chain.eight != Weight::bf16 && p.chain.eight != eight;
  if (other || !p.takes(in, out, adds)) launch_chain(ctx);
  if (p.chain.links > 0 && p.chain.link[p.chain.links - 1].is_kda) {
    const KdaDecodeArgs& step = p.chain.link[p.chain.links - 1].kda.step;
    if (step.N * step.H <= device.sms / 2) link.skipped = int(step.N * step.H);
  }
  link.groups = int(groups), link.fixed = int(groups * 5 / 8 / (device.sms - link.skipped));
  const auto read = [&](const Range& r, size_t i) {
    bool awaited = false;
    const void* const from = p.read(device, r, awaited);
    link.awaited = uint8_t(link.awaited | awaited << i);
    return from;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    const void* const from = read(in[i], i);
    if (norm)
      link.residual = static_cast<const float*>(from);
    else
      (own ? link.segment[i].x : link.x) = static_cast<const __nv_bfloat16*>(from);
  }
  bool there = false;  // by the time that x is
  if (adds.bytes) link.before = static_cast<const float*>(p.read(device, adds, there));
  ChainLink& last = p.chain.link[p.chain.links++] = ChainLink(link);
  for (size_t i = 0; i < out.size(); ++i) p.write(out[i], &last.product.segment[i].y, &last.product.segment[i].passed);
  if (link.eight) p.chain.eight = eight;
  p.chain.x_bytes = std::max(p.chain.x_bytes, int(ceil_div(x_bytes, 128) * 128));
  added(ctx);
  return true;
}

bool chain_kda_decode(Context& ctx, const KdaDecodeArgs& a) {
  Device& device = device_of(ctx);
  if (!device.chain_waits || a.N < 1 || a.N > kChainRows || a.K != kGateWidth || a.V != kGateWidth) return false;
  Pending& p = pending(device);
  Chain& chain = p.chain;
  const bool gates = gives_gates(chain, a);
  const auto vectors = size_t(a.N * a.H) * kGateWidth * 2;
  std::vector<Range> in{{a.q, vectors}, {a.k, vectors}, {a.v, vectors}};
  if (!gates) in.insert(in.end(), {{a.f, vectors}, {a.g, vectors}});
  in.push_back({a.b, size_t(a.N * a.H) * 2});
  const Range y{a.y, vectors};
  // States and windows are read ahead and written at the end: one step of each in a launch.
  const bool again = std::any_of(chain.link, chain.link + chain.links, [&](const ChainLink& l) {
    return l.is_kda && (l.kda.step.state == a.state || l.kda.step.window == a.window);
  });
  const bool follows = !chain.link[chain.links - 1].is_kda;
  if (again || !follows || !p.takes(in, {&y, 1}, {})) {
    launch_chain(ctx);
    return false;
  }
  ChainKda kda{.step = a};
  if (gates) {
    const ChainProduct& l = chain.link[--chain.links].product;
    const ChainSegment &f = l.segment[0], &g = l.segment[1];
    kda.f_w = f.w, kda.g_w = g.w, kda.f_scale = f.scale, kda.g_scale = g.scale, kda.f_in = f.x, kda.g_in = g.x;
    kda.weight = f.weight, kda.awaited = uint8_t(l.awaited << 3);
    p.outputs.resize(p.outputs.size() - 2);
  }
  ChainLink& last = chain.link[chain.links++] = ChainLink(kda);
  const auto read = [&](const __nv_bfloat16*& from, size_t bytes, int bit) {
    bool awaited = false;
    from = static_cast<const __nv_bfloat16*>(p.read(device, {from, bytes}, awaited));
    last.kda.awaited = uint8_t(last.kda.awaited | awaited << bit);
  };
  KdaDecodeArgs& step = last.kda.step;
  read(step.q, vectors, 0), read(step.k, vectors, 1), read(step.v, vectors, 2);
  if (!gates) read(step.f, vectors, 3), read(step.g, vectors, 4);
  read(step.b, size_t(a.N * a.H) * 2, 5);
  const auto slot = [](__nv_bfloat16*& to) { return reinterpret_cast<void**>(&to); };
  p.write(y, slot(step.y), slot(last.kda.passed));
  if (gates) {
    last.kda.f_out = const_cast<__nv_bfloat16*>(a.f), last.kda.g_out = const_cast<__nv_bfloat16*>(a.g);
    p.write({a.f, vectors}, slot(last.kda.f_out), nullptr, true);
    p.write({a.g, vectors}, slot(last.kda.g_out), nullptr, true);
  }
  added(ctx);
  return true;
}

}  // namespace kda::cuda
