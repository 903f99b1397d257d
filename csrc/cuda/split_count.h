// How many blocks share the columns of a product, by arithmetic alone: no torch and no CUDA here.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "common.cuh"

namespace pyfast::cuda {

inline constexpr int64_t kClusterBlocks = 8;  // the largest cluster that every device grants

using Residents = std::array<int64_t, kClusterBlocks + 1>;  // blocks that run at once, by those of a cluster

// How many blocks share the `stages` of a row of `row_blocks`, when residents[splits] blocks run at once: the number
// that ends first, a block taking its stages and about three more to begin and end.
inline int64_t count_splits(int64_t row_blocks, int64_t stages, const Residents& residents) {
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(kClusterBlocks, stages / 2)); ++splits) {
    const int64_t waves = ceil_div(row_blocks * splits, residents[static_cast<size_t>(splits)]);
    const int64_t time = waves * (ceil_div(stages, splits) + 3);
    if (splits > 1 && time >= least) continue;
    best = splits;
    least = time;
  }
  return best;
}

inline int64_t count_splits(int64_t row_blocks, int64_t stages, int64_t resident) {
  Residents residents;
  residents.fill(resident);
  return count_splits(row_blocks, stages, residents);
}

// The same for a kernel that its multiprocessor's shared memory holds up, and not its own latency: blocks beyond those
// that run at once cost nothing but their own time, and the busiest multiprocessor decides. A block takes its stages
// and half a one more; fewer than four of them on a multiprocessor do not keep it busy: estimates, not measured yet.
inline int64_t balance_splits(int64_t row_blocks, int64_t stages, int64_t multiprocessors) {
  constexpr std::array<int64_t, 5> kPercent{0, 200, 125, 107, 100};
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(kClusterBlocks, stages)); ++splits) {
    const int64_t blocks = ceil_div(row_blocks * splits, multiprocessors);
    const int64_t time = blocks * (2 * ceil_div(stages, splits) + 1) * kPercent[std::min<size_t>(4, blocks)];
    if (splits > 1 && time >= least) continue;
    best = splits;
    least = time;
  }
  return best;
}

}  // namespace pyfast::cuda
