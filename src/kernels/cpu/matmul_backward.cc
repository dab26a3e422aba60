// The gradients of products: oneDNN's GEMM, one thread a call, on operands packed here.
//
// dx = sum_i dy_i W_i is one product whose sum runs over the rows of all matrices, one after the other: W_i are packed
// once, in turns of at most kTurnBytes, and a task converts a block of rows of all dy_i and runs it past them.
// dw_i += dy_i^T x is summed over tokens in chunks of kChunk: x is packed once, and a task is a tile of one dw_i: it
// transposes its columns of dy_i chunk by chunk and adds up in scratch, then adds the tile to dw_i.
#include "kernels/matmul_backward.h"

#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/matmul_backward_pack.h"
#include "kernels/cpu/ops.h"

namespace kda::cpu {

namespace {
constexpr int64_t kRows = 128;                     // of dy in a task of dx; of dw in a task of dw
constexpr int64_t kColumns = 512;                  // at most, of a task's result
constexpr int64_t kSum = 4096;                     // rows of all W_i in one turn of dx, at most
constexpr int64_t kTurnBytes = int64_t(32) << 20;  // of W_i in one turn of dx
constexpr int64_t kChunk = 1024;                   // tokens that one call of dw adds up
constexpr int64_t kChunkStep = 128;  // the last chunk is padded to a multiple: a bound on the number of codes
constexpr int64_t kCopyBytes = int64_t(80) << 20;  // of x in one turn of dw
constexpr int64_t kScratchpadBytes = int64_t(1) << 20;

char* aligned(void* p) { return reinterpret_cast<char*>(round_up(int64_t(p), 64)); }

// Columns of the result in one call.
int64_t call_columns(Kind k) { return k == Kind::f32_plain ? kPanel : kColumns; }

void multiply(const GemmKey& key, const void* x, const void* w, float* y, void* scratchpad) {
  const Gemm& g = gemm(key);
  KDA_CHECK(int64_t(g.scratchpad.get_size()) <= kScratchpadBytes, "matmul: oneDNN asks for ", g.scratchpad.get_size(),
            " bytes of scratch, planned ", kScratchpadBytes);
  run_gemm(g, x, w, y, scratchpad);
}

struct DxPlan {
  Kind kind;
  int64_t Kp, sum;
  int64_t w_bytes, rows_bytes, tile_bytes, worker_bytes, total_bytes;

