// The kernels of csrc/cuda/scattered_linear.cuh on the host, launched as in scattered_linear.cu.
#include "simt.h"

#include "scattered_linear.cuh"
#include "splits.h"

using namespace pyfast::cuda;

namespace {

template <class T, int TokenTiles>
void launch(ScatteredLinearArgs args, unsigned splits, bool cluster) {
  using Plan = ScatteredLinearPlan<TokenTiles>;
  args.split_stages = static_cast<int32_t>(parts(parts(args.tiles_a_row, Plan::kColumnWarps), splits));
  set_token_tiles(args);
  launch_splits<T>({splits, parts(args.out.n, Plan::kRows)}, Plan::kThreads, Plan::kSharedBytes, cluster,
                   scattered_linear_kernel<T, TokenTiles>, args);
}

template <class T>
void choose(const ScatteredLinearArgs& args, unsigned splits, bool cluster) {
  if (args.tokens <= 8)
    launch<T, 1>(args, splits, cluster);
  else if (args.tokens <= 16)
    launch<T, 2>(args, splits, cluster);
  else
    launch<T, 4>(args, splits, cluster);
}

}  // namespace

SIMT_EXPORT scattered_linear(const uint16_t* x, const uint16_t* values, const uint8_t* deltas, const uint32_t* extras,
                             const int32_t* ends, const uint16_t* bias, const uint16_t* mul, uint16_t* y,
                             int64_t tokens, int64_t n, int64_t columns, int64_t activation, int64_t splits,
                             int64_t cluster, int64_t bfloat16) {
  ScatteredLinearArgs args{};
  args.values = values, args.deltas = deltas, args.extras = extras, args.ends = ends;
  args.x = x, args.x_stride = columns;
  args.tokens = static_cast<int32_t>(tokens), args.tiles_a_row = static_cast<int32_t>(columns / kImageColumns);
  args.out = {bias, mul, y, n, static_cast<Activation>(activation)};
  if (bfloat16) {
    choose<BFloat16>(args, static_cast<unsigned>(splits), cluster != 0);
  } else {
    choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);
  }
}

// Shared memory of a launch for up to 8, 16 and 32 tokens.
SIMT_EXPORT scattered_shared_bytes(int32_t* bytes) {
  bytes[0] = ScatteredLinearPlan<1>::kSharedBytes;
  bytes[1] = ScatteredLinearPlan<2>::kSharedBytes;
  bytes[2] = ScatteredLinearPlan<4>::kSharedBytes;
}

// How many blocks share `stages`, by balance_splits and by count_splits with so many blocks resident.
SIMT_EXPORT count_blocks(int64_t* splits, int64_t row_blocks, int64_t stages, int64_t multiprocessors,
                         int64_t resident) {
  splits[0] = balance_splits(row_blocks, stages, multiprocessors);
  splits[1] = count_splits(row_blocks, stages, resident);
}
