// kernels/cuda/skinny90.cu — picks the instance of skinny_kernel and launches it.
#include "kernels/cuda/skinny90.h"

#include <algorithm>

#include "kernels/cuda/skinny90.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using namespace skinny;

template <int kN, int kGroups>
void launch_skinny(Context& ctx, const Args& a) {
  using S = Shape<kN, kGroups>;
  const auto kernel = skinny_kernel<kN, kGroups>;
  allow_shared(kernel, S::kShared);
  const int blocks = a.splits > 1 ? a.tiles * a.splits : std::min(a.tiles, device_of(ctx).sms);
  launch_early("matvec", ctx, dim3(unsigned(blocks)), dim3(S::kThreads), S::kShared, kernel, a);
}

template <int kGroups>
void launch_skinny(Context& ctx, const Args& a, int columns) {
  switch (columns) {
    case 32: return launch_skinny<32, kGroups>(ctx, a);
    case 64: return launch_skinny<64, kGroups>(ctx, a);
    default: return launch_skinny<128, kGroups>(ctx, a);
  }
}

// Groups of 64 rows of W in a tile of `size` groups, where inputs differ without a tile across two of them.
int groups_of(std::span<const MatmulSegment> segments, bool own, int size) {
  int64_t groups = 0;
  for (const MatmulSegment& s : segments) {
    groups += ceil_div(s.w.w.dim(0), kMatrixRows);
    if (own) groups = ceil_div(groups, size) * size;
  }
  return int(groups);
}

}  // namespace

bool skinny90_takes(const Context& ctx, ConstView x, std::span<const MatmulSegment> segments) {
  if (segments.empty() || segments.size() > size_t(kSkinnyParts)) return false;
  const int64_t R = segments[0].y.dim(0), K = segments[0].w.w.dim(1);
  if (R < kSkinnyMinRows || R > kSkinnyRows || K == 0 || K % 8 || device_of(ctx).sms > int(kTickets)) return false;
  int64_t steps = 0;
  for (const MatmulSegment& s : segments) {
    const ConstView& from = s.x.data ? s.x : x;
    if (s.w.w.dtype != Dtype::bf16 || s.w.w.dim(1) != K || s.w.w.dim(0) == 0 || !aligned(s.w.w.data, 16) ||
        !aligned(from.data, 16) || !s.x.data != !segments[0].x.data || !aligned(s.y.data, 4))
      return false;
    steps += ceil_div(s.w.w.dim(0), kMatrixRows) * ceil_div(K, kDepth);
  }
  return steps < int64_t(1) << 30 && has_sm90a_code(ctx);
}

void skinny90(Context& ctx, SkinnyFinish finish, ConstView x, std::span<const MatmulSegment> segments, void* scratch) {
  Device& device = device_of(ctx);
  const int64_t R = segments[0].y.dim(0), K = segments[0].w.w.dim(1);
  const int columns = R <= 32 ? 32 : R <= 64 ? 64 : 128;
  const bool own = segments[0].x.data;
  // Tiles of two groups, or of three where those leave the last round of blocks less ragged.
  const auto tiles_of = [&](int size) { return int(ceil_div(groups_of(segments, own, size), size)); };
  const auto rounds = [&](int size) { return ceil_div(tiles_of(size), device.sms) * size; };
  const int size = rounds(3) < rounds(2) ? 3 : 2;
  Args a{};
  int groups = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const MatmulSegment& s = segments[i];
    const int64_t N = s.w.w.dim(0);
    if (own || i == 0) a.x[i] = tensor_map(device, own ? s.x.data : x.data, R, K, K, columns);
    a.part[i] = {.w = tensor_map(device, s.w.w.data, N, K, K, kMatrixRows),
                 .y = s.y.data,
                 .N = int(N),
                 .first = groups,
                 .x = own ? int(i) : 0,
                 .f32 = s.y.dtype == Dtype::f32};
    groups = groups_of(segments.first(i + 1), own, size);
  }
  a.parts = int(segments.size());
  a.R = int(R);
  a.tiles = tiles_of(size);
  a.steps = int(ceil_div(K, kDepth));
  // Measured on an H100: half the multiprocessors read as fast as all, so sums are cut only where there are fewer
  // tiles, and into no part of less than 640, which adding up would outweigh.
  const int splits = a.tiles * 9 >= device.sms * 4 ? 1 : std::min(kMaxSplits, device.sms / a.tiles);
  a.splits = std::clamp(int(K / 640), 1, splits);
  a.finish = finish;
  a.partial = static_cast<float*>(scratch);
  a.tickets = device.tickets;
  size == 3 ? launch_skinny<3>(ctx, a, columns) : launch_skinny<2>(ctx, a, columns);
}

size_t skinny90_scratch_bytes(const Context& ctx) {
  return size_t(device_of(ctx).sms) * 3 * kMatrixRows * kSkinnyRows * sizeof(float);
}

}  // namespace kda::cuda
