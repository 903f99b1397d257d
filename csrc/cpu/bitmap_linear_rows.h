// What the vector forms of bitmap_linear share: the walk over tiles and rows, safe reading, the sums.
//
// The ISA file that includes this defines
//   kUsualValues, stored values of a row of a tile for which memory is asked early
//   template <int tokens> struct Columns { Columns(const float* x, int64_t stride); }   64 activations of each token
//   template <class T, int tokens> void add_row(const T* w, uint64_t word, const Columns<tokens>&, Vec* sum)
// where add_row adds to sum[t] the products of one row's stored values w with token t's activations at the set bits,
// and may read kOverread values from the first one on.
#pragma once

#include "bitmap_linear.h"

namespace pyfast {
namespace {

constexpr int kOverread = kTileColumns + 16;

// The values of a tile, readable for kOverread elements past their end. Only the last tiles of a weight need the
// copy: elsewhere the next tile's values follow in the same buffer.
template <class T>
struct TileValues {
  T copy[kTileRows * kTileColumns + kOverread];

  const T* at(const BitmapLinearArgs& a, int64_t tile) {
    const T* values = static_cast<const T*>(a.values) + a.offsets[tile];
    if (a.offsets[tile + 1] + kOverread <= a.nnz) return values;
    __builtin_memcpy(copy, values, static_cast<uint64_t>(a.offsets[tile + 1] - a.offsets[tile]) * sizeof(T));
    return copy;
  }
};

// Asks for the values that lie kAhead bytes after w, as many lines as a row of a tile takes up. Without it two threads
// stay well below the read bandwidth: decoding leaves too few loads in flight.
template <class T>
[[gnu::always_inline]] inline void prefetch_values(const T* w) {
  constexpr int kAhead = 2048, kLine = 64;
  for (int at = 0; at < kUsualValues * static_cast<int>(sizeof(T)); at += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead + at, 0, 3);
}

template <class T, int tokens>
[[gnu::always_inline]] inline void add_tile_row(const T*& w, uint64_t word, const Columns<tokens>& x, Vec* sum) {
  prefetch_values(w);
  add_row<T, tokens>(w, word, x, sum);
  w += __builtin_popcountll(word);
}

template <class T, int tokens>
void bitmap_strip(const BitmapLinearArgs& a, int64_t tile_row, int64_t token) {
  const int64_t tiles = a.k / kTileColumns;
  TileValues<T> buffer;
  Vec sum[kTileRows][tokens];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sum[r][t] = broadcast(0.0f);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint64_t* words = a.bitmaps + (tile_row * tiles + tile) * kTileRows;
    const Columns<tokens> x(a.x + token * a.x_stride + tile * kTileColumns, a.x_stride);
    const T* w = buffer.at(a, tile_row * tiles + tile);
    if constexpr (tokens == 1 && Vec::width == 16) {  // unrolled, the 16 sums stay in registers
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) add_tile_row<T, tokens>(w, words[r], x, sum[r]);
    } else {
      for (int r = 0; r < kTileRows; ++r) add_tile_row<T, tokens>(w, words[r], x, sum[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) write_output(a.out, tile_row * kTileRows + r, token + t, reduce_add(sum[r][t]));
}

template <class T>
void bitmap_linear(const BitmapLinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) bitmap_strip<T, 4>(a, tile_row, token);
    if (token + 2 <= a.tokens) {
      bitmap_strip<T, 2>(a, tile_row, token);
      token += 2;
    }
    if (token < a.tokens) bitmap_strip<T, 1>(a, tile_row, token);
  }
}

}  // namespace
}  // namespace pyfast
