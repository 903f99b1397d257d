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

// The block of word `word` of tile (tile_row, tile): its place in the dense matrix, clipped to n × k.
struct BitmapBlock {
  int64_t row, column;
  int rows, columns;

  BitmapBlock(const BitmapConvertArgs& a, int64_t tile_row, int64_t tile, int word)
      : row(tile_row * kTileRows + 8 * (word % 2)), column(tile * kTileColumns + 8 * (word / 2)) {
    rows = static_cast<int>(a.n - row < 8 ? (a.n - row < 0 ? 0 : a.n - row) : 8);
    columns = static_cast<int>(a.k - column < 8 ? (a.k - column < 0 ? 0 : a.k - column) : 8);
  }
};

// Bitmaps of tile rows [begin, end) and the number of stored values of each tile into counts.
template <class U>
void bitmap_scan(const BitmapConvertArgs& a, const U* dense, uint64_t* bitmaps, int64_t* counts, int64_t begin,
                 int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    for (int64_t tile = 0; tile < a.tiles; ++tile) {
      int64_t count = 0;
      for (int word = 0; word < kTileWords; ++word) {
        const BitmapBlock block(a, tile_row, tile, word);
        uint64_t bits = 0;
        for (int r = 0; r < block.rows; ++r) {
          const U* p = dense + (block.row + r) * a.dense_stride + block.column;
          uint64_t of_row = 0;
          if (block.columns == 8) {
            for (int c = 0; c < 8; ++c) of_row |= static_cast<uint64_t>(p[c] != 0) << c;
          } else {
            for (int c = 0; c < block.columns; ++c) of_row |= static_cast<uint64_t>(p[c] != 0) << c;
          }
          bits |= of_row << (8 * r);
        }
        bitmaps[(tile_row * a.tiles + tile) * kTileWords + word] = bits;
        count += __builtin_popcountll(bits);
      }
      counts[tile_row * a.tiles + tile] = count;
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
    for (int word = 0; word < kTileWords; ++word) {
      for (uint64_t bits = bitmaps[at * kTileWords + word]; bits != 0; bits &= bits - 1) {
        const int bit = __builtin_ctzll(bits);
        visit(row + 8 * (word % 2) + bit / 8, column + 8 * (word / 2) + bit % 8, position++);
      }
    }
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
    __builtin_memset(dense + (row - first) * a.dense_stride, 0, static_cast<uint64_t>(a.k) * sizeof(U));
  for_each_stored(a, bitmaps, offsets, begin, end, [&](int64_t row, int64_t column, int64_t position) {
    if (row < last && column < a.k) dense[(row - first) * a.dense_stride + column] = values[position];
  });
}

}  // namespace pyfast
