#include "kernels/backend.h"

#include <algorithm>

namespace kda {

int64_t Packing::longest() const {
  int64_t most = 0;
  for (int64_t n = 0; n < N(); ++n) most = std::max<int64_t>(most, host_start[size_t(n) + 1] - host_start[size_t(n)]);
  return most;
}

void* workspace(Context& ctx, size_t bytes, const char* op) {
  KDA_CHECK(!bytes || (ctx.workspace && ctx.workspace.v.bytes() >= bytes), op, ": needs a workspace of ", bytes,
            " bytes, the context has ", ctx.workspace ? ctx.workspace.v.bytes() : 0);
  return ctx.workspace.v.data;
}

}  // namespace kda
