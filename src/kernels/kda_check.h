// kernels/kda_check.h — checks that the doors of the KDA family share.
#pragma once
#include "kernels/backend.h"

namespace kda::door {

// `v` has this shape, is f32 and has memory unless it is empty.
inline void check(const char* op, const char* name, const ConstView& v, const Shape& want) {
  KDA_CHECK(v.shape == want, op, ": ", name, " must be ", want, ", got ", v.shape);
  KDA_CHECK(v.dtype == Dtype::f32, op, ": ", name, " must be f32, got ", name_of(v.dtype));
  KDA_CHECK(v.data || v.size() == 0, op, ": ", name, " ", v.shape, " has no memory");
}

// The same for an activation: of the backend's dtype.
inline void check_act(const Context& ctx, const char* op, const char* name, const ConstView& v, const Shape& want) {
  const Dtype act = ctx.backend->activation;
  KDA_CHECK(v.shape == want, op, ": ", name, " must be ", want, ", got ", v.shape);
  KDA_CHECK(v.dtype == act, op, ": ", name, " must be ", name_of(act), ", got ", name_of(v.dtype));
  KDA_CHECK(v.data || v.size() == 0, op, ": ", name, " ", v.shape, " has no memory");
}

// `start` begins at 0, never falls and ends at T.
inline void check_packing(const char* op, const Packing& p, int64_t T) {
  KDA_CHECK(!p.host_start.empty(), op, ": the packing has no start array");
  KDA_CHECK(p.start, op, ": the packing's start is missing in the backend's memory");
  KDA_CHECK(p.host_start[0] == 0, op, ": start[0] must be 0, got ", p.host_start[0]);
  for (int64_t n = 0; n < p.N(); ++n) {
    const auto i = size_t(n);
    KDA_CHECK(p.host_start[i] <= p.host_start[i + 1], op, ": start must not fall, got start[", n,
              "] = ", p.host_start[i], " and start[", n + 1, "] = ", p.host_start[i + 1]);
  }
  KDA_CHECK(p.T() == T, op, ": the packing ends at token ", p.T(), ", the tensors have ", T);
}

// Slots lie inside a pool of `size`, and nobody writes where another reads or writes. Only where they can be read from
// the host: on the CPU.
inline void check_slots(const char* op, const Context& ctx, const Slots& s, int64_t N, int64_t size) {
  KDA_CHECK(N == 0 || (s.in && s.out), op, ": slots are missing");
  if (ctx.backend != &cpu_backend()) return;
  for (int64_t n = 0; n < N; ++n) {
    KDA_CHECK(s.in[n] >= -1 && s.in[n] < size, op, ": slots.in[", n, "] = ", s.in[n], ", the pool has ", size);
    KDA_CHECK(s.out[n] >= -1 && s.out[n] < size, op, ": slots.out[", n, "] = ", s.out[n], ", the pool has ", size);
    for (int64_t m = 0; s.out[n] >= 0 && m < N; ++m)
      KDA_CHECK(m == n || (s.out[n] != s.out[m] && s.out[n] != s.in[m]), op, ": slot ", s.out[n],
                " is written by sequence ", n, " and used by sequence ", m);
  }
}

// Marks are sorted, at multiples of 64 inside their sequences, each with a slot of its own inside a pool of `size`.
inline void check_marks(const char* op, const StateMarks& marks, const Packing& p, int64_t size) {
  KDA_CHECK(marks.host.empty() || marks.device, op, ": the marks are missing in the backend's memory");
  for (size_t i = 0; i < marks.host.size(); ++i) {
    const StateMark& m = marks.host[i];
    KDA_CHECK(m.sequence >= 0 && m.sequence < p.N(), op, ": mark ", i, " is in sequence ", m.sequence, " of ", p.N());
    const int64_t length = p.host_start[size_t(m.sequence) + 1] - p.host_start[size_t(m.sequence)];
    KDA_CHECK(m.tokens > 0 && m.tokens % 64 == 0 && m.tokens < length, op, ": mark ", i,
              " must be at a multiple of 64 tokens below the sequence's ", length, ", is at ", m.tokens);
    KDA_CHECK(m.slot >= 0 && m.slot < size, op, ": mark ", i, " has slot ", m.slot, ", the pool has ", size);
    for (size_t j = 0; j < i; ++j) {
      const StateMark& o = marks.host[j];
      KDA_CHECK(o.sequence < m.sequence || (o.sequence == m.sequence && o.tokens < m.tokens), op,
                ": marks must be sorted by sequence and tokens, mark ", i, " is not");
      KDA_CHECK(o.slot != m.slot, op, ": marks ", j, " and ", i, " share slot ", m.slot);
    }
  }
}

// Whether the memory of two views shares a byte.
inline bool overlap(const ConstView& a, const ConstView& b) {
  const auto *x = static_cast<const char*>(a.data), *y = static_cast<const char*>(b.data);
  return a.bytes() && b.bytes() && x < y + b.bytes() && y < x + a.bytes();
}

// What kda_forward takes, for every op that takes the same.
void check_forward(const char* op, const Context&, const KdaForward&);

}  // namespace kda::door
