// Launches of products whose columns blocks share, as launch_splits in csrc/cuda/split_launch.h makes them. A driver
// includes it behind simt.h.
#pragma once

#include "split_count.h"
#include "split_sums.cuh"

namespace pyfast::cuda {

inline unsigned parts(int64_t all, int64_t one) { return static_cast<unsigned>(ceil_div(all, one)); }

// grid: splits, blocks of rows, blocks of tokens. Args holds tokens, out, partial.
template <class T, class Args, class Kernel>
void launch_splits(simt::Dim3 grid, unsigned threads, int shared_bytes, bool cluster, Kernel kernel, Args args) {
  const bool two_kernels = grid.x > 1 && !cluster;
  if (two_kernels) {
    const int64_t sums = int64_t{grid.x} * args.tokens * args.out.n;
    args.partial = static_cast<float*>(simt::scratch(static_cast<size_t>(sums) * sizeof(float)));
  }
  simt::launch({grid, {threads}, cluster ? grid.x : 1, static_cast<size_t>(shared_bytes)}, kernel, args);
  if (two_kernels)
    simt::launch({{parts(args.out.n, 256), static_cast<unsigned>(args.tokens)}, {256}}, reduce_splits_kernel<T>,
                 args.out, args.partial, static_cast<int>(grid.x));
}

}  // namespace pyfast::cuda
