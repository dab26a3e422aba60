// kernels/cpu/onednn.h — oneDNN's one processor, and a product's description in version 2 (Debian 12) and 3 (Debian
// 13).
#pragma once
#include <oneapi/dnnl/dnnl.hpp>

namespace kda::cpu {

inline const dnnl::engine& engine() {
  static const dnnl::engine e(dnnl::engine::kind::cpu, 0);
  return e;
}

// y = x w. Throws dnnl::error where the library has no such product.
inline dnnl::matmul::primitive_desc describe_matmul(const dnnl::memory::desc& x, const dnnl::memory::desc& w,
                                                    const dnnl::memory::desc& y, const dnnl::primitive_attr& attr) {
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), x, w, y, attr};
#else
  return {{x, w, y}, attr, engine()};
#endif
}

}  // namespace kda::cpu
