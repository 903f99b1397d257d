// The bitmap form on the GPU, as every kernel of it sees it. csrc/cpu/bitmap_linear.h has the picture.
//
//   bitmaps [tiles, 16]  64 bits for each row of a tile of 16 rows × 64 columns, bit c for column c
//   values  [stored]     U, in the order of tiles, rows and columns
//   offsets [tiles + 1]  where the values of each tile begin
//
// Lane order is storage order, whatever a lane owns: its half rows as 32-bit words (lane l: row l / 2, columns
// 32·(l % 2) … + 31) or two quarter rows of 16 bits (lane 4g + t: columns 16t … 16t + 15 of the rows g and g + 8).
// One scan over the warp therefore tells each lane where its values begin, and they lie side by side.
#pragma once

#include "common.cuh"

namespace pyfast::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 64;
inline constexpr int kTileElements = kTileRows * kTileColumns;

template <class U>
struct BitmapWeight {
  U* values;                // U is const where the kernel reads them
  const uint32_t* bitmaps;  // [tiles, 32]: the 64-bit words as halves, lower half first
  const int64_t* offsets;
  int64_t stored;        // number of values
  uint32_t tiles;        // in all
  uint32_t tiles_a_row;  // ceil(columns / 64)
};

// Values of a tile that may be read: `count` of them, unless the tables point outside the tensor.
PYFAST_HOST_DEVICE int bitmap_readable(int64_t begin, int count, int64_t stored) {
  if (begin < 0 || begin >= stored) return 0;
  return stored - begin < count ? static_cast<int>(stored - begin) : count;
}

#if defined(PYFAST_KERNELS)

// [warp] The sum of `count` over the lanes up to and including this one.
PYFAST_DEVICE uint32_t inclusive_scan(uint32_t count) {
  count = ptx::add_from_below<1>(count);
  count = ptx::add_from_below<2>(count);
  count = ptx::add_from_below<4>(count);
  count = ptx::add_from_below<8>(count);
  return ptx::add_from_below<16>(count);
}

// The chunk of 16 bytes that the end of the values cuts: its first `bytes`, and zeros behind them. Not by cp.async,
// which reads all 16 whatever source size it is given.
PYFAST_DEVICE void copy_last_chunk(unsigned char* to, const unsigned char* from, int bytes) {
  *reinterpret_cast<Words4*>(to) = Words4{};
  PYFAST_UNROLL_NOT
  for (; bytes > 0; bytes -= 2, to += 2, from += 2)
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
}

#endif

}  // namespace pyfast::cuda
