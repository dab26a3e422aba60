#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "kernels/cpu/matmul.h"
#include "kernels/cpu/onednn.h"
#include "kernels/probe.h"

namespace kda {

namespace {
using cpu::engine;
using dnnl::memory;
constexpr int64_t kScratch = int64_t(4) << 20;

// The product of one block [m,n] of y.
struct Block {
  int64_t m, n;
  dnnl::matmul::primitive_desc d;
  dnnl::matmul run;

  Block(bool bf16, int64_t rows, int64_t columns, int64_t K) : m(rows), n(columns) {
    if (!m || !n) return;
    const auto type = bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    d = cpu::describe_matmul({{m, K}, type, memory::format_tag::ab}, {{K, n}, type, memory::format_tag::any},
                             {{m, n}, memory::data_type::f32, memory::format_tag::ab}, attr);
    KDA_CHECK(int64_t(d.scratchpad_desc().get_size()) <= kScratch, "probe: oneDNN asks for ",
              d.scratchpad_desc().get_size(), " bytes of scratch");
    run = dnnl::matmul(d);
  }
};

// One way of cutting y[rows,N] into blocks: whole ones and those along the right and lower edges.
struct Cut {
  Block whole, right, low, corner;
  int64_t down, across;
  Cut(bool bf16, int64_t rows, int64_t N, int64_t K, int64_t m, int64_t n)
      : whole(bf16, m, n, K),
        right(bf16, m, N % n, K),
        low(bf16, rows % m, n, K),
        corner(bf16, rows % m, N % n, K),
        down((rows + m - 1) / m),
        across((N + n - 1) / n) {}
};
}  // namespace

struct GemmProbe::Impl {
  ThreadPool& pool;
  int64_t rows;
  GemmShape s;
  bool bf16;
  int64_t size = bf16 ? 2 : 4;
  Tensor x, w, y, scratch;
  std::unique_ptr<Cut> best;

  Impl(ThreadPool& p, int64_t r, const GemmShape& shape, Precision precision)
      : pool(p), rows(r), s(shape), bf16(precision == Precision::fast && cpu::cpu_has_bf16()) {
    KDA_CHECK(rows > 0 && s.N > 0 && s.K > 0, "probe: a product needs rows, N and K");
    x = host_tensor(Dtype::u8, {rows * s.K * size});
    y = host_tensor(Dtype::u8, {rows * (s.N + 64) * 4});
    w = host_tensor(Dtype::u8, {(s.N + 64) * (s.K + 64) * size});
    scratch = host_tensor(Dtype::u8, {int64_t(pool.threads()) * kScratch});
    std::memset(x.v.data, 0x3c, x.v.bytes());  // 0.01 in either type
    std::memset(w.v.data, 0x3c, w.v.bytes());
    double least = 1e30;
    for (const int64_t n : {64, 128, 256, 512, 1280})
      for (const int64_t m : {128, 256, 512}) {
        if ((n > s.N && n != 64) || (m > rows && m != 128)) continue;
        auto cut = std::make_unique<Cut>(bf16, rows, s.N, s.K, std::min(m, rows), std::min(n, s.N));
        double t = seconds(*cut);
        if (t > 3 * least) continue;
        for (int i = 0; i < 2; ++i) t = std::min(t, seconds(*cut));
        if (t < least) least = t, best = std::move(cut);
      }
  }

  double seconds(const Cut& c) {
    const auto from = std::chrono::steady_clock::now();
    pool.run(c.down * c.across, [&](int64_t task, int worker) {
      omp_set_num_threads(1);
      const int64_t column = task / c.down, row = task % c.down;
      const bool last_column = (column + 1) * c.whole.n > s.N, last_row = (row + 1) * c.whole.m > rows;
      const Block& b = last_column && last_row ? c.corner : last_column ? c.right : last_row ? c.low : c.whole;
      const auto at = [](const Tensor& t, int64_t byte) { return t.v.as<uint8_t>() + byte; };
      const int64_t panel_bytes = int64_t(c.whole.d.weights_desc().get_size());
      dnnl::stream stream(engine());
      b.run.execute(stream,
                    {{DNNL_ARG_SRC, memory(b.d.src_desc(), engine(), at(x, row * c.whole.m * s.K * size))},
                     {DNNL_ARG_WEIGHTS, memory(b.d.weights_desc(), engine(), at(w, column * panel_bytes))},
                     {DNNL_ARG_DST,
                      memory(b.d.dst_desc(), engine(), at(y, (column * c.whole.n * rows + row * c.whole.m * b.n) * 4))},
                     {DNNL_ARG_SCRATCHPAD, memory(b.d.scratchpad_desc(), engine(), at(scratch, worker * kScratch))}});
      stream.wait();
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
  }
};

GemmProbe::GemmProbe(ThreadPool& pool, int64_t rows, const GemmShape& s, Precision precision)
    : impl_(std::make_unique<Impl>(pool, rows, s, precision)) {}
GemmProbe::~GemmProbe() = default;
GemmProbe::GemmProbe(GemmProbe&&) noexcept = default;

double GemmProbe::seconds() { return impl_->seconds(*impl_->best); }

double probe_gemm_flops_per_s(ThreadPool& pool, int64_t rows, std::span<const GemmShape> shapes, int passes) {
  KDA_CHECK(!shapes.empty() && passes > 0, "probe: needs shapes and passes");
  double seconds = 0, flops = 0;
  for (const GemmShape& s : shapes) {
    GemmProbe probe(pool, rows, s);
    std::vector<double> t;
    for (int i = 0; i < passes; ++i) t.push_back(probe.seconds());
    std::sort(t.begin(), t.end());
    seconds += double(s.count) * t[t.size() / 2];
    flops += double(s.count) * 2 * double(rows) * double(s.N) * double(s.K);
  }
  return flops / seconds;
}

}  // namespace kda
