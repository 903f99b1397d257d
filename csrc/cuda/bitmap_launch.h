// What the launchers of kernels with bitmap weights share. Only <op>.cu files include it.
#pragma once

#include "bitmap_tiles.cuh"
#include "launch.h"

namespace pyfast::cuda {

// Tiles are counted in 32 bits on the device: 2^31 of them are 2^41 elements.
inline constexpr int64_t kMaxTiles = 2147483647;

// The tables of a weight [n, k] on the device of `values`.
inline void check_tables(const Tensor& values, const Tensor& bitmaps, const Tensor& offsets, int64_t n, int64_t k) {
  check_tensor(bitmaps, "bitmaps", 2, values);
  check_tensor(offsets, "offsets", 1, values);
  STD_TORCH_CHECK(n >= 0 && k >= 0, "n and k: must not be negative, got ", n, " and ", k);
  const int64_t tiles = ceil_div(n, kTileRows) * ceil_div(k, kTileColumns);
  STD_TORCH_CHECK(bitmaps.scalar_type() == ScalarType::Long && bitmaps.size(0) == tiles && bitmaps.size(1) == 16,
                  "bitmaps: must be int64 [", tiles, ", 16] for the given shape");
  STD_TORCH_CHECK(tiles <= kMaxTiles, "bitmaps: ", tiles, " tiles, more than ", kMaxTiles, " in one weight");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.size(0) == tiles + 1, "offsets: must be int64 [",
                  tiles + 1, "] for the given shape");
}

// A weight [n, k] as kernels see it; the tables are checked. U may be const.
template <class U>
BitmapWeight<U> bitmap_view(U* values, int64_t stored, const Tensor& bitmaps, const Tensor& offsets, int64_t k) {
  return {values,
          static_cast<const uint32_t*>(bitmaps.const_data_ptr()),
          static_cast<const int64_t*>(offsets.const_data_ptr()),
          stored,
          static_cast<uint32_t>(bitmaps.size(0)),
          static_cast<uint32_t>(ceil_div(k, kTileColumns))};
}

}  // namespace pyfast::cuda
