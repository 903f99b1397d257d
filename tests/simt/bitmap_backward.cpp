// The kernels of csrc/cuda/bitmap_backward.cuh on the host, launched as in bitmap_backward.cu.
#include "simt.h"

#include "bitmap_backward.cuh"
#include "splits.h"

using namespace pyfast::cuda;

namespace {

template <class T, int TokenTiles>
void grad_x(BitmapLinearArgs args, unsigned splits, bool cluster) {
  using Plan = BitmapGradXPlan<TokenTiles>;
  const unsigned stages = parts(args.weight.tiles / args.weight.tiles_a_row, Plan::kStageTiles);
  args.split_stages = static_cast<int32_t>(parts(stages, splits));
  set_token_tiles(args);
  launch_splits<T>({splits, parts(args.out.n, Plan::kColumns)}, Plan::kThreads, Plan::kSharedBytes, cluster,
                   bitmap_grad_x_kernel<T, TokenTiles>, args);
}

template <class T>
void choose(const BitmapLinearArgs& args, unsigned splits, bool cluster) {
  if (args.tokens <= 8)
    grad_x<T, 1>(args, splits, cluster);
  else
    grad_x<T, 4>(args, splits, cluster);
}

}  // namespace

// grad [tokens, stride] with n columns that count, W [n, k].
SIMT_EXPORT bitmap_grad_x(const uint16_t* grad, const uint16_t* values, const uint32_t* bitmaps, const int64_t* offsets,
                          uint16_t* out, int64_t tokens, int64_t n, int64_t stride, int64_t k, int64_t stored,
                          int64_t splits, int64_t cluster, int64_t bfloat16) {
  BitmapLinearArgs args{};
  const uint32_t across = parts(k, kTileColumns);
  args.weight = {values, bitmaps, offsets, stored, across * parts(n, kTileRows), across};
  args.x = grad, args.x_stride = stride;
  args.tokens = static_cast<int32_t>(tokens), args.k = static_cast<int32_t>(stride);
  args.out = {nullptr, nullptr, out, k, Activation::none};
  if (bfloat16) {
    choose<BFloat16>(args, static_cast<unsigned>(splits), cluster != 0);
  } else {
    choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);
  }
}

SIMT_EXPORT bitmap_grad_values(const uint16_t* grad, const uint16_t* x, const uint32_t* bitmaps, const int64_t* offsets,
                               uint16_t* values, int64_t tokens, int64_t n, int64_t grad_stride, int64_t k,
                               int64_t x_stride, int64_t stored, int64_t bfloat16) {
  const uint32_t across = parts(k, kTileColumns);
  const GradValuesOperands operands{
      grad, x, grad_stride, x_stride, tokens, static_cast<int32_t>(grad_stride), static_cast<int32_t>(x_stride)};
  const BitmapGradValuesArgs args{operands, {values, bitmaps, offsets, stored, across * parts(n, kTileRows), across}};
  using Plan = GradValuesPlan;
  simt::launch({{parts(k, Plan::kColumns), parts(n, Plan::kRows)}, {Plan::kThreads}, 1, Plan::kSharedBytes},
               bfloat16 ? bitmap_grad_values_kernel<BFloat16> : bitmap_grad_values_kernel<Float16>, args);
}

// Shared memory of a launch: grad_x of 1 and 4 token tiles, and grad_values.
SIMT_EXPORT bitmap_backward_shared_bytes(int32_t* bytes) {
  bytes[0] = BitmapGradXPlan<1>::kSharedBytes;
  bytes[1] = BitmapGradXPlan<4>::kSharedBytes;
  bytes[2] = GradValuesPlan::kSharedBytes;
}
