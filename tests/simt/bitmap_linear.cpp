// The kernels of csrc/cuda/bitmap_linear.cuh and bitmap_vector.cuh on the host, launched as in bitmap_linear.cu.
#include "simt.h"

#include "bitmap_vector.cuh"
#include "splits.h"

using namespace pyfast::cuda;

namespace {

template <class T, class Plan, class Kernel>
void launch(const BitmapLinearArgs& args, Kernel kernel, int shared_bytes, unsigned splits, bool cluster) {
  launch_splits<T>({splits, parts(args.out.n, Plan::kRows)}, Plan::kThreads, shared_bytes, cluster, kernel, args);
}

template <class T, int TokenTiles>
void matrix(BitmapLinearArgs args, unsigned splits, bool cluster) {
  using Plan = BitmapLinearPlan<TokenTiles>;
  args.split_stages = static_cast<int32_t>(parts(parts(args.weight.tiles_a_row, Plan::kStageTiles), splits));
  set_token_tiles(args);
  launch<T, Plan>(args, bitmap_linear_kernel<T, TokenTiles>, Plan::kSharedBytes, splits, cluster);
}

template <class T, int Tokens>
void vector(BitmapLinearArgs args, unsigned splits, bool cluster) {
  using Plan = BitmapVectorPlan<Tokens>;
  args.split_stages = static_cast<int32_t>(parts(parts(args.weight.tiles_a_row, Plan::kColumnTiles), splits));
  const int shared_bytes = Plan::shared_bytes(args.room, args.split_stages);
  launch<T, Plan>(args, bitmap_vector_kernel<T, Tokens>, shared_bytes, splits, cluster);
}

template <class T>
void choose(const BitmapLinearArgs& args, unsigned splits, bool cluster) {
  if (args.tokens == 1)
    vector<T, 1>(args, splits, cluster);
  else if (args.tokens == 2)
    vector<T, 2>(args, splits, cluster);
  else if (args.tokens <= 4)
    vector<T, 4>(args, splits, cluster);
  else if (args.tokens <= 8)
    matrix<T, 1>(args, splits, cluster);
  else if (args.tokens <= 16)
    matrix<T, 2>(args, splits, cluster);
  else if (args.tokens <= 32)
    matrix<T, 4>(args, splits, cluster);
  else
    matrix<T, 8>(args, splits, cluster);
}

}  // namespace

SIMT_EXPORT bitmap_linear(const uint16_t* x, const uint16_t* values, const uint32_t* bitmaps, const int64_t* offsets,
                          const uint16_t* bias, const uint16_t* mul, uint16_t* y, int64_t tokens, int64_t n, int64_t k,
                          int64_t width, int64_t stored, int64_t mean, int64_t activation, int64_t splits,
                          int64_t cluster, int64_t bfloat16) {
  const int64_t across = (k + kTileColumns - 1) / kTileColumns, down = (n + kTileRows - 1) / kTileRows;
  BitmapLinearArgs args{};
  args.weight = {values, bitmaps, offsets, stored, static_cast<uint32_t>(across * down), static_cast<uint32_t>(across)};
  args.x = x, args.x_stride = width;
  args.tokens = static_cast<int32_t>(tokens), args.k = static_cast<int32_t>(width);
  args.room = bitmap_room(mean);
  args.out = {bias, mul, y, n, static_cast<Activation>(activation)};
  if (bfloat16) {
    choose<BFloat16>(args, static_cast<unsigned>(splits), cluster != 0);
  } else {
    choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);
  }
}

// Shared memory of a launch at `mean` values a tile and `stages` of x: the kernels of 1, 2, 4 and 8 token tiles, then
// those of 1, 2 and 4 tokens.
SIMT_EXPORT bitmap_shared_bytes(int32_t* bytes, int64_t mean, int64_t stages) {
  const int room = bitmap_room(mean), split_stages = static_cast<int>(stages);
  bytes[0] = BitmapLinearPlan<1>::kSharedBytes;
  bytes[1] = BitmapLinearPlan<2>::kSharedBytes;
  bytes[2] = BitmapLinearPlan<4>::kSharedBytes;
  bytes[3] = BitmapLinearPlan<8>::kSharedBytes;
  bytes[4] = BitmapVectorPlan<1>::shared_bytes(room, split_stages);
  bytes[5] = BitmapVectorPlan<2>::shared_bytes(room, split_stages);
  bytes[6] = BitmapVectorPlan<4>::shared_bytes(room, split_stages);
}
