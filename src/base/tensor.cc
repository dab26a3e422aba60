#include "base/tensor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace kda {

Tensor host_tensor(Dtype dtype, Shape shape) {
  for (int i = 0; i < shape.rank; ++i) KDA_CHECK(shape[i] >= 0, "host_tensor: negative size in ", shape);
  constexpr size_t kHuge = size_t(2) << 20;
  const size_t bytes = std::max<size_t>(size_t(shape.size()) * size_of(dtype), 1);
  const size_t align = bytes >= 2 * kHuge ? kHuge : 64;
  const size_t padded = (bytes + align - 1) / align * align;
  void* p = std::aligned_alloc(align, padded);
  KDA_CHECK(p, "out of memory: ", padded, " bytes for a tensor ", shape, " of ", name_of(dtype));
  if (align == kHuge) madvise(p, padded, MADV_HUGEPAGE);
  std::memset(p, 0, bytes);
  return {std::shared_ptr<void>(p, std::free), View{p, dtype, shape}};
}

}  // namespace kda
