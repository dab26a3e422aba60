// kernels/cpu/flush.h — while one lives, this thread rounds results below 1.2e-38 to zero. Products of many decays get
// there, no result is visible at that size, and such numbers cost a hundred cycles each on some CPUs.
#pragma once
#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace kda::cpu {

class FlushTiny {
 public:
#if defined(__SSE__) || defined(_M_X64)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }  // flush results, read inputs as zero
  ~FlushTiny() { _mm_setcsr(before_); }
#else
  FlushTiny() {}
  ~FlushTiny() {}
#endif
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;

 private:
  [[maybe_unused]] unsigned before_ = 0;
};

}  // namespace kda::cpu
