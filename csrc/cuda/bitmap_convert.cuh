// bitmap_convert on the GPU: the bitmap form back to dense rows.
//
//   bitmaps [tiles, 16]  64 bits for each row of a tile of 16 rows × 64 columns, bit c for column c
//   values  [stored]     U, in the order of tiles, rows and columns
//   offsets [tiles + 1]  where the values of each tile begin
//   dense   [n, k]
//
// Moves stored·sizeof(U) + n·k/8 bytes in and n·k·sizeof(U) out, nothing twice: bound by memory.
//
// One warp does one tile. A lane owns 32 bits, half a row, counts them, and a scan over the warp tells each lane where
// its values begin. The tile's values pass through shared memory, so that they are read side by side and found in any
// order.
//
// Damaged tables give wrong values but no access outside the tensors.
#pragma once

#include "common.cuh"

namespace pyfast::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 64;
inline constexpr int kTileElements = kTileRows * kTileColumns;

template <class U>
struct BitmapWeight {
  const U* values;
  const uint32_t* bitmaps;  // [tiles, 32]: the 64-bit words as halves, lower half first
  const int64_t* offsets;
  int64_t stored;        // number of values
  uint32_t tiles;        // in all
  uint32_t tiles_a_row;  // ceil(columns / 64)
};

// Where in the dense matrix the bits of a lane lie: 32 columns of `row` from `column` on.
struct BitmapPlace {
  int64_t row, column;
};

PYFAST_HOST_DEVICE BitmapPlace bitmap_place(uint32_t tile, uint32_t tiles_a_row, int lane) {
  const int64_t tile_row = tile / tiles_a_row;
  const int64_t tile_column = tile % tiles_a_row;
  return {tile_row * kTileRows + lane / 2, tile_column * kTileColumns + lane % 2 * 32};
}

// Values of the tile that may be read: `count` of them, unless the tables point outside the tensor.
PYFAST_HOST_DEVICE int bitmap_readable(int64_t begin, int count, int64_t stored) {
  if (begin < 0 || begin >= stored) return 0;
  return stored - begin < count ? static_cast<int>(stored - begin) : count;
}

// Writes a lane's half row. `tile_values` are the tile's values, the lane's begin at `next`.
template <class U>
PYFAST_HOST_DEVICE void bitmap_expand(const Dense<U>& dense, const BitmapPlace& place, uint32_t bits,
                                      const U* tile_values, int next) {
  PYFAST_UNROLL
  for (int first = 0; first < 32; first += kPackColumns<U>) {
    Pack<U> pack;
    PYFAST_UNROLL
    for (int column = 0; column < kPackColumns<U>; ++column) {
      const bool present = bits >> (first + column) & 1u;
      pack.element[column] = present ? tile_values[next] : U{0};
      next += present;
    }
    store_pack(dense, place.row, place.column + first, pack);
  }
}

#if defined(__CUDACC__)

inline constexpr int kBitmapWarps = 4;

template <class U>
__global__ void __launch_bounds__(32 * kBitmapWarps)
    bitmap_decompress_kernel(const BitmapWeight<U> weight, const Dense<U> dense) {
  __shared__ U staged[kBitmapWarps][kTileElements];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t tile = blockIdx.x * kBitmapWarps + static_cast<uint32_t>(warp);
  if (tile >= weight.tiles) return;

  const uint32_t bits = weight.bitmaps[static_cast<int64_t>(tile) * 32 + lane];
  const int64_t begin = weight.offsets[tile];
  const int own = __popc(bits);
  int up_to = own;  // inclusive scan
  PYFAST_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, up_to, distance);
    if (lane >= distance) up_to += below;
  }
  const int count = __shfl_sync(0xffffffffu, up_to, 31);
  const int readable = bitmap_readable(begin, count, weight.stored);
#pragma unroll 4
  for (int i = lane; i < count; i += 32) staged[warp][i] = i < readable ? weight.values[begin + i] : U{0};
  __syncwarp();

  bitmap_expand(dense, bitmap_place(tile, weight.tiles_a_row, lane), bits, staged[warp], up_to - own);
}

#endif

}  // namespace pyfast::cuda
