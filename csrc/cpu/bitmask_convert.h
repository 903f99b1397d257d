// bitmask_convert: the bitmap form of bitmap_linear.h to and from a row-major bitmask, the layout in which checkpoints
// of sparse models are exchanged:
//
//   compressed  [stored]            the stored elements in the order of row, column
//   bitmask     [n, ceil(k / 8)]    one bit an element: bit c % 8 of byte c / 8 of its row
//   row_offsets [n]                 where each row begins in compressed
//
// Eight bytes of a row are the word of that row in a tile, and its values lie together in both forms: a conversion
// copies runs of up to 64 values from one cursor a row to one cursor a tile, or back. Portable code for little-endian
// machines; elements are moved as integers of their size.
#pragma once

#include <cstdint>

#include "bitmap_linear.h"

namespace pyfast {

struct BitmaskConvertArgs {
  int64_t n, k;
  int64_t tiles;      // in a row of tiles: ceil(k / 64)
  int64_t row_bytes;  // of the bitmask: ceil(k / 8)
};

// Bytes of the bitmask that the words of a tile cover.
inline uint64_t bitmask_bytes(const BitmaskConvertArgs& a, int64_t tile) {
  const int64_t left = a.row_bytes - 8 * tile;
  return left < 8 ? static_cast<uint64_t>(left) : 8;
}

// Bitmaps of tile rows [begin, end), without bits beyond k, and the number of stored values of each tile into counts.
inline void bitmask_scan(const BitmaskConvertArgs& a, const uint8_t* bitmask, uint64_t* bitmaps, int64_t* counts,
                         int64_t begin, int64_t end) {
  for (int64_t at = begin * a.tiles; at < end * a.tiles; ++at) {
    const int64_t first = at / a.tiles * kTileRows, tile = at % a.tiles, columns = a.k - tile * kTileColumns;
    const uint64_t inside = columns < kTileColumns ? (uint64_t{1} << columns) - 1 : ~uint64_t{0};
    int64_t count = 0;
    for (int64_t r = 0; r < kTileRows; ++r) {
      uint64_t word = 0;
      if (first + r < a.n)
        __builtin_memcpy(&word, bitmask + (first + r) * a.row_bytes + 8 * tile, bitmask_bytes(a, tile));
      bitmaps[at * kTileRows + r] = word &= inside;
      count += __builtin_popcountll(word);
    }
    counts[at] = count;
  }
}

// The words of a row: the one of tile t is words[16 t].
inline const uint64_t* words_of_row(const BitmaskConvertArgs& a, const uint64_t* bitmaps, int64_t row) {
  return bitmaps + row / kTileRows * a.tiles * kTileRows + row % kTileRows;
}

inline int64_t stored_in_row(const BitmaskConvertArgs& a, const uint64_t* bitmaps, int64_t row) {
  const uint64_t* words = words_of_row(a, bitmaps, row);
  int64_t count = 0;
  for (int64_t tile = 0; tile < a.tiles; ++tile) count += __builtin_popcountll(words[tile * kTileRows]);
  return count;
}

// Calls copy(position in compressed, position in values, number of values) for every run of tile rows [begin, end).
// Rows beyond n are not followed.
template <class Copy>
void for_each_run(const BitmaskConvertArgs& a, const uint64_t* bitmaps, const int64_t* offsets,
                  const int64_t* row_offsets, int64_t begin, int64_t end, const Copy& copy) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    const int64_t first = tile_row * kTileRows, rows = a.n - first < kTileRows ? a.n - first : kTileRows;
    int64_t cursor[kTileRows];
    for (int64_t r = 0; r < rows; ++r) cursor[r] = row_offsets[first + r];
    for (int64_t tile = 0; tile < a.tiles; ++tile) {
      const int64_t at = tile_row * a.tiles + tile;
      int64_t position = offsets[at];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = __builtin_popcountll(bitmaps[at * kTileRows + r]);
        copy(cursor[r], position, count);
        cursor[r] += count;
        position += count;
      }
    }
  }
}

// One row of the bitmask.
inline void bitmask_write(const BitmaskConvertArgs& a, const uint64_t* bitmaps, uint8_t* bitmask, int64_t row) {
  const uint64_t* words = words_of_row(a, bitmaps, row);
  for (int64_t tile = 0; tile < a.tiles; ++tile)
    __builtin_memcpy(bitmask + row * a.row_bytes + 8 * tile, words + tile * kTileRows, bitmask_bytes(a, tile));
}

}  // namespace pyfast
