// kernels/cpu/tail-inl.h — the last, partial vector of a row. Included once for each of Highway's targets.
#if defined(KDA_KERNELS_CPU_TAIL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KDA_KERNELS_CPU_TAIL_INL_H_
#undef KDA_KERNELS_CPU_TAIL_INL_H_
#else
#define KDA_KERNELS_CPU_TAIL_INL_H_
#endif

#include <cstring>

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace kda::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// n < Lanes(d) values, the rest of the vector zero. Nothing past p[n-1] is read.
template <class D>
HWY_INLINE hn::Vec<D> load_tail(D d, const float* p, size_t n) {
  HWY_ALIGN float lane[hn::MaxLanes(D())] = {};
  std::memcpy(lane, p, n * sizeof(float));
  return hn::Load(d, lane);
}

template <class D>
HWY_INLINE void store_tail(D d, hn::Vec<D> v, float* p, size_t n) {
  HWY_ALIGN float lane[hn::MaxLanes(D())];
  hn::Store(v, d, lane);
  std::memcpy(p, lane, n * sizeof(float));
}

}  // namespace kda::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
