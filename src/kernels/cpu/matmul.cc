// Prompts: oneDNN's GEMM, one thread a call, on packed panels of W.
//
// A task is up to kColumns columns of one matrix: its worker packs them into scratch that fits the L2 cache and runs
// all rows past them, kRows at a time. How a row is summed then depends on K alone: oneDNN's block kernels add up K in
// one order whatever the number of rows, provided that it is not 1 (docs/MATMUL.md), so rows are padded to kRowStep.
#include <omp.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/ops.h"

namespace kda::cpu {

namespace {
using dnnl::memory;

constexpr int64_t kRows = 128;                           // rows of one call
constexpr int64_t kColumns = 2 * kPanel;                 // at most, of one task
constexpr int64_t kCopyBytes = int64_t(80) << 20;        // of x in the GEMM's type; more rows are done in turns
constexpr int64_t kScratchpadBytes = int64_t(64) << 10;  // what oneDNN may ask for; it asks for less than 1 KiB

const dnnl::engine& engine() {
  static const dnnl::engine e(dnnl::engine::kind::cpu, 0);
  return e;
}

struct Gemm {
  dnnl::matmul run;
  memory::desc x, w, y, scratchpad;
};

struct Key {
  int64_t rows, K, columns;
  bool bf16;
  auto operator<=>(const Key&) const = default;
};

Gemm make_gemm(const Key& k, memory::format_tag weights) {
  const auto type = k.bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  const memory::desc x({k.rows, k.K}, type, memory::format_tag::ab);
  const memory::desc w({k.K, k.columns}, type, weights);
  const memory::desc y({k.rows, k.columns}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // the library's own is not for several threads
  const dnnl::matmul::primitive_desc d({x, w, y}, attr, engine());
  return {dnnl::matmul(d), x, w, y, d.scratchpad_desc()};
}

Gemm make_gemm(const Key& k) {
  if (k.bf16) return make_gemm(k, memory::format_tag::BA16a64b2a);
  try {
    return make_gemm(k, memory::format_tag::BA16a64b);
  } catch (const dnnl::error&) {
    return make_gemm(k, memory::format_tag::ab);  // without AVX-512; the same bytes, since a panel is 64 columns
  }
}

// Generated code, made once per shape and kept: it costs about as much as the product of a short prompt.
const Gemm& gemm(const Key& k) {
  static std::mutex mutex;
  static std::map<Key, Gemm> cache;
  const std::lock_guard lock(mutex);
  auto it = cache.find(k);
  if (it == cache.end()) {
    try {
      it = cache.emplace(k, make_gemm(k)).first;
    } catch (const dnnl::error& e) {
      throw Error(cat("matmul: oneDNN has no product [", k.rows, ",", k.K, "] x [", k.K, ",", k.columns, "] in ",
                      k.bf16 ? "bf16" : "f32", ": ", e.message));
    }
  }
  return it->second;
}

// Everything that follows from R and K, and where it lies in the workspace.
struct Plan {
  bool bf16;
  int64_t Kp, element_bytes, columns, turn_rows;
  size_t x_bytes, panel_bytes, tile_bytes, worker_bytes, total_bytes;

  Plan(const Context& ctx, int64_t R, int64_t K) {
    bf16 = ctx.precision == Precision::fast && cpu_has_bf16();
    element_bytes = bf16 ? 2 : 4;
    columns = bf16 ? kColumns : kPanel;
    Kp = round_up(K, kStep);
    turn_rows = std::max(kRows, kCopyBytes / (Kp * element_bytes) / kRows * kRows);
    x_bytes = size_t(std::min(round_up(R, kRowStep), turn_rows) * Kp * element_bytes);
    x_bytes = size_t(round_up(int64_t(x_bytes), 4096));
    panel_bytes = size_t(round_up(columns * Kp * element_bytes, 4096));
    tile_bytes = size_t(kRows * columns * 4);
    worker_bytes = panel_bytes + tile_bytes + size_t(kScratchpadBytes);
    total_bytes = x_bytes + worker_bytes * size_t(ctx.pool->threads()) + 64;
  }
};

void store(const float* tile, int64_t columns, int64_t rows, int64_t n0, int64_t n, const WeightView& w, float* y,
           int64_t N) {
  const float* scale = w.w.dtype == Dtype::i8 ? w.scale.as<float>() + n0 : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = tile + r * columns;
    float* to = y + r * N + n0;
    if (scale)
      for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale[i];
    else
      std::copy(from, from + n, to);
  }
}

struct Panel {
  const MatmulSegment* segment;
  int64_t n0, n;
};
}  // namespace

bool cpu_has_bf16() {
  static const bool has = [] {
    const auto isa = dnnl::get_effective_cpu_isa();
    if ((int(isa) & int(dnnl::cpu_isa::avx512_core_bf16)) != int(dnnl::cpu_isa::avx512_core_bf16)) return false;
    try {
      make_gemm({kRowStep, kStep, kPanel, true});
      return true;
    } catch (const dnnl::error&) {
      return false;  // an oneDNN that wants other panels than these: f32 is right everywhere
    }
  }();
  return has;
}

void matmul(Context& ctx, const Matmul& a) {
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  if (!R) return;
  const Plan plan(ctx, R, K);
  auto* base = static_cast<char*>(workspace(ctx, plan.total_bytes, "matmul"));
  base = reinterpret_cast<char*>(round_up(int64_t(base), 64));
  char* const x_copy = base;

  std::vector<Panel> panels;
  for (const auto& s : a.segments)
    for (int64_t n0 = 0; n0 < s.w.w.dim(0); n0 += plan.columns)
      panels.push_back({&s, n0, std::min(plan.columns, s.w.w.dim(0) - n0)});

  for (int64_t r0 = 0; r0 < R; r0 += plan.turn_rows) {
    const int64_t rows = std::min(plan.turn_rows, R - r0), padded = round_up(rows, kRowStep);
    const float* x = a.x.as<float>() + r0 * K;
    const int64_t row_bytes = plan.Kp * plan.element_bytes;
    ctx.pool->run(padded / kRowStep, [&](int64_t task, int) {
      for (int64_t r = task * kRowStep; r < (task + 1) * kRowStep; ++r) {
        char* to = x_copy + r * row_bytes;
        if (r >= rows)
          std::fill(to, to + row_bytes, char(0));
        else if (plan.bf16)
          convert_row_bf16(x + r * K, K, reinterpret_cast<uint16_t*>(to));
        else
          convert_row_f32(x + r * K, K, reinterpret_cast<float*>(to));
      }
    });

    ctx.pool->run(int64_t(panels.size()), [&](int64_t task, int worker) {
      omp_set_num_threads(1);  // this thread's setting: oneDNN must not start a pool of its own
      const Panel& p = panels[size_t(task)];
      char* const mine = base + plan.x_bytes + size_t(worker) * plan.worker_bytes;
      auto* const tile = reinterpret_cast<float*>(mine + plan.panel_bytes);
      char* const scratchpad = mine + plan.panel_bytes + plan.tile_bytes;
      const int64_t columns = round_up(p.n, kPanel), N = p.segment->w.w.dim(0);
      for (int64_t c = 0; c < columns; c += kPanel) {
        char* to = mine + c * row_bytes;
        const int64_t n = std::min(kPanel, p.n - c);
        if (plan.bf16)
          pack_panel_bf16(p.segment->w.w, p.n0 + c, n, reinterpret_cast<uint16_t*>(to));
        else
          pack_panel_f32(p.segment->w.w, p.n0 + c, n, reinterpret_cast<float*>(to));
      }
      dnnl::stream stream(engine());
      float* const y = p.segment->y.as<float>() + r0 * N;
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t m = std::min(kRows, padded - r);
        const Gemm& g = gemm({m, plan.Kp, columns, plan.bf16});
        KDA_CHECK(g.scratchpad.get_size() <= size_t(kScratchpadBytes), "matmul: oneDNN asks for ",
                  g.scratchpad.get_size(), " bytes of scratch, planned ", kScratchpadBytes);
        g.run.execute(stream, {{DNNL_ARG_SRC, memory(g.x, engine(), x_copy + r * row_bytes)},
                               {DNNL_ARG_WEIGHTS, memory(g.w, engine(), mine)},
                               {DNNL_ARG_DST, memory(g.y, engine(), tile)},
                               {DNNL_ARG_SCRATCHPAD, memory(g.scratchpad, engine(), scratchpad)}});
        stream.wait();
        store(tile, columns, std::min(m, rows - r), p.n0, p.n, p.segment->w, y + r * N, N);
      }
    });
  }
}

}  // namespace kda::cpu

namespace kda {
size_t matmul_workspace_bytes(const Context& ctx, int64_t R, int64_t K, int64_t) {
  return cpu::Plan(ctx, R, K).total_bytes;
}
}  // namespace kda
