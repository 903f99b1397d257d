// What the vector forms of bitmap_linear share: the walk over tiles and rows, safe reading, the sums.
//
// The ISA file that includes this defines
//   kUsualValues   stored values of a row of a tile for which memory is asked early
//   kOverread      values that Row may read behind a row's first one, whether they are the row's or not
//   template <class T, int tokens> struct Columns { Columns(const float* x, int64_t stride); }   64 of each token
//   template <class T> struct Row {                                   the stored values w of a row, in three steps:
//     Row(const T* w, uint64_t word);                                   loaded,
//     void spread();                                                    brought to their places,
//     template <int tokens> void add(const Columns<T, tokens>&, Vec* sum);   multiplied: added to sum[t] are the
//   }                                                                   products with token t's activations at the bits
// Two rows take every step side by side. A processor looks a few dozen vector operations ahead, about one row of them,
// each of which waits for the one before: one row after another takes twice the time.
#pragma once

#include "bitmap_linear.h"

namespace pyfast {
namespace {

constexpr int kAhead = 4096;  // bytes ahead of a row's values at which memory is asked for

// The values of a tile with room behind them, for the end of the buffer: elsewhere the next tile's values follow.
template <class T>
struct TileCopy {
  T copy[kTileRows * kTileColumns + kOverread];

  const T* of(const BitmapLinearArgs& a, int64_t tile) {
    const uint64_t bytes = static_cast<uint64_t>(a.offsets[tile + 1] - a.offsets[tile]) * sizeof(T);
    copy_bytes(copy, static_cast<const T*>(a.values) + a.offsets[tile], bytes);
    return copy;
  }
};

// Asks for the values that lie kAhead bytes after w, as many lines as a row of a tile takes up. Without it two threads
// stay well below the read bandwidth: decoding leaves too few loads in flight.
template <class T>
[[gnu::always_inline]] inline void prefetch_values(const T* w) {
  constexpr int kLine = 64;
  for (int at = 0; at < kUsualValues * static_cast<int>(sizeof(T)); at += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead + at, 0, 3);
}

// Adds the products of two rows of a tile and moves on behind their values.
template <class T, int tokens>
[[gnu::always_inline]] inline void add_two_rows(const T*& w, const uint64_t* words, const Columns<T, tokens>& x,
                                                Vec (*sum)[tokens]) {
  const T* second = w + __builtin_popcountll(words[0]);
  prefetch_values(w);
  prefetch_values(second);
  Row<T> a(w, words[0]), b(second, words[1]);
  a.spread();
  b.spread();
  a.add(x, sum[0]);
  b.add(x, sum[1]);
  w = second + __builtin_popcountll(words[1]);
}

// The sums of 16 rows over all tiles. copied: the strip comes too near the end of the buffer to be read in place. (A
// call in the loop would put all sums into memory: the two cases are two functions.)
template <class T, int tokens, bool copied>
void bitmap_strip(const BitmapLinearArgs& a, int64_t tile_row, int64_t token) {
  const int64_t tiles = a.k / kTileColumns;
  Vec sum[kTileRows][tokens];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[r][t] = broadcast(0.0f);
  const T* w = static_cast<const T*>(a.values) + a.offsets[tile_row * tiles];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileRows;
    const Columns<T, tokens> x(a.x + token * a.x_stride + tile * kTileColumns, a.x_stride);
    if constexpr (copied) {
      TileCopy<T> buffer;
      w = buffer.of(a, tile_row * tiles + tile);
      for (int r = 0; r < kTileRows; r += 2) add_two_rows<T, tokens>(w, words + r, x, sum + r);
    } else if constexpr (tokens == 1 && Vec::width == 16) {  // unrolled, the 16 sums stay in registers
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r += 2) add_two_rows<T, tokens>(w, words + r, x, sum + r);
    } else {
      for (int r = 0; r < kTileRows; r += 2) add_two_rows<T, tokens>(w, words + r, x, sum + r);
    }
  }
  float total[kTileRows][tokens];  // first all sums, then the outputs: a call saves no vector register
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) total[r][t] = reduce_add(sum[r][t]);
  for (int r = 0; r < kTileRows; ++r)
    for (int t = 0; t < tokens; ++t) write_output(a.out, tile_row * kTileRows + r, token + t, total[r][t]);
}

template <class T, int tokens>
void bitmap_rows(const BitmapLinearArgs& a, int64_t tile_row, int64_t token) {
  const int64_t end = a.offsets[(tile_row + 1) * (a.k / kTileColumns)];
  if (end + kOverread <= a.nnz)
    bitmap_strip<T, tokens, false>(a, tile_row, token);
  else
    bitmap_strip<T, tokens, kOverread != 0>(a, tile_row, token);
}

template <class T>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) bitmap_rows<T, 4>(a, tile_row, token);
    if (token + 2 <= a.tokens) {
      bitmap_rows<T, 2>(a, tile_row, token);
      token += 2;
    }
    if (token < a.tokens) bitmap_rows<T, 1>(a, tile_row, token);
  }
}

}  // namespace
}  // namespace pyfast
