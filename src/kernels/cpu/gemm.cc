#include "kernels/cpu/gemm.h"

#include <omp.h>

#include <map>
#include <mutex>
#include <string_view>

#include "kernels/cpu/matmul.h"

namespace kda::cpu {

namespace {
using dnnl::memory;

bool has_isa(dnnl::cpu_isa isa) { return (int(dnnl::get_effective_cpu_isa()) & int(isa)) == int(isa); }

// Throws dnnl::error where the library has no generated code for it; it would fall back on plain loops.
Gemm make_gemm(const GemmKey& k) {
  const auto type = k.kind == Kind::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  const auto panels = k.kind == Kind::bf16  ? memory::format_tag::BA16a64b2a
                      : k.kind == Kind::f32 ? memory::format_tag::BA16a64b
                                            : memory::format_tag::ab;  // the same bytes: a panel is 64 columns
  const memory::desc x({k.rows, k.K}, type, memory::format_tag::ab);
  const memory::desc w({k.K, k.columns}, type, panels);
  const memory::desc y({k.rows, k.columns}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // the library's own is not for several threads
  if (k.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attr.set_post_ops(sum);
  }
  const dnnl::matmul::primitive_desc d = describe_matmul(x, w, y, attr);
  if (k.kind != Kind::f32_plain && std::string_view(d.impl_info_str()).starts_with("ref"))
    throw dnnl::error(dnnl_unimplemented, "only plain loops");
  return {dnnl::matmul(d), x, w, y, d.scratchpad_desc()};
}

bool can(Kind kind) {
  try {
    make_gemm({kind, 48, kStep, kPanel});
    return true;
  } catch (const dnnl::error&) {
    return false;
  }
}
}  // namespace

bool cpu_has_amx() {
  static const bool has = has_isa(dnnl::cpu_isa::avx512_core_amx);
  return has;
}

bool cpu_has_bf16() {
  static const bool has = has_isa(dnnl::cpu_isa::avx512_core_bf16) && can(Kind::bf16);
  return has;
}

Kind f32_kind() {
  static const bool blocks = can(Kind::f32);
  return blocks ? Kind::f32 : Kind::f32_plain;
}

Kind kind_for(Precision p, Dtype weights) {
  const bool exact_in_bf16 = weights == Dtype::bf16 || weights == Dtype::i8;
  return p == Precision::fast && exact_in_bf16 && cpu_has_bf16() ? Kind::bf16 : f32_kind();
}

// Kept, since making one costs about as much as the product of a short prompt.
const Gemm& gemm(const GemmKey& k) {
  static std::mutex mutex;
  static std::map<GemmKey, Gemm> cache;
  const std::lock_guard lock(mutex);
  auto it = cache.find(k);
  if (it == cache.end()) {
    try {
      it = cache.emplace(k, make_gemm(k)).first;
    } catch (const dnnl::error& e) {
      throw Error(cat("matmul: oneDNN has no product [", k.rows, ",", k.K, "] x [", k.K, ",", k.columns, "] in ",
                      k.kind == Kind::bf16 ? "bf16" : "f32", ": ", e.message));
    }
  }
  return it->second;
}

void run_gemm(const Gemm& g, const void* x, const void* w, void* y, void* scratchpad) {
  omp_set_num_threads(1);  // this thread's setting: oneDNN must not start a pool of its own
  const auto at = [](const memory::desc& d, const void* p) { return memory(d, engine(), const_cast<void*>(p)); };
  dnnl::stream stream(engine());
  g.run.execute(stream, {{DNNL_ARG_SRC, at(g.x, x)},
                         {DNNL_ARG_WEIGHTS, at(g.w, w)},
                         {DNNL_ARG_DST, at(g.y, y)},
                         {DNNL_ARG_SCRATCHPAD, at(g.scratchpad, scratchpad)}});
  stream.wait();
}

}  // namespace kda::cpu
