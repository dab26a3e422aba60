// The fused ops of the table as the sequences of their parts: on the CPU fusing them gains nothing that can be measured.
#include <algorithm>

#include "kernels/cpu/ops.h"
#include "kernels/kda.h"
#include "kernels/kda_prep.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"

namespace kda::cpu {

namespace {
View rows(const View& v, int64_t from, int64_t to) {
  View part = v;
  part.shape.dim[0] = to - from;
  part.data = static_cast<std::byte*>(v.data) + size_t(from) * (v.bytes() / size_t(std::max<int64_t>(1, v.dim(0))));
  return part;
}
View writable(const ConstView& v) { return {const_cast<void*>(v.data), v.dtype, v.shape}; }
}  // namespace

void add_rms_norm(Context& ctx, const AddRmsNorm& a) {
  cpu::add_rows(ctx, {.x = a.add, .y = a.x});
  cpu::rms_norm(ctx, {.x = a.x, .w = a.w, .y = a.y, .eps = a.eps});
}

void matmul_relu2(Context& ctx, const Matmul& a) {
  cpu::matmul(ctx, a);
  for (const MatmulSegment& s : a.segments) cpu::relu2(ctx, {.x = s.y, .y = s.y});
}

void norm_matvec(Context& ctx, const NormMatvec& a) {
  cpu::rms_norm(ctx, {.x = a.x, .w = a.norm, .y = a.h, .eps = a.eps});
  cpu::matvec(ctx, {.x = a.h, .segments = a.segments});
}

void norm_matvec_relu2(Context& ctx, const NormMatvec& a) {
  cpu::norm_matvec(ctx, a);
  for (const MatmulSegment& s : a.segments) cpu::relu2(ctx, {.x = s.y, .y = s.y});
}

void matvec_add(Context& ctx, const MatvecAdd& a) {
  const MatmulSegment segment{a.w, a.h};
  cpu::matvec(ctx, {.x = a.x, .segments = {&segment, 1}});
  cpu::add_rows(ctx, {.x = a.h, .y = a.y});
}

// With marks, a sequence is run as pieces, each from the state that the one before left in its slot.
void kda_prefill(Context& ctx, const KdaPrefill& a) {
  cpu::kda_prep(ctx, {.q = a.q, .k = a.k, .f = a.f, .b = a.b, .A_log = a.A_log, .dt_bias = a.dt_bias, .gate = a.gate,
                 .log_decay = a.f, .beta = a.b});
  KdaForward whole{.q = a.q, .k = a.k, .v = a.v, .log_decay = a.f, .beta = a.b, .state = a.state, .slots = a.slots,
                   .packing = a.packing, .o = a.o};
  if (a.marks.host.empty()) return cpu::kda_forward(ctx, whole);
  for (int64_t n = 0; n < a.packing.N(); ++n) {
    int64_t from = a.packing.start[n];
    const int64_t end = a.packing.start[n + 1];
    int32_t in = a.slots.in[n];
    const auto piece = [&](int64_t to, int32_t out) {
      const int32_t start[] = {0, int32_t(to - from)};
      KdaForward f = whole;
      f.q = rows(a.q, from, to), f.k = rows(a.k, from, to), f.v = rows(writable(a.v), from, to);
      f.log_decay = rows(a.f, from, to), f.beta = rows(a.b, from, to), f.o = rows(a.o, from, to);
      f.slots = {&in, &out};
      f.packing = {start, start};
      cpu::kda_forward(ctx, f);
      from = to;
      in = out;
    };
    for (const StateMark& m : a.marks.host)
      if (m.sequence == n) piece(a.packing.start[n] + m.tokens, m.slot);
    piece(end, a.slots.out[n]);
  }
}

size_t kda_prefill_workspace(const Context& ctx, int64_t T, int64_t, int64_t H, int64_t K, int64_t V) {
  return kda_forward_workspace_bytes(ctx, T, H, K, V);
}

}  // namespace kda::cpu
