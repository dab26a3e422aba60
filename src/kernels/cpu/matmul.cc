// Prompts: oneDNN's GEMM, one thread a call, on packed panels of W.
//
// Large matrices: a task is up to kColumns columns of one of them: its worker packs them into scratch that fits the L2
// cache and runs all rows past them, a block at a time. Small ones are packed beforehand, and a task is a block of
// rows. Which way is taken, and the columns of a call, depend on the matrices alone. How a row is summed must depend on
// K alone. oneDNN's AVX-512 block kernels add up K in one order for any number of rows but 1, so there rows are padded
// to 16. Its AMX kernels choose how to cut K by the number of rows, and its older kernels end a block differently, so
// there blocks have one size, 128 and 48 rows (docs/MATMUL.md has the experiment, and the tests repeat it).
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

constexpr int64_t kWholeBytes = int64_t(4) << 20;  // of W in the GEMM's type: up to here it is packed all at once
constexpr int64_t kWholeColumns = 1024;            // at most, of one call where it is

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
  size_t x_block_bytes, whole_tile_bytes, whole_worker_bytes;  // where all of W fits kWholeBytes

  Plan(const Context& ctx, Kind k, int64_t R, int64_t K) : kind(k), size(sizes(k)) {
    Kp = round_up(K, kStep);
    row_bytes = Kp * size.element_bytes;
    turn_rows = std::max<int64_t>(1, kCopyBytes / row_bytes / size.rows) * size.rows;
    x_bytes = size_t(round_up(std::min(round_up(R, size.row_step), turn_rows) * row_bytes, 4096));
    panel_bytes = size_t(round_up(size.columns * row_bytes, 4096));
    tile_bytes = size_t(size.rows * size.columns * 4);
    const int64_t widest = kind == Kind::f32_plain ? size.columns : kWholeColumns;
    for (int64_t n = kPanel; n <= widest; n *= 2)
      scratchpad_bytes = std::max(scratchpad_bytes, gemm({kind, size.rows, Kp, n}).scratchpad.get_size());
    scratchpad_bytes = size_t(round_up(int64_t(scratchpad_bytes), 4096));
    worker_bytes = panel_bytes + tile_bytes + scratchpad_bytes;
    x_block_bytes = size_t(round_up(size.rows * row_bytes, 4096));
    whole_tile_bytes = size_t(size.rows * kWholeColumns * 4);
    whole_worker_bytes = x_block_bytes + whole_tile_bytes + scratchpad_bytes;
    const auto threads = size_t(ctx.pool->threads());
    total_bytes = std::max(x_bytes + worker_bytes * threads, size_t(kWholeBytes) + whole_worker_bytes * threads) + 64;
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

// Up to `columns` columns of one matrix.
struct Panel {
  const MatmulSegment* segment;
  int64_t n0, n, at;  // at: columns of all matrices before, each padded to kPanel
};

void pack(const Plan& plan, const Panel& p, char* to) {
  for (int64_t c = 0; c < p.n; c += kPanel, to += kPanel * plan.row_bytes) {
    const int64_t n = std::min(kPanel, p.n - c);
    if (plan.kind == Kind::bf16)
      pack_panel_bf16(p.segment->w.w, p.n0 + c, n, reinterpret_cast<uint16_t*>(to));
    else
      pack_panel_f32(p.segment->w.w, p.n0 + c, n, reinterpret_cast<float*>(to));
  }
}

// Rows [r, r + padded) of x, zeros from `rows` on.
void convert(const Plan& plan, const ConstView& x, int64_t r, int64_t rows, int64_t padded, char* to) {
  const int64_t K = x.dim(1);
  for (int64_t i = 0; i < padded; ++i, to += plan.row_bytes) {
    if (i >= rows)
      std::fill(to, to + plan.row_bytes, char(0));
    else if (plan.kind == Kind::bf16)
      convert_row_bf16(x.as<float>() + (r + i) * K, K, reinterpret_cast<uint16_t*>(to));
    else
      convert_row_f32(x.as<float>() + (r + i) * K, K, reinterpret_cast<float*>(to));
  }
}

const Gemm& gemm_for(const Plan& plan, int64_t rows, int64_t columns) {
  const Gemm& g = gemm({plan.kind, rows, plan.Kp, columns});
  KDA_CHECK(g.scratchpad.get_size() <= plan.scratchpad_bytes, "matmul: oneDNN asks for ", g.scratchpad.get_size(),
            " bytes of scratch, planned ", plan.scratchpad_bytes);
  return g;
}

// Small matrices: all of them are packed once; a task is a block of rows, which it converts and runs past all columns,
// or where rows are few past the columns of one call.
void multiply_whole(Context& ctx, const Matmul& a, const Plan& plan, const std::vector<Panel>& calls) {
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  char* const w = reinterpret_cast<char*>(round_up(int64_t(ctx.workspace.v.data), 64));
  std::vector<Panel> panels;
  for (const Panel& c : calls)
    for (int64_t n = 0; n < c.n; n += kPanel)
      panels.push_back({c.segment, c.n0 + n, std::min(kPanel, c.n - n), c.at + n});
  ctx.pool->run(int64_t(panels.size()), [&](int64_t task, int) {
    const Panel& p = panels[size_t(task)];
    pack(plan, p, w + p.at * plan.row_bytes);
  });

  const int64_t down = (R + plan.size.rows - 1) / plan.size.rows, across = down < 8 ? int64_t(calls.size()) : 1;
  ctx.pool->run(down * across, [&](int64_t task, int worker) {
    const int64_t r = task / across * plan.size.rows, rows = std::min(plan.size.rows, R - r);
    const int64_t padded = round_up(rows, plan.size.row_step);
    char* const copy = w + kWholeBytes + size_t(worker) * plan.whole_worker_bytes;
    auto* const tile = reinterpret_cast<float*>(copy + plan.x_block_bytes);
    char* const scratchpad = copy + plan.x_block_bytes + plan.whole_tile_bytes;
    const bool as_it_lies = plan.kind == Kind::f32 && K == plan.Kp && rows == padded;
    if (!as_it_lies) convert(plan, a.x, r, rows, padded, copy);
    const void* const x = as_it_lies ? static_cast<const void*>(a.x.as<float>() + r * K) : copy;
    const size_t first = size_t(across == 1 ? 0 : task % across), end = across == 1 ? calls.size() : first + 1;
    for (size_t i = first; i < end; ++i) {
      const Panel& p = calls[i];
      const int64_t columns = round_up(p.n, kPanel), N = p.segment->w.w.dim(0);
      float* const y = p.segment->y.as<float>() + r * N;
      const bool direct = columns == N && rows == padded && p.segment->w.w.dtype != Dtype::i8;
      run_gemm(gemm_for(plan, padded, columns), x, w + p.at * plan.row_bytes, direct ? y : tile, scratchpad);
      if (!direct) store(tile, columns, rows, p.n0, p.n, p.segment->w, y, N);
    }
  });
}

// Large matrices: a task is a panel of one of them.
void multiply_panels(Context& ctx, const Matmul& a, const Plan& plan, const std::vector<Panel>& panels) {
  const int64_t R = a.x.dim(0);
  char* const base = reinterpret_cast<char*>(round_up(int64_t(ctx.workspace.v.data), 64));
  char* const x_copy = base;
  for (int64_t r0 = 0; r0 < R; r0 += plan.turn_rows) {
    const int64_t rows = std::min(plan.turn_rows, R - r0), padded = round_up(rows, plan.size.row_step);
    ctx.pool->run(padded / plan.size.row_step, [&](int64_t task, int) {
      const int64_t r = task * plan.size.row_step;
      convert(plan, a.x, r0 + r, rows - r, plan.size.row_step, x_copy + r * plan.row_bytes);
    });

    ctx.pool->run(int64_t(panels.size()), [&](int64_t task, int worker) {
      omp_set_num_threads(1);  // this thread's setting: oneDNN must not start a pool of its own
      const Panel& p = panels[size_t(task)];
      char* const panel = base + plan.x_bytes + size_t(worker) * plan.worker_bytes;
      auto* const tile = reinterpret_cast<float*>(panel + plan.panel_bytes);
      char* const scratchpad = panel + plan.panel_bytes + plan.tile_bytes;
      const int64_t columns = round_up(p.n, kPanel), N = p.segment->w.w.dim(0);
      pack(plan, p, panel);
      dnnl::stream stream(engine());
      float* const y = p.segment->y.as<float>() + r0 * N;
      const Gemm* g = nullptr;
      std::unordered_map<int, memory> args;
      for (int64_t r = 0; r < rows; r += plan.size.rows) {
        const int64_t m = std::min(plan.size.rows, padded - r);
        char* const from = x_copy + r * plan.row_bytes;
        if (!g || m != plan.size.rows) {
          g = &gemm_for(plan, m, columns);
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

// The matrices of `a` that are multiplied in this kind.
void multiply(Context& ctx, const Matmul& a, Kind kind) {
  const Plan plan(ctx, kind, a.x.dim(0), a.x.dim(1));
  workspace(ctx, plan.total_bytes, "matmul");
  int64_t all = 0;
  for (const auto& s : a.segments)
    if (kind_for(ctx.precision, s.w.w.dtype) == kind) all += round_up(s.w.w.dim(0), kPanel);
  if (!all) return;
  const bool whole = kind != Kind::f32_plain && all * plan.row_bytes <= kWholeBytes;
  std::vector<Panel> panels;
  int64_t at = 0;
  for (const auto& s : a.segments) {
    if (kind_for(ctx.precision, s.w.w.dtype) != kind) continue;
    const int64_t N = s.w.w.dim(0);
    const int64_t columns = !whole ? plan.size.columns : N <= kWholeColumns ? kWholeColumns : kWholeColumns / 2;
    for (int64_t n0 = 0; n0 < N; n0 += columns) {
      panels.push_back({&s, n0, std::min(columns, N - n0), at});
      at += round_up(panels.back().n, kPanel);
    }
  }
  (whole ? multiply_whole : multiply_panels)(ctx, a, plan, panels);
}

}  // namespace

void matmul(Context& ctx, const Matmul& a) {
  if (!a.x.dim(0)) return;
  if (ctx.precision == Precision::fast && cpu_has_bf16()) multiply(ctx, a, Kind::bf16);
  multiply(ctx, a, f32_kind());
}

}  // namespace kda::cpu

namespace kda {
size_t cpu::matmul_workspace(const Context& ctx, int64_t R, int64_t K, int64_t) {
  const size_t f32 = cpu::Plan(ctx, cpu::f32_kind(), R, K).total_bytes;
  return ctx.precision == Precision::fast && cpu::cpu_has_bf16()
             ? std::max(f32, cpu::Plan(ctx, cpu::Kind::bf16, R, K).total_bytes)
             : f32;
}
}  // namespace kda
