#include "kernels/cuda/kda_prefill.h"

#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kda_prefill.cuh"
#include "kernels/cuda/ops.h"

namespace kda::cuda {
namespace {

constexpr int64_t kPassBytes = int64_t(768) << 20;  // of records; 35,000 tokens at H = 20, K = V = 128
constexpr int64_t kFarBytes = int64_t(256) << 20;   // of records; measured between 200 and 775 MB
constexpr int64_t kRing = 16;                       // chunk numbers: 24 MB at H = 20, K = V = 128; measured 8 to 64
constexpr int64_t kScanRows = 64;                   // of a state, in one block

int64_t round_256(int64_t n) { return (n + 255) / 256 * 256; }
int64_t record_bytes(int64_t K, int64_t V) {
  return K == 128 ? prefill::Record<128>::bytes(V) : prefill::Record<64>::bytes(V);
}
int64_t carry_bytes(int64_t H, int64_t K, int64_t V) { return round_256(H * V * K * 4); }
int64_t summary_bytes(const PrefillPlan& p, int64_t N, int64_t H, int64_t K, int64_t V) {
  return round_256(N * (p.segments - 1) * H * (V + K) * K * 4);
}

bool aligned(const ConstView& v) { return reinterpret_cast<uintptr_t>(v.data) % 16 == 0; }

template <int K>
void run(Context& ctx, prefill::Args a, std::span<const int32_t> start, const PrefillPlan& plan, char* carry[2]) {
  const int64_t N = a.N, slots = prefill::first_slot(start[size_t(N)], N);
  int pass = 0;
  for (a.from = 0; a.from < slots; a.from = a.to, ++pass) {
    a.to = std::min(slots, a.from + plan.pass_chunks);
    const auto sequence = [&](int64_t slot) {
      int64_t low = 0, high = N - 1;
      while (low < high) {
        const int64_t mid = (low + high + 1) / 2;
        if (prefill::first_slot(start[size_t(mid)], mid) <= slot)
          low = mid;
        else
          high = mid - 1;
      }
      return int32_t(low);
    };
    a.first = sequence(a.from), a.last = sequence(a.to - 1);
    a.carry_in = reinterpret_cast<float*>(carry[pass & 1]),
    a.carry_out = reinterpret_cast<float*>(carry[1 - (pass & 1)]);
    prefill::prepare_chunks<K>(a, stream_of(ctx));
    if (a.segments > 1) prefill::summarise_segments<K>(a, stream_of(ctx));
    prefill::scan_chunks<K>(a, plan.warps, stream_of(ctx));
  }
}

}  // namespace

PrefillDevice prefill_device(const Context& ctx) {
  const Device& d = device_of(ctx);
  PrefillDevice p{.sms = d.sms, .shared_bytes = d.shared_bytes};
  p.flows = d.properties.major == 9 && d.properties.cooperativeLaunch && prefill::flow_code() &&
            int64_t(d.properties.sharedMemPerMultiprocessor) >= 2 * (prefill::flow_shared_bytes(128) + 1024) &&
            d.properties.regsPerMultiprocessor >= 65536;
  return p;
}

PrefillPlan plan_prefill(const PrefillDevice& d, int64_t T, int64_t N, int64_t longest, int64_t H, int64_t K,
                         int64_t V) {
  const int sms = d.sms;
  const int64_t shared_bytes = d.shared_bytes;
  PrefillPlan p;
  const auto fits = [](int64_t x) { return x == 64 || x == 128; };
  p.chunked =
      fits(K) && fits(V) && shared_bytes >= std::max(prefill::prepare_shared_bytes(K), prefill::scan_shared_bytes(K));
  if (!p.chunked) return p;
  const int64_t slots = T / prefill::kChunk + N;
  p.pass_chunks = std::clamp<int64_t>(kPassBytes / (H * record_bytes(K, V)), 1, std::max<int64_t>(slots, 1));
  // A step of the scan costs 1; in segments each chunk is met twice, the first time without outputs, and the segments
  // are put together one after the other. Chains beyond one for each multiprocessor gain nothing.
  const int64_t chunks = std::min(p.pass_chunks, ceil_div(longest, prefill::kChunk));
  const int64_t most = sms / std::max<int64_t>(1, N * H * (V / kScanRows));
  double best = double(chunks);
  for (int64_t s = 2; s <= most; ++s) {
    const double cost = 1.65 * double(ceil_div(chunks, s)) + 3 * double(s) + 10;
    if (cost < best) best = cost, p.segments = int(s);
  }
  // Flowing, in microseconds of an H100, and so only where it flows: the preparation of a chunk takes 17.8 of one of a
  // multiprocessor's two blocks, 19 beside chains, a step of a chain 2, and 1.6 times that in more chains than there
  // are multiprocessors. Each flowing chain has a multiprocessor to itself.
  if (const int64_t chains = H * (V / kScanRows); d.flows && chains < sms) {
    const double step = std::max(1.8, 19.0 * double(H) / double(2 * (sms - chains))),
                 flowing = double(slots) * step + 25,
                 chained = 17.8 * double(slots * H) / (2 * sms) + 2 * best * (N * chains > sms ? 1.6 : 1);
    if (flowing < chained) p.ring = std::min(kRing, slots), p.alone = int(chains), p.segments = 1;
  }
  // Two blocks of rows share what comes of a chunk: pays once that comes from memory and not from the L2 cache.
  if (V == 128 && 4 * N * H * p.segments > sms && p.pass_chunks * H * record_bytes(K, V) > kFarBytes) p.warps = 8;
  return p;
}

size_t prefill_bytes(const PrefillPlan& p, int64_t N, int64_t H, int64_t K, int64_t V) {
  if (!p.chunked) return 0;
  if (p.ring > 0) return size_t(round_256(prefill::flow_bytes(H, V, p.ring)) + p.ring * H * record_bytes(K, V));
  return size_t(2 * carry_bytes(H, K, V) + summary_bytes(p, N, H, K, V) + p.pass_chunks * H * record_bytes(K, V));
}

size_t kda_prefill_workspace(const Context& ctx, int64_t T, int64_t N, int64_t H, int64_t K, int64_t V) {
  const PrefillDevice d = prefill_device(ctx);
  PrefillPlan p = plan_prefill(d, T, N, T, H, K, V);
  // The plan depends on lengths that are not known here: not more segments than there are chains to spare, and not more
  // places than a ring has at most.
  p.segments = int(std::max<int64_t>(1, d.sms / std::max<int64_t>(1, N * H * (V / kScanRows))));
  p.ring = 0;
  const size_t chained = prefill_bytes(p, N, H, K, V);
  p.ring = d.flows ? kRing : 0;
  return std::max(chained, prefill_bytes(p, N, H, K, V));
}

void kda_prefill_as(Context& ctx, const KdaPrefill& a, const PrefillPlan& plan) {
  const int64_t H = a.q.dim(1), K = a.q.dim(2), V = a.v.dim(2), N = a.packing.N();
  if (N == 0) return;
  prefill::Args p{};
  p.q = bf16_of(a.q), p.k = bf16_of(a.k), p.v = bf16_of(a.v), p.f = bf16_of(a.f), p.b = bf16_of(a.b);
  p.A_log = a.A_log.as<float>(), p.dt_bias = a.dt_bias.as<float>(), p.state = a.state.as<float>();
  p.in = a.slots.in, p.out = a.slots.out, p.start = a.packing.start;
  p.marks = a.marks.device, p.marks_n = int32_t(a.marks.host.size());
  p.o = bf16_of(a.o);
  p.N = int32_t(N), p.H = int32_t(H), p.V = int32_t(V);
  p.bounded = a.gate.kind == KdaGate::bounded, p.lower_bound = a.gate.lower_bound, p.beta_scale = a.gate.beta_scale;
  p.segments = plan.segments;
  if (!plan.chunked || !aligned(a.q) || !aligned(a.k) || !aligned(a.v) || !aligned(a.f) || !aligned(a.o)) {
    prefill::prefill_general(p, K, stream_of(ctx));
    return;
  }
  KDA_CHECK(plan.pass_chunks > 0 && plan.segments > 0, "kda_prefill: a plan needs chunks and segments");
  char* const work = static_cast<char*>(workspace(ctx, prefill_bytes(plan, N, H, K, V), "kda_prefill"));
  if (plan.ring > 0) {
    const int64_t slots = prefill::first_slot(a.packing.host_start[size_t(N)], N);
    p.records = work + round_256(prefill::flow_bytes(H, V, plan.ring));
    const int blocks = 2 * device_of(ctx).sms;
    if (K == 128)
      prefill::flow_chunks<128>(p, plan.ring, slots, plan.alone, work, blocks, stream_of(ctx));
    else
      prefill::flow_chunks<64>(p, plan.ring, slots, plan.alone, work, blocks, stream_of(ctx));
    return;
  }
  char* carry[2] = {work, work + carry_bytes(H, K, V)};
  p.summaries = reinterpret_cast<float*>(work + 2 * carry_bytes(H, K, V));
  p.records = work + 2 * carry_bytes(H, K, V) + summary_bytes(plan, N, H, K, V);
  if (K == 128)
    run<128>(ctx, p, a.packing.host_start, plan, carry);
  else
    run<64>(ctx, p, a.packing.host_start, plan, carry);
}

void kda_prefill(Context& ctx, const KdaPrefill& a) {
  const int64_t N = a.packing.N();
  if (N == 0) return;
  kda_prefill_as(
      ctx, a,
      plan_prefill(prefill_device(ctx), a.q.dim(0), N, a.packing.longest(), a.q.dim(1), a.q.dim(2), a.v.dim(2)));
}

}  // namespace kda::cuda
