// The kernels of csrc/cuda/sparse24_linear.cuh on the host, launched as in sparse24_linear.cu.
#include "simt.h"

#include "sparse24_linear.cuh"
#include "splits.h"

using namespace pyfast::cuda;

namespace {

template <class T, int TokenTiles>
void launch(Sparse24LinearArgs args, unsigned splits, bool cluster) {
  using Plan = Sparse24Plan<TokenTiles>;
  const unsigned stages = parts(parts(args.padded_k, Plan::kColumns), splits);
  args.split_columns = static_cast<int32_t>(stages) * Plan::kColumns;
  launch_splits<T>({splits, parts(args.n, Plan::kRows), parts(args.tokens, Plan::kTokens)}, Plan::kThreads,
                   Plan::kSharedBytes, cluster, sparse24_linear_kernel<T, TokenTiles>, args);
}

template <class T>
void choose(const Sparse24LinearArgs& args, unsigned splits, bool cluster) {
  if (args.tokens <= 8)
    launch<T, 1>(args, splits, cluster);
  else if (args.tokens <= 16)
    launch<T, 2>(args, splits, cluster);
  else if (args.tokens <= 32)
    launch<T, 4>(args, splits, cluster);
  else if (args.tokens <= 64)
    launch<T, 8>(args, splits, cluster);
  else
    launch<T, 16>(args, splits, cluster);
}

}  // namespace

SIMT_EXPORT sparse24_linear(const uint16_t* x, const uint16_t* values, const uint16_t* metadata, const uint16_t* bias,
                            const uint16_t* mul, uint16_t* y, int64_t tokens, int64_t n, int64_t k, int64_t padded_k,
                            int64_t activation, int64_t splits, int64_t cluster, int64_t bfloat16) {
  Sparse24LinearArgs args{};
  args.x = x, args.values = values, args.metadata = metadata;
  args.out = {bias, mul, y, n, static_cast<Activation>(activation)};
  args.n = n, args.x_stride = k;
  args.tokens = static_cast<int32_t>(tokens), args.k = static_cast<int32_t>(k);
  args.padded_k = static_cast<int32_t>(padded_k);
  args.wide_metadata = padded_k % 128 == 0;
  if (bfloat16) {
    choose<BFloat16>(args, static_cast<unsigned>(splits), cluster != 0);
  } else {
    choose<Float16>(args, static_cast<unsigned>(splits), cluster != 0);
  }
}

// Shared memory of a launch, by token tiles: bytes[0 … 4] for 1, 2, 4, 8 and 16.
SIMT_EXPORT sparse24_shared_bytes(int32_t* bytes) {
  bytes[0] = Sparse24Plan<1>::kSharedBytes, bytes[1] = Sparse24Plan<2>::kSharedBytes;
  bytes[2] = Sparse24Plan<4>::kSharedBytes, bytes[3] = Sparse24Plan<8>::kSharedBytes;
  bytes[4] = Sparse24Plan<16>::kSharedBytes;
}
