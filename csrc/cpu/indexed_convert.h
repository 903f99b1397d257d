// indexed_convert: the layout of indexed_linear.h made from a container's tensors. Portable code. Every list is made
// twice, first counted, then written; a source is asked for the lists of one strip of 16 rows within one block of
// columns, and gives them row by row.
#pragma once

#include <cstdint>

#include "bitmap_linear.h"
#include "indexed_linear.h"
#include "scalars.h"
#include "sparse24_linear.h"

namespace pyfast {

struct IndexedShape {
  int64_t n, k, panel, block, blocks;

  int64_t list(int64_t row, int64_t b) const { return (row / panel * blocks + b) * panel + row % panel; }
};

// 2:4 values [n, k_padded/2] and metadata: entries of the padding are left out.
template <class T>
struct Sparse24Source {
  const T* values;
  const uint16_t* metadata;
  int64_t k_padded;
  const float* scales;

  template <class Visit>
  void strip(const IndexedShape& s, int64_t first_row, int64_t b, const Visit& visit) const {
    const int64_t last_row = s.n < first_row + kTileRows ? s.n : first_row + kTileRows;
    const int64_t begin = b * s.block, end = s.k < begin + s.block ? s.k : begin + s.block;
    for (int64_t row = first_row; row < last_row; ++row) {
      const T* v = values + row * (k_padded / 2);
      const uint16_t* words = metadata + row * (k_padded / 16);
      const float scale = scales == nullptr ? 1.0f : scales[row];
      for (int64_t j = begin / 2; j < (end + 3) / 4 * 2; ++j) {
        const int64_t column = j / 2 * 4 + ((words[j / 8] >> (2 * (j % 8))) & 3);
        if (column < end) visit(row, column - begin, widen(v[j]) * scale);
      }
    }
  }
};

template <class T>
struct BitmapSource {
  const T* values;
  const uint64_t* bitmaps;
  const int64_t* offsets;
  int64_t tiles;  // in a row of tiles
  const float* scales;

  // A row's values lie in as many places as the block has tiles: one place a tile moves on from row to row.
  template <class Visit>
  void strip(const IndexedShape& s, int64_t first_row, int64_t b, const Visit& visit) const {
    constexpr int kMost = 256 / kTileColumns;
    const int64_t first = b * s.block / kTileColumns;
    const int64_t here = tiles - first < s.block / kTileColumns ? tiles - first : s.block / kTileColumns;
    const int64_t at = first_row / kTileRows * tiles + first;
    const T* v[kMost];
    for (int64_t t = 0; t < here; ++t) v[t] = values + offsets[at + t];
    for (int64_t r = 0; r < kTileRows && first_row + r < s.n; ++r) {
      const float scale = scales == nullptr ? 1.0f : scales[first_row + r];
      for (int64_t t = 0; t < here; ++t)
        for (uint64_t bits = bitmaps[(at + t) * kTileRows + r]; bits != 0; bits &= bits - 1)
          visit(first_row + r, t * kTileColumns + __builtin_ctzll(bits), widen(*v[t]++) * scale);
    }
  }
};

// Length of every list of strips [begin, end), in units of kIndexedUnit, into lengths[list].
template <class Source>
void count_lists(const IndexedShape& s, const Source& source, int32_t* lengths, int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t b = 0; b < s.blocks; ++b) {
      int32_t count[kTileRows] = {};
      source.strip(s, strip * kTileRows, b, [&](int64_t row, int64_t, float) { ++count[row % kTileRows]; });
      for (int64_t r = 0; r < kTileRows && strip * kTileRows + r < s.n; ++r)
        lengths[s.list(strip * kTileRows + r, b)] = (count[r] + kIndexedUnit - 1) / kIndexedUnit;
    }
}

template <class Source>
void write_lists(const IndexedShape& s, const Source& source, const int32_t* starts, float* values, uint8_t* columns,
                 int64_t begin, int64_t end) {
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t b = 0; b < s.blocks; ++b) {
      int64_t next[kTileRows];
      const int64_t rows = s.n - strip * kTileRows < kTileRows ? s.n - strip * kTileRows : kTileRows;
      for (int64_t r = 0; r < rows; ++r) next[r] = int64_t{kIndexedUnit} * starts[s.list(strip * kTileRows + r, b)];
      source.strip(s, strip * kTileRows, b, [&](int64_t row, int64_t column, float value) {
        const int64_t i = next[row % kTileRows]++;
        values[i] = value;
        columns[i] = static_cast<uint8_t>(column);
      });
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = next[r]; i % kIndexedUnit != 0; ++i) {
          values[i] = 0.0f;
          columns[i] = 0;
        }
    }
}

}  // namespace pyfast
