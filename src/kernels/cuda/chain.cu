// kernels/cuda/chain.cu — what joins the chain, and its launch.
#include <algorithm>

#include "kernels/cuda/chain_kernel.cuh"

namespace kda::cuda {
namespace {

constexpr int kMinSlots = 4;
constexpr int kStaticShared = 21 << 10;  // more than chain_kernel and the KDA step in it declare

int ring_bytes(const Device& device) { return int(device.shared_bytes) - kStaticShared; }

Chain& pending(Device& device) {
  if (!device.chain) device.chain = std::make_shared<Chain>();
  return *static_cast<Chain*>(device.chain.get());
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the last link gives the step's f and g and nothing else, in the form that the step can find them itself.
bool take_gates(const Chain& chain, ChainKda& kda) {
  const KdaDecodeArgs& a = kda.step;
  if (chain.links == 0 || chain.link[chain.links - 1].is_kda) return false;
  const ChainProduct& p = chain.link[chain.links - 1].product;
  const ChainSegment &f = p.segment[0], &g = p.segment[1];
  if (p.segments != 2 || p.inputs != 2 || p.K != kGateWidth || p.R != a.N || p.finish != Finish::write || f.y != a.f ||
      g.y != a.g || f.f32 || g.f32 || f.weight != g.weight || f.rows != a.H * a.K || g.rows != a.H * a.V)
    return false;
  kda.f_w = f.w, kda.g_w = g.w, kda.f_scale = f.scale, kda.g_scale = g.scale, kda.f_in = f.x, kda.g_in = g.x;
  kda.weight = f.weight;
  return true;
}

void added(Context& ctx) {
  Device& device = device_of(ctx);
  device.chain_waits = true;
  if (!device.recording) launch_chain(ctx);
}

}  // namespace

void launch_chain(const Context& ctx) {
  Device& device = device_of(ctx);
  Chain& chain = pending(device);
  device.chain_waits = false;
  chain.slots = std::min(kMaxSlots, (ring_bytes(device) - chain.x_bytes) / kChainSlot);
  chain.arrived = device.tickets + kTickets - 1;
  const size_t bytes = size_t(chain.x_bytes) + size_t(chain.slots) * kChainSlot;
  allow_shared(chain_kernel, bytes);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(device.sms));
  config.blockDim = dim3(kChainThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(ctx.stream);
  config.attrs = &together;
  config.numAttrs = 1;
  const cudaError_t e = cudaLaunchKernelEx(&config, chain_kernel, chain);
  chain.links = chain.x_bytes = 0;
  check(e, "chain of mat-vecs");
}

bool chain_product(Context& ctx, std::span<const MatmulSegment> segments, ConstView x, const NormMatvec* norm,
                   Finish finish) {
  Device& device = device_of(ctx);
  const int64_t R = segments[0].y.dim(0), K = segments[0].w.w.dim(1);
  const bool own = segments[0].x.data && segments.size() > 1;
  if (device.arch < 90 || R < 1 || R > kChainRows || int64_t(segments.size()) > kMaxSegments) return false;
  ChainProduct link{};
  link.R = int(R), link.K = int(K), link.inputs = own ? int(segments.size()) : 1, link.finish = finish;
  if (norm) {
    link.residual = norm->x.as<float>(), link.norm = norm->norm.as<float>(), link.eps = norm->eps;
    if (!aligned(link.residual) || !aligned(link.norm)) return false;
  } else if (!own) {
    link.x = bf16_of(segments[0].x.data ? segments[0].x : x);
    if (!aligned(link.x)) return false;
  }
  if (K > 1 << 16) return false;
  link.x_stride = chain_stride(int(K * 2));
  int64_t rows = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const MatmulSegment& s = segments[i];
    const Dtype type = s.w.w.dtype;
    const bool wide = type == Dtype::bf16;
    (wide ? link.wide : link.eight) = true;
    if (s.w.w.dim(1) != K || !s.x.data == own || (K << wide) % kChainPiece || !aligned(s.w.w.data) ||
        !aligned(s.x.data))
      return false;
    link.segment[i] = {.w = static_cast<const uint8_t*>(s.w.w.data),
                       .scale = s.w.scale.data ? s.w.scale.as<float>() : nullptr,
                       .y = s.y.data,
                       .x = own ? bf16_of(s.x) : nullptr,
                       .first = int(rows),
                       .rows = int(s.w.w.dim(0)),
                       .weight = wide                     ? Weight::bf16
                                 : type == Dtype::f8_e4m3 ? Weight::f8
                                                          : Weight::i8,
                       .input = uint16_t(i),
                       .f32 = s.y.dtype == Dtype::f32};
    rows += s.w.w.dim(0);
    if (rows > (1 << 30)) return false;
  }
  if (rows == 0) return true;
  const int64_t x_rows = link.inputs * R * link.x_stride;
  link.half_at = link.wide && link.eight ? int(x_rows) : 0;
  const int64_t x_bytes = link.half_at + x_rows + (norm ? (R + 1) * K * 4 : 0);
  if (x_bytes > ring_bytes(device) - kMinSlots * kChainSlot) return false;
  link.rows_each = int(rows) / device.sms, link.rows_more = int(rows) % device.sms;
  link.segments = int(segments.size());
  Chain* chain = &pending(device);
  if (chain->links == kMaxLinks) launch_chain(ctx);
  chain->link[chain->links++] = ChainLink(link);
  chain->x_bytes = std::max(chain->x_bytes, int(ceil_div(x_bytes, 128) * 128));
  added(ctx);
  return true;
}

bool chain_kda_decode(Context& ctx, const KdaDecodeArgs& a) {
  Device& device = device_of(ctx);
  if (!device.chain_waits || a.N < 1 || a.N > kChainRows || a.K != 128 || a.V != 128) return false;
  Chain* chain = &pending(device);
  if (chain->link[chain->links - 1].is_kda) return false;
  // States are read before the links before have ended: one step of a state to a chain. And not first in one.
  const bool again = std::any_of(chain->link, chain->link + chain->links, [&](const ChainLink& l) {
    return l.is_kda && (l.kda.step.state == a.state || l.kda.step.window == a.window);
  });
  if (again || chain->links == kMaxLinks) launch_chain(ctx);
  ChainKda kda{.step = a};
  if (take_gates(*chain, kda)) --chain->links;
  chain->link[chain->links++] = ChainLink(kda);
  added(ctx);
  return true;
}

}  // namespace kda::cuda