  // N: rows of all matrices, each rounded up to kStep
  DxPlan(const Context& ctx, Kind k, int64_t K, int64_t N) : kind(k), Kp(round_up(K, kPanel)) {
    sum = std::clamp<int64_t>(kTurnBytes / (Kp * element_bytes(k)) / kStep * kStep, kStep, std::min(N, kSum));
    w_bytes = round_up(sum * Kp * element_bytes(k), 4096);
    rows_bytes = round_up(kRows * sum * element_bytes(k), 4096);
    tile_bytes = round_up(kRows * std::min(Kp, kColumns) * 4, 4096);
    worker_bytes = rows_bytes + tile_bytes + kScratchpadBytes;
    total_bytes = w_bytes + worker_bytes * ctx.pool->threads() + 64;
  }
};

// Rows [n0, n0 + n) of a matrix, at rows [at, at + round_up(n, kStep)) of a turn's sum.
struct Piece {
  const MatmulDxSegment* segment;
  int64_t n0, n, at;
};

void dx_turn(Context& ctx, const MatmulDx& a, const DxPlan& plan, const std::vector<Piece>& pieces, bool add) {
  const int64_t R = a.dx.dim(0), K = a.dx.dim(1), size = element_bytes(plan.kind);
  const int64_t sum = pieces.back().at + round_up(pieces.back().n, kStep), panels = plan.Kp / kPanel;
  char* const w = aligned(ctx.workspace.v.data);
  ctx.pool->run(panels * int64_t(pieces.size()), [&](int64_t task, int) {
    const Piece& p = pieces[size_t(task / panels)];
    const int64_t panel = task % panels, c0 = panel * kPanel, columns = std::min(kPanel, K - c0);
    char* to = w + (panel * sum + p.at) * kPanel * size;
    const ConstView& m = p.segment->w.w;
    if (plan.kind == Kind::bf16)
      pack_rows_bf16(m, p.n0, p.n, c0, columns, round_up(p.n, kStep), reinterpret_cast<uint16_t*>(to));
    else
      pack_rows_f32(m, p.n0, p.n, c0, columns, round_up(p.n, kStep), reinterpret_cast<float*>(to));
  });

  const int64_t across = (plan.Kp + kColumns - 1) / kColumns, down = (R + kRows - 1) / kRows;
  float* const dx = a.dx.as<float>();
  ctx.pool->run(across * down, [&](int64_t task, int worker) {
    const int64_t r0 = task / across * kRows, rows = std::min(kRows, R - r0), padded = round_up(rows, 16);
    char* const x = w + plan.w_bytes + worker * plan.worker_bytes;
    auto* const tile = reinterpret_cast<float*>(x + plan.rows_bytes);
    char* const scratchpad = x + plan.rows_bytes + plan.tile_bytes;
    for (int64_t r = 0; r < padded; ++r)
      for (const Piece& p : pieces) {
        char* to = x + (r * sum + p.at) * size;
        const int64_t N = p.segment->dy.dim(1);
        const float* from = p.segment->dy.as<float>() + (r0 + r) * N + p.n0;
        if (r >= rows)
          std::fill_n(to, round_up(p.n, kStep) * size, char(0));
        else if (plan.kind == Kind::bf16)
          convert_row_bf16(from, p.n, reinterpret_cast<uint16_t*>(to));
        else
          convert_row_f32(from, p.n, reinterpret_cast<float*>(to));
      }
    const int64_t end = std::min(plan.Kp, (task % across + 1) * kColumns);
    for (int64_t c0 = task % across * kColumns, c = 0; c0 < end; c0 += c) {
      c = std::min(call_columns(plan.kind), end - c0);
      const char* const panel = w + c0 * sum * size;
      const bool direct = c == K && rows == padded;  // dense as it lies
      float* const y = direct ? dx + r0 * K : tile;
      multiply({plan.kind, padded, sum, c, direct && add}, x, panel, y, scratchpad);
      if (direct) continue;
      const int64_t n = std::min(c, K - c0);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = tile + r * c;
        float* to = dx + (r0 + r) * K + c0;
        if (add)
          for (int64_t i = 0; i < n; ++i) to[i] += from[i];
        else
          std::copy(from, from + n, to);
      }
    }
  });
}

struct DwPlan {
  Kind kind;
  int64_t Kp, turn_rows;
  int64_t x_bytes, dy_bytes, tile_bytes, worker_bytes, total_bytes;

  DwPlan(const Context& ctx, int64_t R, int64_t K)
      : kind(ctx.precision == Precision::fast && cpu_has_bf16() ? Kind::bf16 : f32_kind()), Kp(round_up(K, kPanel)) {
    const int64_t size = element_bytes(kind);
    turn_rows = std::max<int64_t>(1, kCopyBytes / (Kp * size) / kChunk) * kChunk;
    x_bytes = round_up(std::min(turn_rows, round_up(R, kChunkStep)) * Kp * size, 4096);
    dy_bytes = kRows * kChunk * size;
    tile_bytes = kRows * kColumns * 4;
    worker_bytes = dy_bytes + tile_bytes + kScratchpadBytes;
    total_bytes = x_bytes + worker_bytes * ctx.pool->threads() + 64;
  }
};

struct DwTile {
  const MatmulDwSegment* segment;
  int64_t n0, n, k0, k;  // k a multiple of kPanel, beyond K where K is not
};

}  // namespace

void matmul_dx(Context& ctx, const MatmulDx& a) {
  const int64_t R = a.dx.dim(0), K = a.dx.dim(1);
  if (!R) return;
  bool add = false;
  for (const Kind kind : {Kind::bf16, f32_kind()}) {
    const auto mine = [&](const MatmulDxSegment& s) { return kind_for(ctx.precision, s.w.w.dtype) == kind; };
    int64_t N = 0;
    for (const auto& s : a.segments)
      if (mine(s)) N += round_up(s.w.w.dim(0), kStep);
    if (!N) continue;
    const DxPlan plan(ctx, kind, K, N);
    workspace(ctx, size_t(plan.total_bytes), "matmul_dx");
    std::vector<Piece> pieces;
    int64_t at = 0;
    const auto flush = [&] {
      if (!pieces.empty()) dx_turn(ctx, a, plan, pieces, add), add = true;
      pieces.clear();
      at = 0;
    };
    for (const auto& s : a.segments)
      for (int64_t n0 = 0, n = 0; mine(s) && n0 < s.w.w.dim(0); n0 += n) {
        if (at == plan.sum) flush();
        n = std::min(plan.sum - at, s.w.w.dim(0) - n0);
        pieces.push_back({&s, n0, n, at});
        at += round_up(n, kStep);
      }
    flush();
  }
  if (!add) std::fill_n(a.dx.as<float>(), R * K, 0.0f);  // matrices without rows
}

