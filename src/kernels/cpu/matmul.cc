// Prompts: oneDNN's GEMM, one thread a call, on packed panels of W.
//
// A task is up to kColumns columns of one matrix: its worker packs them into scratch that fits the L2 cache and runs
// all rows past them, a block at a time. How a row is summed must depend on K alone. oneDNN's AVX-512 block kernels add
// up K in one order for any number of rows but 1, so there rows are padded to 16. Its AMX kernels choose how to cut K
// by the number of rows, and its older kernels end a block differently, so there blocks have one size, 128 and 48 rows
// (docs/MATMUL.md has the experiment, and the tests repeat it).
#include <omp.h>

#include <algorithm>
#include <unordered_map>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/ops.h"

namespace kda::cpu {

namespace {
using dnnl::memory;

constexpr int64_t kColumns = 2 * kPanel;               // at most, of one task
constexpr int64_t kCopyBytes = int64_t(80) << 20;      // of x in the GEMM's type; more rows are done in turns
constexpr size_t kScratchpadBytes = size_t(16) << 10;  // at least; oneDNN asks for less than 1 KiB, with AMX for more

struct Sizes {
  int64_t row_step, rows;  // a block has a multiple of row_step rows, at most `rows`
  int64_t columns;         // at most, of one task
  int64_t element_bytes;
};
Sizes sizes(Kind k) {
  switch (k) {
    case Kind::bf16: return {cpu_has_amx() ? 128 : 16, 128, kColumns, 2};
    case Kind::f32: return {16, 128, kPanel, 4};
    default: return {48, 48, kPanel, 4};
  }
}

// Everything that follows from R and K, and where it lies in the workspace.
struct Plan {
  Kind kind;
  Sizes size;
  int64_t Kp, row_bytes, turn_rows;
  size_t x_bytes, panel_bytes, tile_bytes, scratchpad_bytes = kScratchpadBytes, worker_bytes, total_bytes;

