// kernels/cuda/skinny90.cu — picks the instance of skinny_kernel and launches it.
#include "kernels/cuda/skinny90.h"

#include <algorithm>

#include "kernels/cuda/skinny90.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vec.h"

namespace kda::cuda {

namespace {

using namespace skinny;

template <int kN, int kGroups, bool kEight>
void launch_skinny(Context& ctx, const Args& a) {
  using S = Shape<kN, kGroups, kEight>;
  const auto kernel = skinny_kernel<kN, kGroups, kEight>;
  allow_shared(kernel, S::kShared);
  const int blocks = a.splits > 1 ? a.tiles * a.splits : std::min(a.tiles, device_of(ctx).sms);
  launch_early("matvec", ctx, dim3(unsigned(blocks)), dim3(S::kThreads), S::kShared, kernel, a);
}

template <int kGroups, bool kEight>
void launch_skinny(Context& ctx, const Args& a, int columns) {
  switch (columns) {
    case 16:
      if constexpr (kEight) return launch_skinny<16, kGroups, kEight>(ctx, a);
      [[fallthrough]];
    case 32: return launch_skinny<32, kGroups, kEight>(ctx, a);
    case 64: return launch_skinny<64, kGroups, kEight>(ctx, a);
    default: return launch_skinny<128, kGroups, kEight>(ctx, a);
  }
}

bool has_eight(std::span<const MatmulSegment> segments) {
  return std::any_of(segments.begin(), segments.end(),
                     [](const MatmulSegment& s) { return s.w.w.dtype != Dtype::bf16; });
}

// Where segments begin among the groups of 64 rows of W, in tiles of `size` groups, and how many tiles there are. No
// tile has two inputs, and those of bf16 among such of 8 bits have one group each.
struct Layout {
  int first[kParts], tiles;

  Layout(std::span<const MatmulSegment> segments, int size) {
    const bool own = segments[0].x.data, eight = has_eight(segments);
    int64_t groups = 0;
    const auto whole_tiles = [&] { groups = ceil_div(groups, size) * size; };
    for (size_t i = 0; i < segments.size(); ++i) {
      const MatmulSegment& s = segments[i];
      const bool wide = eight && s.w.w.dtype == Dtype::bf16;
      if (wide || own) whole_tiles();
      first[i] = int(groups);
      groups += ceil_div(s.w.w.dim(0), kMatrixRows) * (wide ? size : 1);
    }
    tiles = int(ceil_div(groups, size));
  }
};

Weight weight_of(Dtype d) { return d == Dtype::bf16 ? Weight::bf16 : d == Dtype::i8 ? Weight::i8 : Weight::f8; }

// R rows from row `from` on.
void launch_rows(Context& ctx, SkinnyFinish finish, ConstView x, std::span<const MatmulSegment> segments, void* scratch,
                 int64_t from, int64_t R) {
  Device& device = device_of(ctx);
  const int64_t K = segments[0].w.w.dim(1);
  const bool own = segments[0].x.data, eight = has_eight(segments);
  const int columns = R <= 16 && eight ? 16 : R <= 32 ? 32 : R <= 64 ? 64 : 128;
  // Tiles of two groups, or of three where those leave the last round of blocks less ragged.
  const auto rounds = [&](int size) { return ceil_div(Layout(segments, size).tiles, device.sms) * size; };
  const int size = rounds(3) < rounds(2) ? 3 : 2;
  const Layout layout(segments, size);
  Args a{};
  for (size_t i = 0; i < segments.size(); ++i) {
    const MatmulSegment& s = segments[i];
    const int64_t N = s.w.w.dim(0);
    if (own || i == 0) a.x[i] = tensor_map(device, bf16_of(own ? s.x : x) + from * K, R, K, K, columns);
    a.part[i] = {.w = tensor_map(device, s.w.w.data, N, K, K, kMatrixRows, int(size_of(s.w.w.dtype))),
                 .y = static_cast<char*>(s.y.data) + from * N * int64_t(size_of(s.y.dtype)),
                 .scale = s.w.scale.data ? s.w.scale.as<float>() : nullptr,
                 .N = int(N),
                 .first = layout.first[i],
                 .x = own ? int(i) : 0,
                 .weight = weight_of(s.w.w.dtype),
                 .f32 = s.y.dtype == Dtype::f32};
  }
  a.parts = int(segments.size());
  a.R = int(R);
  a.tiles = layout.tiles;
  a.steps = int(ceil_div(K, eight ? 2 * kBoxDepth : kBoxDepth));
  // Measured on an H100: half the multiprocessors read as fast as all, so sums are cut only where there are fewer
  // tiles, and into no part of less than 640, which adding up would outweigh.
  const int splits = a.tiles * 9 >= device.sms * 4 ? 1 : std::min(kMaxSplits, device.sms / a.tiles);
  a.splits = std::clamp(int(K / 640), 1, splits);
  a.finish = finish;
  a.partial = static_cast<float*>(scratch);
  a.tickets = device.tickets;
  if (eight)
    size == 3 ? launch_skinny<3, true>(ctx, a, columns) : launch_skinny<2, true>(ctx, a, columns);
  else
    size == 3 ? launch_skinny<3, false>(ctx, a, columns) : launch_skinny<2, false>(ctx, a, columns);
}

}  // namespace

bool skinny90_takes(const Context& ctx, ConstView x, std::span<const MatmulSegment> segments) {
  if (segments.empty() || segments.size() > size_t(kSkinnyParts)) return false;
  const int64_t R = segments[0].y.dim(0), K = segments[0].w.w.dim(1);
  const bool eight = has_eight(segments);
  if (R < kSkinnyMinRows || (R > kSkinnyRows && !eight) || K == 0 || K % (eight ? 16 : 8) ||
      device_of(ctx).sms > int(kTickets))
    return false;
  int64_t steps = 0;
  for (const MatmulSegment& s : segments) {
    const ConstView& from = s.x.data ? s.x : x;
    if (s.w.w.dim(1) != K || s.w.w.dim(0) == 0 || !aligned(s.w.w.data, 16) || !aligned(from.data, 16) ||
        !s.x.data != !segments[0].x.data || !aligned(s.y.data, 4))
      return false;
    steps += ceil_div(s.w.w.dim(0), kMatrixRows) * ceil_div(K, kBoxDepth);
  }
  return steps < int64_t(1) << 28 && has_sm90a_code(ctx);
}

void skinny90(Context& ctx, SkinnyFinish finish, ConstView x, std::span<const MatmulSegment> segments, void* scratch) {
  const int64_t R = segments[0].y.dim(0);
  for (int64_t from = 0; from < R; from += kSkinnyRows)
    launch_rows(ctx, finish, x, segments, scratch, from, std::min<int64_t>(kSkinnyRows, R - from));
}

size_t skinny90_scratch_bytes(const Context& ctx) {
  return size_t(device_of(ctx).sms) * 3 * kMatrixRows * kSkinnyRows * sizeof(float);
}

}  // namespace kda::cuda