void matmul_dw(Context& ctx, const MatmulDw& a) {
  const int64_t R = a.x.dim(0), K = a.x.dim(1);
  if (!R) return;
  const DwPlan plan(ctx, R, K);
  const int64_t size = element_bytes(plan.kind), panels = plan.Kp / kPanel;
  char* const x = aligned(workspace(ctx, size_t(plan.total_bytes), "matmul_dw"));

  std::vector<DwTile> tiles;
  for (const auto& s : a.segments)
    for (int64_t n0 = 0; n0 < s.dy.dim(1); n0 += kRows)
      for (int64_t k0 = 0; k0 < plan.Kp; k0 += kColumns)
        tiles.push_back({&s, n0, std::min(kRows, s.dy.dim(1) - n0), k0, std::min(kColumns, plan.Kp - k0)});

  for (int64_t r0 = 0; r0 < R; r0 += plan.turn_rows) {
    const int64_t rows = std::min(plan.turn_rows, R - r0), chunks = (rows + kChunk - 1) / kChunk;
    const auto rows_of = [&](int64_t chunk) { return std::min(kChunk, rows - chunk * kChunk); };
    const auto panel_at = [&](int64_t chunk, int64_t k) {
      return x + (chunk * kChunk * plan.Kp + k * round_up(rows_of(chunk), kChunkStep)) * size;
    };
    ctx.pool->run(chunks * panels, [&](int64_t task, int) {
      const int64_t chunk = task / panels, k = task % panels * kPanel, n = rows_of(chunk);
      const int64_t depth = round_up(n, kChunkStep), columns = std::min(kPanel, K - k);
      char* to = panel_at(chunk, k);
      if (plan.kind == Kind::bf16)
        pack_rows_bf16(a.x, r0 + chunk * kChunk, n, k, columns, depth, reinterpret_cast<uint16_t*>(to));
      else
        pack_rows_f32(a.x, r0 + chunk * kChunk, n, k, columns, depth, reinterpret_cast<float*>(to));
    });

    ctx.pool->run(int64_t(tiles.size()), [&](int64_t task, int worker) {
      const DwTile& t = tiles[size_t(task)];
      char* const dy = x + plan.x_bytes + worker * plan.worker_bytes;
      auto* const tile = reinterpret_cast<float*>(dy + plan.dy_bytes);
      char* const scratchpad = dy + plan.dy_bytes + plan.tile_bytes;
      const int64_t N = t.segment->dy.dim(1), width = round_up(t.n, 16), step = call_columns(plan.kind);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t n = rows_of(chunk), depth = round_up(n, kChunkStep);
        const float* from = t.segment->dy.as<float>() + (r0 + chunk * kChunk) * N + t.n0;
        if (plan.kind == Kind::bf16)
          transpose_rows_bf16(from, N, n, t.n, width, depth, reinterpret_cast<uint16_t*>(dy));
        else
          transpose_rows_f32(from, N, n, t.n, width, depth, reinterpret_cast<float*>(dy));
        for (int64_t k = 0; k < t.k; k += step)
          multiply({plan.kind, width, depth, std::min(step, t.k - k), chunk > 0}, dy, panel_at(chunk, t.k0 + k),
                   tile + k * width, scratchpad);
      }
      float* const dw = t.segment->dw.as<float>() + t.n0 * K + t.k0;
      for (int64_t k = 0; k < t.k; k += step) {
        const int64_t wide = std::min(step, t.k - k), n = std::min(wide, K - t.k0 - k);
        for (int64_t i = 0; i < t.n; ++i) {
          const float* part = tile + k * width + i * wide;
          float* to = dw + i * K + k;
          for (int64_t j = 0; j < n; ++j) to[j] += part[j];
        }
      }
    });
  }
}

}  // namespace kda::cpu

namespace kda {

size_t matmul_dx_workspace_bytes(const Context& ctx, int64_t, int64_t K, int64_t N) {
  const int64_t all = 8 * cpu::round_up(std::max<int64_t>(N, 1), cpu::kStep);
  return size_t(std::max(cpu::DxPlan(ctx, cpu::Kind::bf16, K, all).total_bytes,
                         cpu::DxPlan(ctx, cpu::f32_kind(), K, all).total_bytes));
}

size_t matmul_dw_workspace_bytes(const Context& ctx, int64_t R, int64_t K, int64_t) {
  return size_t(cpu::DwPlan(ctx, R, K).total_bytes);
}

}  // namespace kda