  Plan(const Context& ctx, Kind k, int64_t R, int64_t K) : kind(k), size(sizes(k)) {
    Kp = round_up(K, kStep);
    row_bytes = Kp * size.element_bytes;
    turn_rows = std::max<int64_t>(1, kCopyBytes / row_bytes / size.rows) * size.rows;
    x_bytes = size_t(round_up(std::min(round_up(R, size.row_step), turn_rows) * row_bytes, 4096));
    panel_bytes = size_t(round_up(size.columns * row_bytes, 4096));
    tile_bytes = size_t(size.rows * size.columns * 4);
    for (int64_t n = kPanel; n <= size.columns; n += kPanel)
      scratchpad_bytes = std::max(scratchpad_bytes, gemm({kind, size.rows, Kp, n}).scratchpad.get_size());
    scratchpad_bytes = size_t(round_up(int64_t(scratchpad_bytes), 4096));
    worker_bytes = panel_bytes + tile_bytes + scratchpad_bytes;
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

// The matrices of `a` that are multiplied in this kind.
void multiply(Context& ctx, const Matmul& a, Kind kind) {
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  const Plan plan(ctx, kind, R, K);
  auto* base = static_cast<char*>(workspace(ctx, plan.total_bytes, "matmul"));
  base = reinterpret_cast<char*>(round_up(int64_t(base), 64));
  char* const x_copy = base;

  std::vector<Panel> panels;
  for (const auto& s : a.segments) {
    if (kind_for(ctx.precision, s.w.w.dtype) != kind) continue;
    for (int64_t n0 = 0; n0 < s.w.w.dim(0); n0 += plan.size.columns)
      panels.push_back({&s, n0, std::min(plan.size.columns, s.w.w.dim(0) - n0)});
  }
  if (panels.empty()) return;

  for (int64_t r0 = 0; r0 < R; r0 += plan.turn_rows) {
    const int64_t rows = std::min(plan.turn_rows, R - r0), padded = round_up(rows, plan.size.row_step);
    const float* x = a.x.as<float>() + r0 * K;
    ctx.pool->run(padded / plan.size.row_step, [&](int64_t task, int) {
      for (int64_t r = task * plan.size.row_step; r < (task + 1) * plan.size.row_step; ++r) {
        char* to = x_copy + r * plan.row_bytes;
        if (r >= rows)
          std::fill(to, to + plan.row_bytes, char(0));
        else if (plan.kind == Kind::bf16)
          convert_row_bf16(x + r * K, K, reinterpret_cast<uint16_t*>(to));
        else
          convert_row_f32(x + r * K, K, reinterpret_cast<float*>(to));
      }
    });

    ctx.pool->run(int64_t(panels.size()), [&](int64_t task, int worker) {
      omp_set_num_threads(1);  // this thread's setting: oneDNN must not start a pool of its own
      const Panel& p = panels[size_t(task)];
      char* const panel = base + plan.x_bytes + size_t(worker) * plan.worker_bytes;
      auto* const tile = reinterpret_cast<float*>(panel + plan.panel_bytes);
      char* const scratchpad = panel + plan.panel_bytes + plan.tile_bytes;
      const int64_t columns = round_up(p.n, kPanel), N = p.segment->w.w.dim(0);
      for (int64_t c = 0; c < columns; c += kPanel) {
        char* to = panel + c * plan.row_bytes;
        const int64_t n = std::min(kPanel, p.n - c);
        if (plan.kind == Kind::bf16)
          pack_panel_bf16(p.segment->w.w, p.n0 + c, n, reinterpret_cast<uint16_t*>(to));
        else
          pack_panel_f32(p.segment->w.w, p.n0 + c, n, reinterpret_cast<float*>(to));
      }
      dnnl::stream stream(engine());
      float* const y = p.segment->y.as<float>() + r0 * N;
      const Gemm* g = nullptr;
      std::unordered_map<int, memory> args;
      for (int64_t r = 0; r < rows; r += plan.size.rows) {
        const int64_t m = std::min(plan.size.rows, padded - r);
        char* const from = x_copy + r * plan.row_bytes;
        if (!g || m != plan.size.rows) {
          const GemmKey key{plan.kind, m, plan.Kp, columns};
          g = &gemm(key);
          KDA_CHECK(g->scratchpad.get_size() <= plan.scratchpad_bytes, "matmul: oneDNN asks for ",
                    g->scratchpad.get_size(), " bytes of scratch, planned ", plan.scratchpad_bytes);
          args = {{DNNL_ARG_SRC, memory(g->x, engine(), from)},
                  {DNNL_ARG_WEIGHTS, memory(g->w, engine(), panel)},
                  {DNNL_ARG_DST, memory(g->y, engine(), tile)},
                  {DNNL_ARG_SCRATCHPAD, memory(g->scratchpad, engine(), scratchpad)}};
        }
        args[DNNL_ARG_SRC].set_data_handle(from);
        g->run.execute(stream, args);
        stream.wait();
        store(tile, columns, std::min(m, rows - r), p.n0, p.n, p.segment->w, y + r * N, N);
      }
    });
  }
}

}  // namespace

void matmul(Context& ctx, const Matmul& a) {
  if (!a.x.dim(0)) return;
  if (ctx.precision == Precision::fast && cpu_has_bf16()) multiply(ctx, a, Kind::bf16);
  multiply(ctx, a, f32_kind());
}

}  // namespace kda::cpu

namespace kda {
size_t matmul_workspace_bytes(const Context& ctx, int64_t R, int64_t K, int64_t) {
  const size_t f32 = cpu::Plan(ctx, cpu::f32_kind(), R, K).total_bytes;
  return ctx.precision == Precision::fast && cpu::cpu_has_bf16()
             ? std::max(f32, cpu::Plan(ctx, cpu::Kind::bf16, R, K).total_bytes)
             : f32;
}
}  // namespace kda
