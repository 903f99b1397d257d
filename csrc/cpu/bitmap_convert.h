// bitmap_convert: dense rows to and from the bitmap form of bitmap_linear.h. Portable code: a conversion reads and
// writes every element once and is near the speed of memory without vector instructions.
//
// An element is stored where its bits are not those of +0.0: −0.0, subnormals and NaN survive, and to_dense gives
// back the same bits. Elements are moved as integers of their size.
#pragma once

#include <cstdint>

#include "bitmap_linear.h"

namespace pyfast {

struct BitmapConvertArgs {
  int64_t n, k;          // of the dense matrix
  int64_t dense_stride;  // elements between dense rows
  int64_t tiles;         // tiles in a row of tiles: ceil(k / 64)
};

// Bitmaps of tile rows [begin, end) and the number of stored values of each tile into counts.
template <class U>
void bitmap_scan(const BitmapConvertArgs& a, const U* dense, uint64_t* bitmaps, int64_t* counts, int64_t begin,
                 int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    for (int64_t tile = 0; tile < a.tiles; ++tile) {
      const int64_t at = tile_row * a.tiles + tile, left = a.k - tile * kTileColumns;
      const int columns = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
      int64_t count = 0;
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = tile_row * kTileRows + r;
        uint64_t bits = 0;
        if (row < a.n) {
          const U* p = dense + row * a.dense_stride + tile * kTileColumns;
          int c = 0;
          for (; c + 8 <= columns; c += 8)
            for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(p[c + i] != 0) << (c + i);
          for (; c < columns; ++c) bits |= static_cast<uint64_t>(p[c] != 0) << c;
        }
        bitmaps[at * kTileRows + r] = bits;
        count += __builtin_popcountll(bits);
      }
      counts[at] = count;
    }
  }
}

// Calls visit(dense row, dense column, position in values) for every stored element of tile rows [begin, end). A bit
// in the padding names an element outside the matrix: visitors must not follow it.
template <class Visit>
void for_each_stored(const BitmapConvertArgs& a, const uint64_t* bitmaps, const int64_t* offsets, int64_t begin,
                     int64_t end, Visit visit) {
  for (int64_t at = begin * a.tiles; at < end * a.tiles; ++at) {
    const int64_t row = at / a.tiles * kTileRows, column = at % a.tiles * kTileColumns;
    int64_t position = offsets[at];
    for (int r = 0; r < kTileRows; ++r)
      for (uint64_t bits = bitmaps[at * kTileRows + r]; bits != 0; bits &= bits - 1)
        visit(row + r, column + __builtin_ctzll(bits), position++);
  }
}

// values of the stored elements, taken from dense (whatever they are there).
template <class U>
void bitmap_gather(const BitmapConvertArgs& a, const U* dense, const uint64_t* bitmaps, const int64_t* offsets,
                   U* values, int64_t begin, int64_t end) {
  for_each_stored(a, bitmaps, offsets, begin, end, [&](int64_t row, int64_t column, int64_t position) {
    values[position] = row < a.n && column < a.k ? dense[row * a.dense_stride + column] : U{0};
  });
}

// Dense rows of tile rows [begin, end): zeros, then the stored values. dense points at the first of these rows.
template <class U>
void bitmap_scatter(const BitmapConvertArgs& a, const U* values, const uint64_t* bitmaps, const int64_t* offsets,
                    U* dense, int64_t begin, int64_t end) {
  const int64_t first = begin * kTileRows;
  const int64_t last = a.n < end * kTileRows ? a.n : end * kTileRows;
  for (int64_t row = first; row < last; ++row)
    clear_bytes(dense + (row - first) * a.dense_stride, static_cast<uint64_t>(a.k) * sizeof(U));
  for_each_stored(a, bitmaps, offsets, begin, end, [&](int64_t row, int64_t column, int64_t position) {
    if (row < last && column < a.k) dense[(row - first) * a.dense_stride + column] = values[position];
  });
}

}  // namespace pyfast
