// indexed_convert: the layout of indexed_linear.h made from a container's tensors. Portable code. A panel's block is
// looked at twice: first its rows are counted and put in order, then their entries are written to their places.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bitmap_linear.h"
#include "indexed_linear.h"
#include "scalars.h"
#include "sparse24_linear.h"

namespace pyfast {

struct IndexedShape {
  int64_t n, k, panel, block, blocks;

  int64_t quads() const { return panel / kQuad; }  // of a panel's block
  int64_t column_end(int64_t b) const { return std::min(k, (b + 1) * block); }
};

// 2:4 values [n, k_padded/2] and metadata: entries of the padding are left out.
template <class T>
struct Sparse24Source {
  const T* values;
  const uint16_t* metadata;
  int64_t k_padded;
  const float* scales;

  // The column of a row's j-th value, from the metadata of the 8 values that it is among.
  static int64_t column(uint64_t word, int64_t j) {
    return j / 2 * 4 + static_cast<int64_t>((word >> (2 * (j % 8))) & 3);
  }

  // Entries of a row within a block of columns: two of every four, but for four that the weight's end cuts.
  int64_t count(const IndexedShape& s, int64_t row, int64_t b) const {
    const int64_t begin = b * s.block, end = s.column_end(b), whole = end / 4 * 4;
    int64_t found = (whole - begin) / 2;
    if (whole < end) {
      const uint64_t word = metadata[row * (k_padded / 16) + whole / 16];
      found += (column(word, whole / 2) < end) + (column(word, whole / 2 + 1) < end);
    }
    return found;
  }

  // visit(row, column within the block, value) for rows [first_row, last_row), a strip of at most 16.
  template <class Visit>
  void strip(const IndexedShape& s, int64_t first_row, int64_t last_row, int64_t b, const Visit& visit) const {
    const int64_t begin = b * s.block, end = s.column_end(b);
    for (int64_t row = first_row; row < last_row; ++row) {
      const T* v = values + row * (k_padded / 2);
      const uint16_t* words = metadata + row * (k_padded / 16);
      const float scale = scales == nullptr ? 1.0f : scales[row];
      for (int64_t c = begin; c < end; c += 16)
        for (int64_t j = c / 2; j < c / 2 + 8; ++j) {
          const int64_t at = column(words[c / 16], j);
          if (at < end) visit(row, at - begin, widen(v[j]) * scale);
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

  // The first tile of a strip within a block, and how many there are.
  int64_t first_tile(const IndexedShape& s, int64_t row, int64_t b) const {
    return row / kTileRows * tiles + b * s.block / kTileColumns;
  }
  int64_t tiles_of(const IndexedShape& s, int64_t b) const {
    return std::min(s.block / kTileColumns, tiles - b * s.block / kTileColumns);
  }

  int64_t count(const IndexedShape& s, int64_t row, int64_t b) const {
    const uint64_t* words = bitmaps + first_tile(s, row, b) * kTileRows + row % kTileRows;
    int64_t found = 0;
    for (int64_t t = 0; t < tiles_of(s, b); ++t) found += __builtin_popcountll(words[t * kTileRows]);
    return found;
  }

  // A row's values lie in as many places as the block has tiles: one place a tile moves on from row to row.
  template <class Visit>
  void strip(const IndexedShape& s, int64_t first_row, int64_t last_row, int64_t b, const Visit& visit) const {
    const int64_t at = first_tile(s, first_row, b), here = tiles_of(s, b);
    const T* v[kMostBlock / kTileColumns];
    for (int64_t t = 0; t < here; ++t) v[t] = values + offsets[at + t];
    for (int64_t row = first_row; row < last_row; ++row) {
      const float scale = scales == nullptr ? 1.0f : scales[row];
      for (int64_t t = 0; t < here; ++t)
        for (uint64_t bits = bitmaps[(at + t) * kTileRows + row - first_row]; bits != 0; bits &= bits - 1)
          visit(row, t * kTileColumns + __builtin_ctzll(bits), widen(*v[t]++) * scale);
    }
  }
};

// The order of a panel's rows within a block, fullest first, to rows [panel], and the steps of its quads to
// steps [panel / 4]. Rows beyond the weight's last are empty.
template <class Value, class Source>
void order_rows(const IndexedShape& s, const Source& source, int64_t p, int64_t b, uint8_t* rows, int32_t* steps) {
  int32_t count[kMostPanel] = {}, place[kMostBlock + 2] = {};
  const int64_t here = std::min(s.panel, s.n - p * s.panel);
  for (int64_t r = 0; r < here; ++r) count[r] = static_cast<int32_t>(source.count(s, p * s.panel + r, b));
  for (int64_t r = 0; r < s.panel; ++r) ++place[count[r]];
  for (int64_t length = kMostBlock; length >= 0; --length)
    place[length] += place[length + 1];  // rows that long or longer
  for (int64_t r = s.panel - 1; r >= 0; --r) {
    const int32_t at = --place[count[r]];
    rows[at] = static_cast<uint8_t>(r);
    if (at % kQuad == 0) steps[at / kQuad] = (count[r] + kEntriesOfStep<Value> - 1) / kEntriesOfStep<Value>;
  }
}

// starts, rows: of this panel's block. bf16 is exact where the source is bfloat16.
template <class Value, class Source>
void write_quads(const IndexedShape& s, const Source& source, int64_t p, int64_t b, const int32_t* starts,
                 const uint8_t* rows, Value* values, uint8_t* columns) {
  constexpr int64_t a_step = kEntriesOfStep<Value>, a_quad = kQuad * a_step;
  const auto put = [&](int64_t at, int64_t column, float value) {
    narrow(value, values + at);
    columns[at] = static_cast<uint8_t>(column);
    return (at + 1) % a_step != 0 ? at + 1 : at + 1 + a_quad - a_step;  // where the row's next entry goes
  };
  int64_t next[kMostPanel];
  for (int64_t i = 0; i < s.panel; ++i) next[rows[i]] = a_quad * starts[i / kQuad] + i % kQuad * a_step;
  const int64_t base = p * s.panel, last = std::min(s.n, base + s.panel);
  for (int64_t row = base; row < last; row += kTileRows)
    source.strip(s, row, std::min<int64_t>(last, row + kTileRows), b,
                 [&](int64_t r, int64_t column, float value) { next[r - base] = put(next[r - base], column, value); });
  for (int64_t i = 0; i < s.panel; ++i)
    for (int64_t at = next[rows[i]]; at < a_quad * starts[i / kQuad + 1];) at = put(at, s.block, 0.0f);
}

}  // namespace pyfast
